"""The pt2e flow: `torch.export` and torchao's quantizer for x86, after training only.

It sees through attention, functional layers and most Python that `fx` can't trace. In process the int8 graph is
compiled by inductor at its first call; uncompiled it rounds to int8 and computes in float, which is what
`torch.export` and ONNX want of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule, Node

from lightning_compress.errors import CompressionError
from lightning_compress.modules.isolation import isolated_evaluation, isolated_random_state
from lightning_compress.modules.outputs import Structure, flatten
from lightning_compress.quantization.numerics.int8 import StaticInt8
from lightning_compress.quantization.static.flows.exported_kernels import exported_steps
from lightning_compress.quantization.static.flows.exported_weights import fold_weights_, name_sources_, number_paddings_
from lightning_compress.quantization.static.flows.flow import AVERAGING_CONSTANT, Signature, Trace
from lightning_compress.quantization.static.flows.graphs import value_read, weights_read
from lightning_compress.quantization.static.flows.int8_graph import Exported, Int8Graph, quiet
from lightning_compress.quantization.static.flows.kernels import furthest, reasons

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


class _Call(nn.Module):
    """Makes a function of the tensors of its call of a module; what it puts those of its output into is told aside."""

    def __init__(self, module: nn.Module, signature: Signature, tell: Callable[[Structure], None]) -> None:
        super().__init__()
        self.module = module
        self.signature = signature
        self.tell = tell
        self.training = module.training

    def forward(self, *tensors: Tensor) -> list[Any]:
        args, kwargs = self.signature.rebuild(list(tensors))
        outputs, structure = flatten(type(self.module).forward(self.module, *args, **kwargs))
        self.tell(structure)
        return outputs


def trace(module: nn.Module, signature: Signature, hooked: Collection[str] = ()) -> Trace:
    """Return the exported form of ``module`` in evaluation.

    All sizes that its code leaves open may vary, or the first alone where else it couldn't be one. Raises whatever
    `torch.export` raises where control flow depends on data.
    """
    if hooked:
        raise CompressionError(f"its `{next(iter(hooked))}` has a forward hook, which an exported graph doesn't call")
    device = next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    inputs = tuple(tensor.to(device) for tensor in _sizes_above_one(signature.inputs))
    structures: list[Structure] = []
    call = _Call(module, signature, structures.append)
    with quiet(), isolated_evaluation(module):
        call(*inputs)  # so that it is exported with what it makes at its first call, whether it has been called or not
        exported = _export(call, inputs)
    read = [str(node.target) for node in exported.graph.nodes if node.op == "get_attr" and node.users]
    names = frozenset(name.removeprefix("module.") for name in read if name.startswith("module."))
    return Trace(Exported(exported), structures[-1], names, {})


def _export(call: nn.Module, inputs: tuple[Tensor, ...]) -> GraphModule:
    """Return the graph with as many variable sizes as leave a batch of one possible."""
    several = [range(tensor.dim()) for tensor in inputs]
    for dims in (several, [sizes[:1] for sizes in several]):
        dynamic = (tuple(dict.fromkeys(sizes, Dim.AUTO) for sizes in dims),)
        exported = torch.export.export(call, inputs, dynamic_shapes=dynamic).module()
        assert isinstance(exported, GraphModule)
        try:
            exported(*[tensor[:1] for tensor in inputs])
            break
        except (AssertionError, RuntimeError, IndexError):  # with all sizes variable, some code excludes a one
            continue
    return exported


def _sizes_above_one(inputs: list[Tensor]) -> list[Tensor]:
    """Return a batch of one would be exported as a batch that is always one."""
    if all(tensor.dim() and tensor.shape[0] == 1 for tensor in inputs):
        return [tensor.expand(2, *tensor.shape[1:]) for tensor in inputs]
    return inputs


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
        number_paddings_(copied)
        fold_weights_(copied)
        name_sources_(copied, floats)
        prepared = prepare_pt2e(copied, quantizer)
        for node, tensor in _tensors(prepared):
            for user in node.users:
                if isinstance(observer := _called(prepared, user), PerChannelMinMaxObserver):
                    observer(tensor)  # so that it has its shape before a checkpoint is loaded
    return Exported(prepared)


def _tensors(graph: GraphModule) -> Iterator[tuple[Node, Tensor]]:
    """Yield the parameters and buffers that a graph reads."""
    for node in graph.graph.nodes:
        if node.users and isinstance(value := value_read(graph, node), Tensor):
            yield node, value


def _called(graph: GraphModule, node: Node) -> nn.Module | None:
    return graph.get_submodule(str(node.target)) if node.op == "call_module" else None


_OBSERVERS = {
    "moving_average": MovingAverageMinMaxObserver.with_args(eps=2**-12, averaging_constant=AVERAGING_CONSTANT),
    "minmax": MinMaxObserver.with_args(eps=2**-12),
    "histogram": HistogramObserver.with_args(eps=2**-12),
}


def _configuration(scheme: StaticInt8) -> QuantizationConfig:
    reduced = scheme.reduced
    activations = QuantizationSpec(
        dtype=torch.uint8,
        quant_min=0,
        quant_max=255,
        qscheme=torch.per_tensor_affine,
        observer_or_fake_quant_ctr=_OBSERVERS[scheme.observer],
    )
    weights = QuantizationSpec(
        dtype=torch.int8,
        quant_min=-64 if reduced else -128,
        quant_max=63 if reduced else 127,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
        observer_or_fake_quant_ctr=PerChannelMinMaxObserver.with_args(eps=2**-12),
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
        if any(isinstance(_called(graph, user), PerChannelMinMaxObserver) for user in node.users)
    }
    read = ((name.removeprefix("module."), why) for name, why in weights_read(graph) if name.startswith("module."))
    return {name: why for name, why in read if name not in observed}


def convert(prepared: nn.Module, scheme: StaticInt8, floats: Collection[str] = ()) -> Int8Graph:
    """Return a new int8 graph on the CPU; ``prepared`` is left as it is.

    Raises:
        CompressionError: prepared layers are to be float nonetheless, which this flow can't do.
    """
    assert isinstance(prepared, Exported)
    if floats:
        raise CompressionError(
            "A layer that is converted must compute what it computed before. Received: "
            f"{', '.join(map(repr, floats))}, whose int8 form doesn't. Exclude it in `targets`, or use flow='fx'."
        )
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
