"""The traced form of a unit while it is calibrated or trained: quantizers before and behind its layers.

Its graph is around the very tensors of the unit, which are looked up in the unit's tree at each call, as loading,
moving and `torch.func.functional_call` put others there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.errors import CompressionError
from lightning_compress.modules.paths import device_of, modules_of
from lightning_compress.modules.routing import Form, class_of, routed_modules
from lightning_compress.quantization.numerics.int8 import StaticInt8
from lightning_compress.quantization.static.placement import Place
from lightning_compress.quantization.static.prepare import Own, prepare
from lightning_compress.quantization.static.rounding import ActivationQuantizer, Rounding, WeightQuantizer
from lightning_compress.quantization.static.trace import Trace
from lightning_compress.quantization.static.unit import Unit, trace_unit

KINDS = ("_parameters", "_buffers")


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
        # The same tensor, seen from both: by the graph's module and from the tree's.
        self._shared = [
            (holder, kind, name, *owned[id(tensor)])
            for holder in graph.modules()
            for kind in KINDS
            for name, tensor in getattr(holder, kind).items()
            if id(tensor) in owned
        ]
        self._children = [(owner, name, child) for owner in modules.values() for name, child in owner._modules.items()]

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


class Traced(Form):
    """Computes a unit in its traced form, with quantizers.

    It isn't pickled: what is unpickled traces the unit anew at its first call.

    Attributes:
        calibrating: whether ranges move in evaluation, too.
        rounds: whether values are rounded.
        observers_frozen: whether ranges no longer move in training.
        batchnorm_frozen: whether BatchNorm normalizes as in evaluation.
    """

    trace: Trace
    tree: Tree

    def __init__(self, unit: Unit, scheme: StaticInt8, *, training: bool) -> None:
        super().__init__()
        self.unit, self.scheme, self.trains = unit, scheme, training
        self.calibrating = False
        self.rounds = training
        self.observers_frozen = False
        self.batchnorm_frozen = False
        self.graph: Any = None
        self.places: list[Place] = []
        self._state: dict[str, Tensor] | None = None

    def build_(self, module: nn.Module, trace: Trace | None = None) -> Traced:
        """Trace and prepare ``module``, in the mode in which it is to be quantized; it isn't changed."""
        self.trace = (trace or trace_unit(module, self.unit, self.trains)).onto(module)
        self.graph, self.places = prepare(self.trace, module, self.unit, self.scheme, training=self.trains)
        for quantizer in self.quantizers.values():
            quantizer.to(device_of(module))
        self.tree = Tree(self.graph, module)
        if self._state is not None:
            self.load_extra_(self._state)
        return self

    @property
    def quantizers(self) -> dict[str, ActivationQuantizer]:
        """Those of activations, by name."""
        found = self.graph.named_children()
        return {name: child for name, child in found if isinstance(child, ActivationQuantizer)}

    def serve(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = self.unit.signature.of_call(module, args, kwargs)
        if tensors is None:
            return class_of(module).forward(module, *args, **kwargs)
        return self._bound(module, tensors)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # it looks its tensors up in the tree
    def _bound(self, module: nn.Module, tensors: list[Tensor]) -> Any:
        if self.graph is None:
            self.build_(module)
        self.tree.bind_()
        return self.run(module.training, tensors)

    def run(self, training: bool, tensors: list[Tensor]) -> Any:
        """Compute the module's output of the tensors of a call."""
        self.trace.check(tensors)
        observes = self.calibrating or (training and not self.observers_frozen)  # evaluation never moves a range
        for child in self.graph.children():
            if isinstance(child, ActivationQuantizer | WeightQuantizer):
                child.observes, child.rounds = observes, self.rounds
            elif isinstance(child, Own):
                child.frozen = self.batchnorm_frozen
        with without_autocast(tensors) as floats:
            return self.trace.structure.rebuild(self.graph(*floats))

    def roundings(self) -> list[Rounding]:
        """List where activations are rounded, in plain numbers."""
        quantizers = self.quantizers
        return [quantizers[place.name].rounding(place.after, place.users) for place in self.places]

    def extra_state(self) -> dict[str, Tensor]:
        """Return the ranges of activations, by name."""
        if self.graph is None:
            return dict(self._state or {})
        return {
            f"{name}.{end}": buffer for name, child in self.quantizers.items() for end, buffer in child.named_buffers()
        }

    @torch.no_grad()
    def load_extra_(self, state: Mapping[str, Tensor]) -> None:
        if self.graph is None:
            self._state = dict(state)
            return
        own = self.extra_state()
        for name in own.keys() & state.keys():
            own[name].copy_(state[name])

    def __deepcopy__(self, memo: dict[int, Any]) -> Traced:
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        state = {name: buffer.detach().clone() for name, buffer in self.extra_state().items()}
        kept = {name: value for name, value in self.__dict__.items() if name not in ("trace", "tree")}
        return {**kept, "_modules": {**self._modules, "graph": None}, "_state": state}

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.graph is not None:
            self.tree.bind_()  # moving makes other buffers; those of the tree count
        return self


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
    quantizers = [quantizer for form in traced_units(model) for quantizer in form.quantizers.values()]
    if quantizers:
        ends = [*(-quantizer.min_val for quantizer in quantizers), *(quantizer.max_val for quantizer in quantizers)]
        lows, highs = reduce(torch.stack(ends)).view(2, -1)
        for quantizer, low, high in zip(quantizers, -lows, highs, strict=True):
            quantizer.min_val.copy_(low)
            quantizer.max_val.copy_(high)
