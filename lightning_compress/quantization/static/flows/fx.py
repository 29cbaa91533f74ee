"""The fx flow: `torch.ao.quantization` in graph mode, int8 kernels in eager mode with no compiler.

Everything that upstream is to remove in torch 2.15 is imported in this file, `fused.py` and `in_place.py` alone.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
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
from torch.ao.quantization.fx.tracer import QuantizationTracer
from torch.ao.quantization.fx.utils import assert_and_get_unique_device
from torch.ao.quantization.quantize_fx import convert_fx, convert_to_reference_fx, prepare_fx, prepare_qat_fx
from torch.fx import GraphModule, Proxy
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import is_parametrized

from lightning_compress.modules.isolation import isolated_random_state, isolated_state
from lightning_compress.modules.outputs import Structure, flatten
from lightning_compress.quantization.schemes import AVERAGING_CONSTANT, StaticInt8, describe
from lightning_compress.quantization.static.flows import Trace
from lightning_compress.quantization.static.flows.float_weights import weights_read
from lightning_compress.quantization.static.flows.functional import (
    fold_layers_,
    hide_functions_,
    name_layers_,
    with_padding_in_numbers,
    without_parametrization,
)
from lightning_compress.quantization.static.flows.fused import guard_, unguard_
from lightning_compress.quantization.static.flows.graphs import AGAIN, Function
from lightning_compress.quantization.static.flows.in_place import out_of_place_
from lightning_compress.quantization.static.flows.integers import hide_integers_
from lightning_compress.quantization.static.flows.kernels import furthest, mark_, quantized_steps, reasons
from lightning_compress.quantization.static.signature import Signature

FLOAT_TYPES = (nn.Embedding, nn.EmbeddingBag, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
"""Layers that static int8 leaves in float: torch has no static kernel for them."""

WRONG_KERNELS: tuple[Any, ...] = (
    *_ConvTransposeNd.__subclasses__(),
    *(functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d),
)
"""What has int8 kernels in torch that compute something else: with `onednn` wherever the channel counts differ, with
`fbgemm` where the kernel is two rows high. `x86` takes the one or the other by the CPU, and a copy or a file that is
loaded takes what its own process would, so it doesn't help that this one is right."""

_WITH_KERNEL = (nn.Linear, _ConvNd)


class Opaque(nn.Module):
    """A layer with children of its own, called as it is; hidden, as upstream would swap its children in place."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.__dict__["module"] = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["module"](*args, **kwargs)


class _Tracer(QuantizationTracer):
    """Traces the forward of one module for calls of one signature."""

    def __init__(self, signature: Signature, hooked: Collection[str]) -> None:
        super().__init__([], [Opaque])
        self._signature = signature
        self._hooked = set(hooked)
        self._inserted: dict[str, nn.Module] = {}
        self._calls: Counter[str] = Counter()
        self._read: dict[int, Tensor] = {}
        self.structure = Structure(None)
        self.names: set[str] = set()
        self.numbers: dict[str, Tensor] = {}

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        count = len(self._signature.inputs)
        proxies = [self.create_proxy("placeholder", f"input_{index}", (), {}) for index in range(count)]
        args, kwargs = self._signature.rebuild(proxies)
        # All tensors that aren't parameters or buffers are constants, in the order in which they are met: what a module
        # keeps as an attribute need not be there where it is traced next.
        self.tensor_attrs.clear()

        def forward(root: nn.Module, *_: Any) -> list[Any]:
            tensors, self.structure = flatten(type(root).forward(root, *args, **kwargs))
            return tensors

        return forward, [self.root, *proxies]

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        path = self.path_of_module(m)
        self.names.add(path)
        if self.is_leaf_module(m, path) and next(m.children(), None) is not None:
            return self._insert(path, Opaque(m), args, kwargs)
        self._calls[path] += 1
        again = isinstance(m, _WITH_KERNEL) and self.is_leaf_module(m, path) and self._calls[path] > 1
        if again or isinstance(getattr(m, "padding", None), str):
            # An int8 layer has one output range: each further call gets a layer of its own, of the same weights.
            name = f"{path}{AGAIN}{self._calls[path]}" if again else path
            output = self._insert(name, with_padding_in_numbers(_shallow_copy(m)), args, kwargs)
        else:
            output = super().call_module(m, forward, args, kwargs)
        if path in self._hooked and isinstance(output, Proxy):
            # The traced form calls no module that it inlined; an identity passes its output on to its hooks.
            output = self._insert(f"hooked_{len(self._inserted)}", _hook_point(m), (output,), {})
        return output

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Proxy]) -> Any:
        self._read[id(attr_val)] = attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def _insert(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._inserted[name] = module
        return self.create_proxy("call_module", name, args, kwargs)

    def graph_module(self, module: nn.Module) -> GraphModule:
        # Constants, and what the forward keeps: all of it is of this trace.
        with isolated_random_state(), isolated_state(module.modules()):
            graph = self.trace(module)
            leaves = {str(node.target): node for node in graph.nodes if node.op in ("call_module", "get_attr")}
            found: dict[str, Any] = {name: self._inserted.get(name) or _attribute(module, name) for name in leaves}
            # A file fills them in place, which takes memory of their own for each element.
            found |= {name: value.contiguous() for name, value in found.items() if name in vars(module)}
        for name in self._hooked & found.keys() - self._inserted.keys():
            found[name] = _shallow_copy(found[name])  # without its hooks: the identity behind it calls them
        read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
        self.names |= read
        buffers = {name: buffer for name, buffer in module.named_buffers() if id(buffer) in self._read}
        self.numbers = {name: buffer.detach().clone().cpu() for name, buffer in buffers.items() if name not in read}
        traced = GraphModule(found, graph)
        traced.train(module.training)
        name_layers_(traced)
        hide_integers_(traced, [not each.is_floating_point() for each in self._signature.inputs])
        return traced


def _attribute(module: nn.Module, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part)
    return module


class _ReplayHooks:
    """Calls the forward hooks that a module has at that moment, with the module's output."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, point: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for key, hook in list(self.module._forward_hooks.items()):
            if key in self.module._forward_hooks_with_kwargs:
                hook(self.module, (), {}, output)
            else:
                hook(self.module, (), output)


def _hook_point(module: nn.Module) -> nn.Identity:
    point = nn.Identity()
    point.register_forward_hook(_ReplayHooks(module))
    return point


def trace(module: nn.Module, signature: Signature, hooked: Collection[str] = ()) -> Trace:
    """The traced form of ``module``, sharing its leaves.

    Inner modules in ``hooked`` keep calling their forward hooks. Raises whatever `torch.fx` raises where control flow
    depends on data.
    """
    tracer = _Tracer(signature, hooked)
    if not _is_layer(module):
        graph = tracer.graph_module(module)
        return Trace(graph, tracer.structure, frozenset(tracer.names), tracer.numbers)
    graph = tracer.graph_module(_Holder(_shallow_copy(module)).train(module.training))
    return Trace(graph, tracer.structure, frozenset((*module._parameters, *module._buffers, *module._modules)), {})


def _is_layer(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn") and not isinstance(module, nn.Sequential)


class _Holder(nn.Module):
    """Holds one layer of torch, which is called in its traced form and never traced itself."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer(*args, **kwargs)


def _shallow_copy(module: nn.Module) -> nn.Module:
    """A second module around the same tensors, as the first one's forward will be routed to where this one stands."""
    twin = type(module).__new__(type(module))  # `copy` refuses parametrizations
    vars(twin).update(vars(module))
    for kind in ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks"):
        twin.__dict__[kind] = type(getattr(module, kind))()
    for kind in ("_parameters", "_buffers", "_modules"):
        getattr(twin, kind).update(getattr(module, kind))
    return twin


def prepare(graph: nn.Module, scheme: StaticInt8, *, training: bool, floats: Collection[str] = ()) -> GraphModule:
    """``graph`` with fake-quantizers (training) or observers (calibration); Parameters are kept as they are.

    Args:
        graph: what `trace` returned.
        scheme: the numbers.
        training: fuse and fake-quantize for training, else only observe.
        floats: paths in the graph that stay float.
    """
    assert isinstance(graph, GraphModule)
    if not training:
        fold_layers_(graph)
        _fold_parametrizations_(graph)
    hide_functions_(graph)
    mapping = _qconfig_mapping(scheme, training)
    tied = {id(one) for layer in graph.modules() if isinstance(layer, FLOAT_TYPES) for one in layer.parameters()}
    for path, module in graph.named_modules():
        stays = is_parametrized(module) or isinstance(getattr(module, "padding", None), str)
        if stays or _is_one_of(path, floats) or id(getattr(module, "weight", None)) in tied:
            mapping.set_module_name(path, None)
    config = PrepareCustomConfig().set_non_traceable_module_classes([Opaque, Function])
    example = tuple(torch.zeros(1) for node in graph.graph.nodes if node.op == "placeholder")
    # Upstream makes new layers around the old parameters, and draws initial weights for them first.
    with upstream_quiet(), _engine(scheme.engine), isolated_random_state():
        graph.train(training)
        prepared = (prepare_qat_fx if training else prepare_fx)(graph, mapping, example, config)
        guard_(prepared)
    # Upstream leaves some of the weights' observers on the CPU.
    prepared = prepared.to(next((parameter.device for parameter in graph.parameters()), torch.device("cpu")))
    _observe_weights_(prepared)
    return prepared


def _fold_parametrizations_(graph: GraphModule) -> None:
    for path, module in list(graph.named_modules()):
        if isinstance(module, Opaque) and (plain := without_parametrization(module.__dict__["module"])) is not None:
            graph.set_submodule(path, plain.eval())


def observe_(prepared: nn.Module, on: bool) -> None:
    """Let the activations' ranges move, or freeze them."""
    prepared.apply(enable_observer if on else disable_observer)


def fake_quantize_(prepared: nn.Module, on: bool) -> None:
    """Round values, or let them through."""
    prepared.apply(enable_fake_quant if on else disable_fake_quant)


def quantizes(prepared: nn.Module) -> bool:
    """Whether any layer computes in int8."""
    return any(_has_kernel(inner) and isinstance(inner, _WITH_KERNEL) for inner in prepared.modules())


def convert(prepared: nn.Module, scheme: StaticInt8, floats: Collection[str] = ()) -> GraphModule:
    """A new int8 graph on the CPU; ``prepared`` is left as it is.

    Args:
        prepared: what `prepare` returned, after it has seen values.
        scheme: the numbers.
        floats: paths of prepared layers that are float in the int8 graph nonetheless.
    """
    return _convert_with(convert_fx, prepared, scheme, floats)


def wrong_kernels(
    prepared: nn.Module, int8: nn.Module, scheme: StaticInt8, inputs: list[Tensor], drawn_only: bool = False
) -> dict[str, str]:
    """The layers whose kernels in ``int8`` compute something else than they do, each with a reason; see `Flow`."""
    reference = _convert_with(convert_to_reference_fx, prepared, scheme, ())
    assert isinstance(int8, GraphModule) and isinstance(prepared, GraphModule)
    far = furthest(partial(quantized_steps, int8, reference), inputs, drawn_only)
    kinds = {path: type(prepared.get_submodule(path)).__name__ for path in far if path}
    return {path.partition(AGAIN)[0]: reason for path, reason in reasons(far, kinds).items()}


def _convert_with(
    upstream: Callable[[GraphModule], GraphModule], prepared: nn.Module, scheme: StaticInt8, floats: Collection[str]
) -> GraphModule:
    assert isinstance(prepared, GraphModule)
    with upstream_quiet(), _engine(scheme.engine), torch.no_grad(), isolated_random_state():
        graph = copy.deepcopy(prepared).cpu().eval()
        for module in graph.modules():
            module._forward_hooks.clear()
        _observe_weights_(graph, anew=True)
        unguard_(graph)
        mark_(graph)
        _leave_float_(graph, floats)
        converted = upstream(graph)
        out_of_place_(converted)
    for name, module in list(converted.named_modules()):
        if isinstance(module, Opaque):
            parent, _, leaf = name.rpartition(".")
            setattr(converted.get_submodule(parent), leaf, module.__dict__["module"].cpu().eval())
    return converted


def _leave_float_(prepared: GraphModule, floats: Collection[str]) -> None:
    schemes = prepared.meta["_observed_graph_module_attrs"].node_name_to_qconfig
    for node in prepared.graph.nodes:
        if node.op == "call_module" and _is_one_of(str(node.target), floats):
            schemes[node.name] = None


def _is_one_of(path: str, layers: Collection[str]) -> bool:
    """Whether a module of a graph is one of these layers, or has its weight from within one."""
    own = path.partition(AGAIN)[0]
    return any(own == layer or own.startswith(f"{layer}.") for layer in layers)


def float_weights(prepared: nn.Module) -> dict[str, str]:
    """What a prepared graph leaves in float; see `Flow`."""
    assert isinstance(prepared, GraphModule)
    called = {str(node.target) for node in prepared.graph.nodes if node.op == "call_module"}
    layers = {path: prepared.get_submodule(path) for path in called}
    int8 = {path.partition(AGAIN)[0] for path, layer in layers.items() if _has_kernel(layer)}
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
    """Upstream's mapping for the engine, with the scheme's range in place of its own."""
    with upstream_quiet():  # of `onednn` it warns that its weights have 8 bits, which aren't taken
        mapping = (get_default_qat_qconfig_mapping if training else get_default_qconfig_mapping)(scheme.engine)
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
    """Upstream's own, in 7 bits where the CPU needs that, and with the range of the weight as it is at that moment."""
    reduced, kind = bool(describe(scheme)["reduce_range"]), getattr(observer, "p", partial(observer)).func
    if kind is FusedMovingAvgObsFakeQuantize:
        # A range that follows slowly would clip what grows.
        bounds = {"quant_min": -64, "quant_max": 63} if reduced else {}
        return observer.with_args(averaging_constant=1.0, **bounds)
    return observer if kind is PlaceholderObserver else observer.with_args(reduce_range=reduced)


@contextmanager
def upstream_quiet() -> Iterator[None]:
    """Upstream announces its deprecation at each call; what follows from it is ours to carry, not the user's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*(observer|quantize|reduce_range|must run observer|TypedStorage).*")
        yield
    # A cache of upstream's, without bound, holds every model that it has ever seen.
    assert_and_get_unique_device.cache_clear()


@contextmanager
def _engine(name: str) -> Iterator[None]:
    """Run under one of torch's int8 engines, and put the old one back."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = name
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


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
    """The weight that will be quantized: with the BatchNorm that was fused into the layer."""
    weight, bn = module.weight, getattr(module, "bn", None)
    assert isinstance(weight, Tensor)
    if not isinstance(bn, _BatchNorm) or bn.running_var is None:
        return weight
    scale = (bn.running_var + bn.eps).rsqrt() * (1.0 if bn.weight is None else bn.weight)
    return weight * scale.view(-1, *[1] * (weight.dim() - 1))
