"""A unit in int8: kernels that are made of the codes in its tree and of the roundings of its activations.

These are all that a file holds. The unit's traced graph, with the float values of these codes, is prepared, given these
roundings and converted: whenever that is done, the kernels are the same. Where a run is written down for elsewhere, or
torch has no kernels any more, the graph computes in float, rounded at the same places.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.errors import CompressionError, NoEffectWarning
from lightning_compress.modules.copying import copy_module
from lightning_compress.modules.isolation import evaluation_mode
from lightning_compress.modules.paths import is_at_or_below, modules_of
from lightning_compress.modules.routing import (
    Form,
    StoredWeight,
    class_of,
    form_of,
    needs_plain_operators,
    routed_modules,
    settle_,
)
from lightning_compress.quantization.numerics.int8 import StaticInt8, refuse_to_move
from lightning_compress.quantization.static.flows.flow import Rounding, Trace, load
from lightning_compress.quantization.static.flows.fx_trace import Opaque
from lightning_compress.quantization.static.flows.names import own_path
from lightning_compress.quantization.static.inner_layer import InnerLayer
from lightning_compress.quantization.static.reference import reference
from lightning_compress.quantization.static.traced import KINDS, trace_unit, without_autocast
from lightning_compress.quantization.static.unit import Unit


class Int8Unit(Form):
    """Computes a unit in int8.

    Args:
        unit: that is computed.
        scheme: of its kernels.
        trained: whether it was trained so, or calibrated, which is traced in another mode.
        computed: paths of the layers that are int8, though a forward computes their weights.
        weights: those of the unit's own parameters.

    Attributes:
        roundings: of activations.

    Raises:
        CompressionError: it is called otherwise than it was traced.
    """

    def __init__(
        self,
        unit: Unit,
        scheme: StaticInt8,
        trained: bool,
        computed: Collection[str],
        weights: Mapping[str, StoredWeight],
    ) -> None:
        super().__init__(weights)
        self.unit, self.scheme, self.trained = unit, scheme, trained
        self.computed = list(computed)
        self.roundings: list[Rounding] = []
        self._drop()

    def _drop(self) -> None:
        self._kernels: Any = None
        self._reference: Any = None
        self._structure: Any = None
        self._seen: list[tuple[nn.Module, str, str, Tensor, int]] = []

    def serve(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = self.unit.signature.of_call(module, args, kwargs)
        if tensors is None:
            raise CompressionError(
                f"The int8 form of {class_of(module).__name__} must be called as it was traced. "
                "Received: other arguments or flags. Call it with the arguments of the calibration or training step, "
                "or exclude it from `targets`."
            )
        recorded = needs_plain_operators()
        if not recorded and self._is_stale():
            self.build_(module)
        graph = self._reference if recorded or self._kernels is None else self._kernels
        with without_autocast(tensors) as floats:
            return self._structure.rebuild(graph(*floats))

    def _is_stale(self) -> bool:
        """Tell whether nothing is made yet, or tensors of the tree are others than those that it was made of."""
        return self._reference is None or any(
            vars(owner)[kind].get(name) is not tensor or _version(tensor) != version
            for owner, kind, name, tensor, version in self._seen
        )

    def build_(self, module: nn.Module, trace: Trace | None = None) -> None:
        """Make kernels and the reference form of a unit's codes; of its ``trace``, or of that of a float copy.

        Without torch's kernels, which are on their way out of it, there is the reference form alone.
        """
        self._drop()
        with torch.inference_mode(False), torch.no_grad(), evaluation_mode(module):
            if trace is None:
                twin = copy_module(module)
                for inner in routed_modules(twin):
                    settle_(inner)
                trace = trace_unit(twin, self.unit, self.trained)
            self._structure = trace.structure
            values = _values(module)
            reduced = self.scheme.reduced
            form = reference(trace.graph, self.trained, self.roundings, values, self.computed, reduced)
            self._reference = self._take_layers_(form, module)
            try:
                flow = load(self.unit.flow)
            except CompressionError as error:
                warnings.warn(f"{error} Int8 runs dequantized, slower than float.", NoEffectWarning, stacklevel=5)
            else:
                prepared = flow.prepare(trace.graph, self.scheme, training=self.trained, floats=self.unit.floats)
                flow.fix_(trace.graph, prepared, self.roundings)
                kernels = flow.convert(prepared, self.scheme, self.unit.unconverted)
                self._kernels = self._take_layers_(kernels, module)
        self._watch(module, trace.names)

    def _take_layers_(self, graph: nn.Module, module: nn.Module) -> nn.Module:
        """Share the tree's tensors with float layers in a graph; what has a scheme of its own there, the tree calls."""
        modules = modules_of(module, every_name=True)
        for path, holder in list(graph.named_modules()):
            own = own_path(path.removeprefix("graph.").removeprefix("module").lstrip("."))
            if (owner := modules.get(own if self.unit.flow == "pt2e" else own_path(path))) is None:
                continue
            form = form_of(owner)
            if owner is not module and form is not None and not isinstance(form, InnerLayer):
                if type(holder).__module__.startswith("torch.ao.nn.intrinsic"):
                    holder[0] = Opaque(owner)  # upstream fuses float layers too
                else:
                    graph.set_submodule(path, Opaque(owner))
                continue
            for kind in KINDS:
                held, tensors = getattr(holder, kind), getattr(owner, kind)
                for name in held.keys() & tensors.keys():
                    if same_tensor(held[name], tensors[name]):  # not so where a BatchNorm is folded
                        held[name] = tensors[name]
        return graph

    def _watch(self, module: nn.Module, names: Collection[str]) -> None:
        """Remember the tensors of the tree, at or below these names, that the kernels are made of."""
        self._seen = [
            (owner, kind, name, tensor, _version(tensor))
            for path, owner in modules_of(module).items()
            for kind in KINDS
            for name, tensor in getattr(owner, kind).items()
            if tensor is not None and any(is_at_or_below(f"{path}.{name}".lstrip("."), above) for above in names)
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
        return {**self.__dict__, "_modules": modules, "_structure": None, "_seen": []}

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        refuse_to_move(fn)
        self._drop()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


def _values(module: nn.Module) -> dict[str, nn.Module]:
    """Return modules that give the float values of a unit's codes, by the paths of layers and of own parameters."""
    found: dict[str, nn.Module] = {}
    for path, owner in modules_of(module, every_name=True).items():
        form = form_of(owner)
        if owner is module or isinstance(form, InnerLayer):
            for name in form.weights:  # type: ignore[union-attr]
                found[f"{path}.{name}".lstrip(".")] = found[path] = _Value(owner, name)
    return found


class _Value(nn.Module):
    """Gives the float values of a parameter of the tree to a graph."""

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__()
        self.__dict__["module"] = module
        self.name = name

    def forward(self) -> Tensor:
        module: Any = self.__dict__["module"]
        form: Any = form_of(module)
        form.bind_(module)
        return form.float_value(module, self.name)  # type: ignore[no-any-return]


def _version(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place; of one that inference mode made nobody knows."""
    return -1 if tensor.is_inference() else tensor._version


def same_tensor(held: Tensor | None, own: Tensor | None) -> bool:
    """Tell whether two tensors have the same values, shape and type."""
    if held is None or own is None or held.shape != own.shape or held.dtype != own.dtype:
        return False
    return bool(torch.equal(held, own))
