"""The pt2e flow: `torch.export` and torchao's quantizer for x86, after training only.

It sees through attention, functional layers and most Python that `fx` can't trace. In process the int8 graph is
compiled by inductor at its first call; uncompiled it rounds to int8 and computes in float, which is what
`torch.export` and ONNX want of it.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from lightning_compress.errors import CompressionError
from lightning_compress.modules.isolation import isolated_random_state
from lightning_compress.quantization.numerics.int8 import StaticInt8
from lightning_compress.quantization.static.flows.exported_kernels import exported_steps
from lightning_compress.quantization.static.flows.exported_weights import (
    name_sources_,
    simplify_exported_,
)
from lightning_compress.quantization.static.flows.flow import AVERAGING_CONSTANT, largest_code
from lightning_compress.quantization.static.flows.graphs import value_read, weights_read
from lightning_compress.quantization.static.flows.int8_graph import Int8Graph
from lightning_compress.quantization.static.flows.kernels import furthest, reasons
from lightning_compress.quantization.static.flows.pt2e_qparams import fix_ as fix_
from lightning_compress.quantization.static.flows.pt2e_qparams import int8_layers as int8_layers
from lightning_compress.quantization.static.flows.pt2e_qparams import module_called
from lightning_compress.quantization.static.flows.pt2e_qparams import roundings as roundings
from lightning_compress.quantization.static.flows.pt2e_trace import Exported, quiet
from lightning_compress.quantization.static.flows.pt2e_trace import trace as trace

with quiet():
    from torchao.quantization.pt2e.observer import (
        HistogramObserver,
        MinMaxObserver,
        MovingAverageMinMaxObserver,
        PerChannelMinMaxObserver,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import QuantizationSpec
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import QuantizationConfig, X86InductorQuantizer


def prepare(graph: nn.Module, scheme: StaticInt8, *, training: bool, floats: Collection[str] = ()) -> Exported:
    """Return a copy of ``graph`` with observers; the layers in ``floats`` have none.

    Raises:
        CompressionError: for training, which this flow isn't for.
    """
    if training:
        raise CompressionError("`flow` must be 'fx' for training. Received: flow='pt2e'.")
    assert isinstance(graph, Exported)
    quantizer = X86InductorQuantizer().set_global(_configuration(scheme))
    for path in floats:
        quantizer.set_module_name_qconfig(f"module.{path}", None)
    with quiet(), torch.no_grad(), isolated_random_state():
        copied = copy.deepcopy(graph.graph)
        simplify_exported_(copied)
        name_sources_(copied, floats)
        prepared = prepare_pt2e(copied, quantizer)
        for node, tensor in _tensors(prepared):
            for user in node.users:
                if isinstance(observer := module_called(prepared, user), PerChannelMinMaxObserver):
                    observer(tensor)  # so that it has its shape before a checkpoint is loaded
    return Exported(prepared)


def _tensors(graph: GraphModule) -> Iterator[tuple[Node, Tensor]]:
    """Yield the parameters and buffers that a graph reads."""
    for node in graph.graph.nodes:
        if node.users and isinstance(value := value_read(graph, node), Tensor):
            yield node, value


_OBSERVERS = {
    "moving_average": MovingAverageMinMaxObserver.with_args(eps=2**-12, averaging_constant=AVERAGING_CONSTANT),
    "minmax": MinMaxObserver.with_args(eps=2**-12),
    "histogram": HistogramObserver.with_args(eps=2**-12),
}


def _configuration(scheme: StaticInt8) -> QuantizationConfig:
    largest = largest_code(scheme.reduced)
    activations = QuantizationSpec(
        dtype=torch.uint8,
        quant_min=0,
        quant_max=255,
        qscheme=torch.per_tensor_affine,
        observer_or_fake_quant_ctr=_OBSERVERS[scheme.observer],
    )
    weights = QuantizationSpec(
        dtype=torch.int8,
        quant_min=-largest,
        quant_max=largest,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
        observer_or_fake_quant_ctr=PerChannelMinMaxObserver,
    )
    return QuantizationConfig(activations, activations, weights, None)


def observe_(prepared: nn.Module, on: bool) -> None:
    """Do nothing: its observers observe whenever it runs, which is while it is calibrated."""


def fake_quantize_(prepared: nn.Module, on: bool) -> None:
    """Do nothing: observers let values through."""


def quantizes(prepared: nn.Module) -> bool:
    """Tell whether any layer computes in int8."""
    return any(isinstance(module, PerChannelMinMaxObserver) for module in prepared.modules())


def float_weights(prepared: nn.Module) -> dict[str, str]:
    """Return the matrices that no observer sees; see `Flow`."""
    assert isinstance(prepared, Exported)
    graph = prepared.graph
    observed = {
        str(node.target).removeprefix("module.")
        for node, _ in _tensors(graph)
        if any(isinstance(module_called(graph, user), PerChannelMinMaxObserver) for user in node.users)
    }
    read = ((name.removeprefix("module."), why) for name, why in weights_read(graph) if name.startswith("module."))
    return {name: why for name, why in read if name not in observed}


def convert(prepared: nn.Module, scheme: StaticInt8, floats: Collection[str] = ()) -> Int8Graph:
    """Return a new int8 graph on the CPU; ``prepared`` is left as it is, and was judged before: no layer goes back."""
    assert isinstance(prepared, Exported) and not floats
    with quiet(), torch.no_grad(), isolated_random_state():
        converted = convert_pt2e(copy.deepcopy(prepared.graph).cpu())
    _drop_unread_(converted)
    return Int8Graph(converted)


def wrong_kernels(
    prepared: nn.Module, int8: nn.Module, scheme: StaticInt8, inputs: list[Tensor], drawn_only: bool = False
) -> dict[str, str]:
    """Return the layers that in ``int8`` compute something else than they do, each with a reason; see `Flow`.

    That is, uncompiled: `Int8Graph` judges its compiled form when there is one.
    """
    assert isinstance(prepared, Exported) and isinstance(int8, Exported)
    with quiet():
        run = partial(exported_steps, int8.graph, copy.deepcopy(prepared.graph).cpu())
        return reasons(furthest(run, inputs, drawn_only), {})


def _drop_unread_(graph: GraphModule) -> None:
    """Take out the float weights that upstream leaves behind."""
    read = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    for path, module in list(graph.named_modules()):
        for tensors in (module._parameters, module._buffers):
            for name in [name for name in tensors if f"{path}.{name}".lstrip(".") not in read]:
                del tensors[name]
    graph.delete_all_unused_submodules()
