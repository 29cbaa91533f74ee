"""The traced form of a unit while it is calibrated or trained: observers and fake-quantizers around its layers.

It holds a graph whose layers are copies around the very tensors of the unit. These are looked up in the unit's tree at
each call, as loading, moving and `torch.func.functional_call` put others there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_compress.errors import CompressionError
from lightning_compress.modules.isolation import isolated_random_state, restore_modes_, training_modes
from lightning_compress.modules.paths import modules_of
from lightning_compress.modules.routing import Form, class_of, routed_modules
from lightning_compress.quantization.numerics.int8 import StaticInt8
from lightning_compress.quantization.static.equalize import widen_
from lightning_compress.quantization.static.flows.flow import Flow, Trace, load, tracer
from lightning_compress.quantization.static.unit import Unit

KINDS = ("_parameters", "_buffers")
_ENDS = ("min_val", "max_val")


class Tree:
    """Knows where the tensors of a graph stand in the tree of the module that it was traced of."""

    def __init__(self, graph: nn.Module, module: nn.Module) -> None:
        modules = modules_of(module)
        owned = {
            id(tensor): (owner, kind, name)
            for owner in modules.values()
            for kind in KINDS
            for name, tensor in getattr(owner, kind).items()
            if tensor is not None
        }
        inner = dict(graph.named_modules())
        # The same tensor, seen from both: by the graph's module and from the tree's.
        self._shared = [
            (holder, kind, name, *owned[id(tensor)])
            for holder in inner.values()
            for kind in KINDS
            for name, tensor in getattr(holder, kind).items()
            if id(tensor) in owned
        ]
        pairs = {inner[path]: owner for path, owner in modules.items() if path in inner and path}
        pairs |= {holder: owner for holder, _, _, owner, *_ in self._shared if holder is not graph}
        self._modes = list(pairs.items())
        self._children = [(owner, name, child) for owner in modules.values() for name, child in owner._modules.items()]

    def holds(self) -> set[int]:
        """Return the ids of the tensors that are shared."""
        return {id(vars(holder)[kind][name]) for holder, kind, name, *_ in self._shared}

    def bind_(self) -> None:
        """Give the graph the tensors that stand in the tree now.

        Raises:
            CompressionError: a module of the tree is another one than was traced.
        """
        for parent, name, child in self._children:
            if parent._modules.get(name) is not child:
                raise CompressionError(
                    f"The modules of a quantized {class_of(parent).__name__} must stay the ones that were traced. "
                    f"Received: another `{name}`. Replace it before the model is quantized, or exclude it in `targets`."
                )
        for holder, kind, name, owner, own_kind, own in self._shared:
            tensor = vars(owner)[own_kind][own]
            if vars(holder)[kind][name] is not tensor:
                vars(holder)[kind][name] = tensor

    def follow_modes_(self, batchnorm_frozen: bool) -> None:
        """Give the graph's layers the modes of the tree's."""
        for holder, owner in self._modes:
            mode = owner.training and not (batchnorm_frozen and isinstance(holder, _BatchNorm))
            if holder.training != mode:
                holder.training = mode


class Traced(Form):
    """Computes a unit in its traced form, with observers and fake-quantizers.

    It isn't pickled: what is unpickled traces the unit anew at its first call.
    """

    trace: Trace
    tree: Tree
    source: Tree

    def __init__(self, unit: Unit, scheme: StaticInt8, *, training: bool) -> None:
        super().__init__()
        self.unit, self.scheme, self.trains = unit, scheme, training
        self.calibrating = False
        self.observers_frozen = False
        self.batchnorm_frozen = False
        self._observing: bool | None = None
        self.graph: Any = None
        self._state: dict[str, Tensor] | None = None

    @property
    def flow(self) -> Flow:
        """The flow that traces it."""
        return load(self.unit.flow)

    def build_(self, module: nn.Module) -> Traced:
        """Trace and prepare ``module``, in the mode in which it is to be quantized; it isn't changed."""
        self.trace = trace_unit(module, self.unit, self.trains)
        self.graph = self.flow.prepare(self.trace.graph, self.scheme, training=self.trains, floats=self.unit.floats)
        self.tree, self.source = Tree(self.graph, module), Tree(self.trace.graph, module)
        if self._state is not None:
            self.load_extra_(self._state)
        return self

    def serve(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = self.unit.signature.of_call(module, args, kwargs)
        if tensors is None:
            return class_of(module).forward(module, *args, **kwargs)
        return self._bound(module, tensors)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # upstream's fake-quantizers can't be compiled
    def _bound(self, module: nn.Module, tensors: list[Tensor]) -> Any:
        if self.graph is None:
            self.build_(module)
        self.tree.bind_()
        return self.run(module.training, tensors)

    def run(self, training: bool, tensors: list[Tensor]) -> Any:
        """Compute the module's output of the tensors of a call."""
        self.tree.follow_modes_(self.batchnorm_frozen)
        observe = self.calibrating or (training and not self.observers_frozen)
        if observe != self._observing:
            # Evaluation never moves an observer, whoever runs it.
            self.flow.observe_(self.graph, observe)
            self._observing = observe
        with without_autocast(tensors) as floats:
            return self.trace.structure.rebuild(self.graph(*floats))

    def extra_state(self) -> dict[str, Tensor]:
        """Return what its observers and fake-quantizers hold, by name."""
        if self.graph is None:
            return dict(self._state or {})
        shared = self.tree.holds()
        found = self.graph.named_buffers(remove_duplicate=False)
        return {name: buffer for name, buffer in found if id(buffer) not in shared}

    @torch.no_grad()
    def load_extra_(self, state: Mapping[str, Tensor]) -> None:
        if self.graph is None:
            self._state = dict(state)
            return
        own = self.extra_state()
        for name in own.keys() & state.keys():
            if own[name].shape != state[name].shape:
                own[name].resize_(state[name].shape)
            own[name].copy_(state[name])

    def __deepcopy__(self, memo: dict[int, Any]) -> Traced:
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        state = {name: buffer.detach().clone() for name, buffer in self.extra_state().items()}
        kept = {name: value for name, value in self.__dict__.items() if name not in ("trace", "tree", "source")}
        modules = {**self._modules, "graph": None}
        return {**kept, "_modules": modules, "_observing": None, "_state": state}

    def wrong_kernels(self) -> dict[str, str]:
        """Find the layers (paths in the unit) whose int8 kernels compute something else now, with reasons."""
        examples, flow = self.unit.signature.inputs, self.flow
        with isolated_random_state():
            inputs = [torch.randn(zeros.shape) if zeros.is_floating_point() else zeros.clone() for zeros in examples]
            int8 = flow.convert(self.graph, self.scheme)
            return flow.wrong_kernels(self.graph, int8, self.scheme, inputs, drawn_only=True)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.graph is not None:
            self.tree.bind_()  # moving makes other buffers; those of the tree count
        return self


def trace_unit(module: nn.Module, unit: Unit, training: bool) -> Trace:
    """Trace a module in the mode in which it is to be quantized."""
    modes = training_modes(module)
    module.train(training)
    try:
        trace = tracer(unit.flow)(module, unit.signature, unit.hooked)
    finally:
        restore_modes_(modes)
    widen_(trace.graph, unit.widened)
    return trace


@contextmanager
def without_autocast(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Switch autocast off where it is on, and yield the tensors in float32 then."""
    device = tensors[0].device.type if tensors else "cpu"
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        yield tensors
        return
    with torch.autocast(device, enabled=False):
        yield [tensor.float() if tensor.is_floating_point() else tensor for tensor in tensors]


def traced_units(model: nn.Module) -> list[Traced]:
    """Return the traced forms of a prepared model."""
    return [form for form in routed_modules(model).values() if isinstance(form, Traced)]


@torch.no_grad()
def reduce_ranges_(model: nn.Module, reduce: Callable[[Tensor], Tensor]) -> None:
    """Give all processes the widest of their ranges; ``reduce`` returns the largest values of all of them.

    They see different samples, and what moves a module's buffers between them moves no observers.
    """
    quantizers = [
        module
        for form in traced_units(model)
        for module in form.graph.modules()
        if hasattr(module, "calculate_qparams") and dict(module.named_buffers()).keys() >= {"scale"}
    ]
    lows, highs = ([quantizer.activation_post_process.get_buffer(name) for quantizer in quantizers] for name in _ENDS)
    if not quantizers:
        return
    flat = reduce(torch.cat([*(-low.flatten() for low in lows), *(high.flatten() for high in highs)]))
    parts = flat.split([end.numel() for end in (*lows, *highs)])
    for end, part in zip(lows, parts, strict=False):
        end.copy_(-part.view_as(end))
    for end, part in zip(highs, parts[len(lows) :], strict=True):
        end.copy_(part.view_as(end))
    for quantizer in quantizers:
        scale, zero_point = quantizer.calculate_qparams()
        quantizer.scale.copy_(scale)
        quantizer.zero_point.copy_(zero_point)
