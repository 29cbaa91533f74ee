"""The fx flow: `torch.ao.quantization` in graph mode, int8 kernels in eager mode with no compiler.

Everything that upstream is to remove in torch 2.15 is imported in this file and `fx_qparams.py` alone.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.nn.quantized import LeakyReLU
from torch.ao.quantization import (
    FusedMovingAvgObsFakeQuantize,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    PlaceholderObserver,
    QConfig,
    QConfigMapping,
    disable_fake_quant,
    disable_observer,
    enable_fake_quant,
    enable_observer,
    get_default_qat_qconfig_mapping,
    get_default_qconfig_mapping,
)
from torch.ao.quantization.fx.custom_config import PrepareCustomConfig
from torch.ao.quantization.fx.utils import assert_and_get_unique_device
from torch.ao.quantization.quantize_fx import convert_fx, convert_to_reference_fx, prepare_fx, prepare_qat_fx
from torch.fx import GraphModule
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils.parametrize import is_parametrized

from lightning_compress.modules.isolation import isolated_random_state
from lightning_compress.quantization.numerics.int8 import StaticInt8, kernels_of
from lightning_compress.quantization.static.flows.flow import AVERAGING_CONSTANT, largest_code
from lightning_compress.quantization.static.flows.fx_qparams import fix_ as fix_
from lightning_compress.quantization.static.flows.fx_qparams import roundings as roundings
from lightning_compress.quantization.static.flows.fx_trace import WITH_KERNEL, Opaque, simplify_
from lightning_compress.quantization.static.flows.fx_trace import trace as trace  # of `Flow`
from lightning_compress.quantization.static.flows.graphs import Function, value_read, weights_read
from lightning_compress.quantization.static.flows.kernels import furthest, quantized_steps, reasons
from lightning_compress.quantization.static.flows.names import AGAIN, called, is_one_of, own_path

FLOAT_TYPES = (nn.Embedding, nn.EmbeddingBag, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
"""Layers that static int8 leaves in float: torch has no static kernel for them."""

WRONG_KERNELS: tuple[Any, ...] = (
    *_ConvTransposeNd.__subclasses__(),
    *(functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d),
)
"""What has int8 kernels in torch that compute something else: with `onednn` wherever the channel counts differ, with
`fbgemm` where the kernel is two rows high. `x86` takes the one or the other by the CPU, and a copy or a file that is
loaded takes what its own process would, so it doesn't help that this one is right."""


def prepare(graph: nn.Module, scheme: StaticInt8, *, training: bool, floats: Collection[str] = ()) -> GraphModule:
    """Return ``graph`` with fake-quantizers (training) or observers (calibration); Parameters are kept as they are."""
    assert isinstance(graph, GraphModule)
    simplify_(graph, training)
    mapping = _qconfig_mapping(scheme, training)
    tied = _read_as_floats(graph)
    for path, module in graph.named_modules():
        stays = is_parametrized(module) or isinstance(getattr(module, "padding", None), str)
        is_read = isinstance(module, WITH_KERNEL) and id(module.weight) in tied
        if stays or is_read or is_one_of(path, floats):
            mapping.set_module_name(path, None)
    config = PrepareCustomConfig().set_non_traceable_module_classes([Opaque, Function])
    example = tuple(torch.zeros(1) for node in graph.graph.nodes if node.op == "placeholder")
    # Upstream makes new layers around the old parameters, and draws initial weights for them first.
    with _upstream_quiet(), kernels_of(scheme.engine), isolated_random_state():
        graph.train(training)
        prepared = (prepare_qat_fx if training else prepare_fx)(graph, mapping, example, config)
        _guard_(prepared)
    # Upstream leaves some of the weights' observers on the CPU.
    prepared = prepared.to(next((parameter.device for parameter in graph.parameters()), torch.device("cpu")))
    _observe_weights_(prepared)
    return prepared


def _read_as_floats(graph: GraphModule) -> set[int]:
    """Return ids of the tensors that something reads that isn't a layer with a kernel: there are no codes of them."""
    behind = {node for node in graph.graph.nodes if node.op == "output"}  # and what the output is computed of
    for node in reversed(graph.graph.nodes):
        behind |= set(node.all_input_nodes) if node in behind else set()
    read = [value_read(graph, node) for node in behind if node.op == "get_attr"]
    for module in graph.modules():
        if isinstance(module, Opaque):
            read += module.__dict__["module"].parameters()
        elif not isinstance(module, (*WITH_KERNEL, GraphModule)) and type(module) is not nn.Module:
            read += module.parameters(recurse=False)
    return {id(tensor) for tensor in read}


def observe_(prepared: nn.Module, on: bool) -> None:
    """Let the activations' ranges move, or freeze them."""
    prepared.apply(enable_observer if on else disable_observer)


def fake_quantize_(prepared: nn.Module, on: bool) -> None:
    """Round values, or let them through."""
    prepared.apply(enable_fake_quant if on else disable_fake_quant)


def quantizes(prepared: nn.Module) -> bool:
    """Tell whether any layer computes in int8."""
    return bool(int8_layers(prepared))


def int8_layers(prepared: nn.Module) -> set[str]:
    """Return the paths of the layers that become int8; see `Flow`."""
    assert isinstance(prepared, GraphModule)
    paths = [str(node.target) for node in prepared.graph.nodes if node.op == "call_module"]
    layers = [(path, prepared.get_submodule(path)) for path in paths]
    return {called(path) for path, layer in layers if _has_kernel(layer) and _holds_matrix(layer)}


def _holds_matrix(module: nn.Module) -> bool:
    return any(isinstance(inner, WITH_KERNEL) for inner in module.modules())


def convert(prepared: nn.Module, scheme: StaticInt8, floats: Collection[str] = ()) -> GraphModule:
    """Return a new int8 graph on the CPU, but for the layers in ``floats``; ``prepared`` is left as it is."""
    return _convert_with(convert_fx, prepared, scheme, floats)


def wrong_kernels(
    prepared: nn.Module, int8: nn.Module, scheme: StaticInt8, inputs: list[Tensor], drawn_only: bool = False
) -> dict[str, str]:
    """Find the layers whose kernels in ``int8`` compute something else than they do, with reasons; see `Flow`."""
    reference = _convert_with(convert_to_reference_fx, prepared, scheme, ())
    assert isinstance(int8, GraphModule) and isinstance(prepared, GraphModule)
    far = furthest(partial(quantized_steps, int8, reference), inputs, drawn_only)
    kinds = {path: type(prepared.get_submodule(path)).__name__ for path in far if path}
    return {path.partition(AGAIN)[0]: reason for path, reason in reasons(far, kinds).items()}


def _convert_with(
    upstream: Callable[[GraphModule], GraphModule], prepared: nn.Module, scheme: StaticInt8, floats: Collection[str]
) -> GraphModule:
    assert isinstance(prepared, GraphModule)
    with _upstream_quiet(), kernels_of(scheme.engine), torch.no_grad(), isolated_random_state():
        graph = copy.deepcopy(prepared).cpu().eval()
        for module in graph.modules():
            module._forward_hooks.clear()
        _observe_weights_(graph, anew=True)
        _unguard_(graph)
        schemes = graph.meta["_observed_graph_module_attrs"].node_name_to_qconfig
        for node in graph.graph.nodes:
            node.stack_trace = node.name  # what a kernel is made of keeps its trace, though not its name
            if node.op == "call_module" and is_one_of(str(node.target), floats):
                schemes[node.name] = None
        converted = upstream(graph)
    for path, module in list(converted.named_modules()):
        if isinstance(module, Opaque):
            converted.set_submodule(path, module.__dict__["module"].cpu().eval())
        elif isinstance(module, LeakyReLU):
            module.inplace = False
    for node in converted.graph.nodes:
        if node.target is torch.ops.quantized.leaky_relu:
            node.update_kwarg("inplace", False)
    converted.recompile()
    return converted


def float_weights(prepared: nn.Module) -> dict[str, str]:
    """Find what a prepared graph leaves in float; see `Flow`."""
    assert isinstance(prepared, GraphModule)
    called = {str(node.target) for node in prepared.graph.nodes if node.op == "call_module"}
    layers = {path: prepared.get_submodule(path) for path in called}
    int8 = {own_path(path) for path, layer in layers.items() if _has_kernel(layer)}
    found = {
        path: ""
        for path, layer in layers.items()
        if isinstance(layer, Opaque) or (next(layer.parameters(), None) is not None and not _has_kernel(layer))
    }
    read = weights_read(prepared)
    return found | {name: why for name, why in read if why or name.rpartition(".")[0] not in int8}


def _has_kernel(module: nn.Module) -> bool:
    return getattr(module, "qconfig", None) is not None or hasattr(module, "weight_fake_quant")


def _qconfig_mapping(scheme: StaticInt8, training: bool) -> QConfigMapping:
    """Return upstream's mapping, with the scheme's range for its own, and for every engine with scales by channel."""
    mapping = (get_default_qat_qconfig_mapping if training else get_default_qconfig_mapping)("x86")
    default = mapping.global_qconfig
    assert default is not None
    if training:
        activation = default.activation.with_args(averaging_constant=AVERAGING_CONSTANT, reduce_range=False)
    else:
        activation = _OBSERVERS[scheme.observer]
    for kind, qconfig in mapping.object_type_qconfigs.items():
        if qconfig is not None and qconfig.activation is default.activation:
            mapping.set_object_type(kind, QConfig(activation, _weight_observer(qconfig.weight, scheme)))
    mapping.set_global(QConfig(activation, _weight_observer(default.weight, scheme)))
    for kind in FLOAT_TYPES:
        for leaf in (kind, *kind.__subclasses__()):
            mapping.set_object_type(leaf, None)
    for wrong in WRONG_KERNELS:
        mapping.set_object_type(wrong, None)
    return mapping


_OBSERVERS = {
    "moving_average": MovingAverageMinMaxObserver.with_args(averaging_constant=AVERAGING_CONSTANT),
    "minmax": MinMaxObserver,
    "histogram": HistogramObserver,
}


def _weight_observer(observer: Any, scheme: StaticInt8) -> Any:
    """Take upstream's own, with codes on both sides of zero and the range of the weight as it is at that moment."""
    kind = getattr(observer, "p", partial(observer)).func
    if kind is PlaceholderObserver:
        return observer
    largest = largest_code(scheme.reduced)
    symmetric = observer.with_args(quant_min=-largest, quant_max=largest, reduce_range=False)
    # A range that follows slowly would clip what grows.
    return symmetric.with_args(averaging_constant=1.0) if kind is FusedMovingAvgObsFakeQuantize else symmetric


@contextmanager
def _upstream_quiet() -> Iterator[None]:
    """Silence upstream, which announces its deprecation at each call: that is ours to carry, not the user's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*(observer|quantize|reduce_range|must run observer|TypedStorage).*")
        yield
    # A cache of upstream's, without bound, holds every model that it has ever seen.
    assert_and_get_unique_device.cache_clear()


# The weights of layers with a fused BatchNorm. Upstream quantizes `w * gamma / std` and divides the output by
# `gamma / std` again, which makes NaN of a gamma of zero, as in a pruned channel. There the weight is quantized as if
# gamma were 1; the BatchNorm itself, and so the output, keeps its gamma.


def _guard_(graph: nn.Module) -> None:
    """Give the fused layers of a prepared ``graph`` the guarded forward; `_unguard_` takes it back."""
    for module in graph.modules():
        if isinstance(getattr(module, "bn", None), nn.Module) and hasattr(module, "weight_fake_quant"):
            cls: Any = type(module)
            module.__class__ = _guarded(cls)


def _unguard_(graph: nn.Module) -> None:
    """Give the layers their own classes back, by which upstream knows them."""
    for module in graph.modules():
        module.__class__ = getattr(type(module), "_unguarded", type(module))


@cache
def _guarded(cls: Any) -> Any:
    if hasattr(cls, "_unguarded"):
        return cls
    # Convolutions add ReLU around this method; the fused Linear has only `forward`.
    method = "_forward_approximate" if hasattr(cls, "_forward_approximate") else "forward"
    return type(cls.__name__, (cls,), {method: _forward, "_unguarded": cls, "__module__": cls.__module__})


def _forward(self: Any, x: Tensor) -> Tensor:
    gamma = torch.where(self.bn.weight == 0, 1.0, self.bn.weight)
    scale = gamma / torch.sqrt(self.bn.running_var + self.bn.eps)
    weight = self.weight_fake_quant(self.weight * scale.view(-1, *[1] * (self.weight.dim() - 1)))
    y = self._conv_forward(x, weight, None) if hasattr(self, "_conv_forward") else nn.functional.linear(x, weight)
    channels = (1, -1, *[1] * (self.weight.dim() - 2))
    y = y / scale.view(channels)
    return self.bn(y if self.bias is None else y + self.bias.view(channels))  # type: ignore[no-any-return]


def _observe_weights_(prepared: nn.Module, anew: bool = False) -> None:
    """Let every weight's fake-quantizer see its weight once: its range has its shape before anything copies it.

    ``anew`` forgets what it saw before, so that the range is that of the weight as it is now: averaged, frozen or
    masked.
    """
    with torch.no_grad():
        for module in prepared.modules():
            fake_quantize = getattr(module, "weight_fake_quant", None)
            if not isinstance(fake_quantize, nn.Module) or not isinstance(getattr(module, "weight", None), Tensor):
                continue
            if anew:
                fake_quantize.activation_post_process.reset_min_max_vals()  # type: ignore[operator, union-attr]
                fake_quantize.apply(enable_observer)
            fake_quantize(_folded_weight(module))


def _folded_weight(module: nn.Module) -> Tensor:
    """Return the weight that will be quantized: with the BatchNorm that was fused into the layer."""
    weight, bn = module.weight, getattr(module, "bn", None)
    assert isinstance(weight, Tensor)
    if not isinstance(bn, _BatchNorm) or bn.running_var is None:
        return weight
    scale = (bn.running_var + bn.eps).rsqrt() * (1.0 if bn.weight is None else bn.weight)
    return weight * scale.view(-1, *[1] * (weight.dim() - 1))
