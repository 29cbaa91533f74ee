"""A unit in int8: kernels that are made of the codes in its tree and of the roundings of its activations.

These are all that a file holds. The unit's traced graph, with these codes and roundings, is the reference form; kernels
are made of that. Where a run is written down for elsewhere, the reference form computes.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from lightning_compress.errors import CompressionError, NoEffectWarning
from lightning_compress.messages import named
from lightning_compress.modules.copying import copy_module
from lightning_compress.modules.isolation import evaluation_mode
from lightning_compress.modules.paths import is_at_or_below, modules_of
from lightning_compress.modules.routing import (
    Form,
    StoredWeight,
    class_of,
    form_of,
    routed_modules,
    settle_,
)
from lightning_compress.modules.written import needs_plain_operators
from lightning_compress.quantization.numerics.int8 import StaticInt8, refuse_to_move
from lightning_compress.quantization.static.compiled import Compiled
from lightning_compress.quantization.static.graphs import int8_layers
from lightning_compress.quantization.static.inner_layer import InnerLayer
from lightning_compress.quantization.static.kernels import lower, wrong
from lightning_compress.quantization.static.placement import TARGETS, places
from lightning_compress.quantization.static.reference import reference
from lightning_compress.quantization.static.rounding import Rounding
from lightning_compress.quantization.static.trace import Trace
from lightning_compress.quantization.static.traced import KINDS, without_autocast
from lightning_compress.quantization.static.unit import Unit, trace_unit


class Int8Unit(Form):
    """Computes a unit in int8.

    Args:
        unit: that is computed.
        scheme: of its kernels.
        trained: whether it was trained so, or calibrated, which is traced in another mode.
        weights: those of the unit's own parameters.

    Attributes:
        roundings: of activations.

    Raises:
        CompressionError: it is called otherwise than it was traced.
    """

    def __init__(self, unit: Unit, scheme: StaticInt8, trained: bool, weights: Mapping[str, StoredWeight]) -> None:
        super().__init__(weights)
        self.unit, self.scheme, self.trained = unit, scheme, trained
        self.roundings: list[Rounding] = []
        self._drop()

    def _drop(self) -> None:
        self._kernels: Any = None
        self._reference: Any = None
        self._trace: Any = None
        self._holders: list[tuple[nn.Module, Form]] = []
        self._seen: list[tuple[dict[str, Any], str, Tensor, Any]] = []

    def serve(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = self.unit.signature.of_call(module, args, kwargs)
        if tensors is None:
            raise CompressionError(
                f"The int8 form of {class_of(module).__name__} must be called as it was traced. "
                "Received: other arguments or flags. Call it with the arguments of the calibration or training step, "
                "or exclude it from `targets`."
            )
        recorded = needs_plain_operators()
        if self._reference is None or (not recorded and self._is_stale()):
            self.build_(module)
        if not recorded:
            self._trace.check(tensors)
        if recorded or self._holds_others():  # tensors of an exporter stand in the tree for the moment, or stood there
            for owner, form in self._holders:
                form.bind_(owner)
        graph = self._reference if recorded else self._kernels
        with without_autocast(tensors) as floats, torch.no_grad():  # no kernel has a gradient
            return self._trace.structure.rebuild(graph(*floats))

    def _holds_others(self) -> bool:
        """Tell whether the codes of the first layer are others than those in the tree; then all may be."""
        return any(
            weight.codes is not owner._parameters[name]
            for owner, form in self._holders[:1]
            for name, weight in form.weights.items()
        )

    def _is_stale(self) -> bool:
        """Tell whether tensors of the tree are others than those that kernels are made of."""
        return any(
            holder.get(name) is not tensor or _version(tensor) != version
            for holder, name, tensor, version in self._seen
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def build_(self, module: nn.Module, trace: Trace | None = None) -> None:
        """Make kernels and the reference form of a unit's codes; of its ``trace``, or of that of a float copy.

        Whoever counts or watches operators at that moment, as a profiler of FLOPs does, doesn't see these.
        """
        self._drop()
        plain = torch.autocast("cpu", enabled=False)
        with torch.inference_mode(False), torch.no_grad(), plain, _disable_current_modes(), evaluation_mode(module):
            if trace is None:
                twin = copy_module(module)
                for inner in routed_modules(twin):
                    settle_(inner)
                trace = trace_unit(twin, self.unit, self.trained)
            self._trace = trace.onto(module)
            self.roundings = _named_here(self.roundings, self._trace, self.unit, self.scheme)
            self._holders = [(owner, form) for owner, form in _holders(module).values() if form.weights]
            floats, reduced = self.unit.floats, self.scheme.reduced
            self._reference = reference(self._trace.graph, self.roundings, _codes(module), floats, reduced)
            self._kernels = Compiled(self._reference) if self.scheme.engine == "inductor" else lower(self._reference)
            path = self.unit.path
            dequantized = {f"{path}.{layer}".strip("."): why for layer, why in wrong(self._kernels).items()}
        self._watch(module, self._trace.names)
        if dequantized:
            reason = next(iter(dequantized.values()))
            warnings.warn(
                f"Dequantized on this CPU, slower than int8: {named(dequantized)} ({reason}). On CPUs without "
                "VNNI, quantize with StaticInt8(reduce_range=True).",
                NoEffectWarning,
                stacklevel=5,
            )

    def _watch(self, module: nn.Module, names: Collection[str]) -> None:
        """Remember the tensors of the tree, at or below these names, that kernels are made of."""
        holders = [
            (getattr(owner, kind), name)
            for path, owner in modules_of(module).items()
            for kind in KINDS
            for name in getattr(owner, kind)
            if any(is_at_or_below(f"{path}.{name}".lstrip("."), above) for above in names)
        ]
        self._seen = [
            (holder, name, holder[name], _version(holder[name])) for holder, name in holders if holder[name] is not None
        ]

    def extra_state(self) -> list[dict[str, Any]]:
        """Return the roundings, as plain data."""
        return [asdict(rounding) for rounding in self.roundings]

    def load_extra_(self, state: list[Mapping[str, Any]]) -> None:
        """Take the roundings from plain data."""
        self.roundings = [Rounding(**plain) for plain in state]
        self._drop()

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Unit:
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        twin._seen = [(*place, tensor, _version(tensor)) for *place, tensor, _ in twin._seen]  # type: ignore[misc]
        return twin

    def __getstate__(self) -> dict[str, Any]:
        modules = {name: None if name in ("_kernels", "_reference") else inner for name, inner in self._modules.items()}
        return {**self.__dict__, "_modules": modules, "_trace": None, "_holders": [], "_seen": []}

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        refuse_to_move(fn)
        self._drop()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


def _holders(module: nn.Module) -> dict[str, tuple[nn.Module, Form]]:
    """Return the modules of a unit whose forms hold codes for its kernels, and these, by path."""
    found = {path: (owner, form_of(owner)) for path, owner in modules_of(module, every_name=True).items()}
    return {
        path: (owner, form)
        for path, (owner, form) in found.items()
        if form is not None and (owner is module or isinstance(form, InnerLayer))
    }


def _codes(module: nn.Module) -> dict[str, StoredWeight]:
    """Return the codes that stand in a unit's tree, by the paths of layers and of own parameters."""
    codes: dict[str, Any] = {}
    for path, (owner, form) in _holders(module).items():
        form.bind_(owner)
        codes |= {
            path if name == "weight" else f"{path}.{name}".lstrip("."): form.weights[name] for name in form.weights
        }
    return codes


def _named_here(roundings: list[Rounding], trace: Trace, unit: Unit, scheme: StaticInt8) -> list[Rounding]:
    """Return roundings with the names that nodes have here: another version of torch may have given them others.

    Raises:
        CompressionError: they aren't those of this graph.
    """
    here = places(trace.graph, int8_layers(trace.graph, unit.floats), TARGETS[scheme.target])
    if len(here) == len(roundings):
        found = zip(roundings, here, strict=True)
        return [replace(rounding, after=place.after, users=place.users) for rounding, place in found]
    if {rounding.after for rounding in roundings} <= {node.name for node in trace.graph.graph.nodes}:
        return roundings
    raise CompressionError(
        f"The ranges of a quantized {unit.path or 'module'} must be those of its trace. Received: {len(roundings)} of "
        f"them, where it has {len(here)}. Load the file with the version of torch that wrote it."
    )


def _version(tensor: Tensor) -> tuple[int, int]:
    """Return where a tensor lies, and how often it was changed in place; of one of inference mode nobody knows."""
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version


def same_tensor(held: Tensor | None, own: Tensor | None) -> bool:
    """Tell whether two tensors have the same values, shape and type."""
    if held is None or own is None or held.shape != own.shape or held.dtype != own.dtype:
        return False
    return bool(torch.equal(held, own))
