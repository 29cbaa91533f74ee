"""Pruning rules: a name or an import path becomes a rule that decides which elements or units go next.

Magnitudes are ranked by our own exact selection. All other rules run through
`torch.nn.utils.prune.BasePruningMethod.compute_mask`, so that a user's subclass is a rule like any other.
"""

from __future__ import annotations

import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import prune

from lightning_compress.errors import CompressionError, invalid, nearest
from lightning_compress.pruning.criteria import OF_GRADIENTS, OF_WEIGHTS
from lightning_compress.pruning.n_m import Pattern
from lightning_compress.pruning.smallest import take_smallest

Masks = dict[str, Tensor]
"""Parameter name to a bool tensor of the parameter's shape; False is pruned."""

NAMED: dict[str, type[prune.BasePruningMethod]] = {
    "random_unstructured": prune.RandomUnstructured,
    "l1_unstructured": prune.L1Unstructured,
    "random_structured": prune.RandomStructured,
    "ln_structured": prune.LnStructured,
    "custom_from_mask": prune.CustomFromMask,
}


CRITERIA = (*OF_WEIGHTS, *OF_GRADIENTS)


class PruningMethod(ABC):
    """Decides what goes next.

    Attributes:
        structured: whether it takes whole units.
        fixes_sparsity: whether it decides itself how much goes.
        compares_layers: whether it can rank several tensors together.
        needs_gradients: whether its scores are carried along from step to step.
    """

    structured = False
    fixes_sparsity = False
    compares_layers = True
    needs_gradients = False

    @abstractmethod
    def grow(self, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], goal: float) -> Masks:
        """Masks in which ``goal`` elements are pruned, ranked over all of ``weights`` (their `scores`) together.

        What ``masks`` (which may name more) prune stays pruned; where they prune more than ``goal`` already, they stay
        as they are.
        """

    def scores(self, weight: Tensor) -> Tensor:
        """What `grow` ranks in the place of ``weight``, unless scores are carried along."""
        return weight

    def unit(self, weight: Tensor) -> int:
        """How many elements go at once."""
        return 1


@dataclass(frozen=True)
class LowestScores(PruningMethod):
    """The lowest scores of a criterion; if a pattern is given, only as far as it allows.

    Args:
        criterion: its name in `criteria`.
        pattern: N:M.
        dims: with a pattern, the input dimension of each weight.
    """

    criterion: str = "magnitude"
    pattern: Pattern | None = None
    dims: Mapping[str, int] = field(default_factory=dict)

    @property
    def signed(self) -> bool:
        """Whether scores below zero are lower than zero, and not as high as their magnitude."""
        return self.criterion == "movement"

    @property
    def needs_gradients(self) -> bool:  # type: ignore[override]
        return self.criterion in OF_GRADIENTS

    def scores(self, weight: Tensor) -> Tensor:
        return OF_WEIGHTS[self.criterion](weight)

    def carry(self, weight: Tensor, gradient: Tensor, score: Tensor) -> Tensor:
        """The next score of a criterion that is carried along from step to step."""
        return OF_GRADIENTS[self.criterion](weight.float(), gradient.float().nan_to_num(0, 0, 0), score)

    def grow(self, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], goal: float) -> Masks:
        missing = round(goal) - pruned(masks[name] for name in weights)
        if missing <= 0:
            return {name: masks[name] for name in weights}
        allowed = None
        if self.pattern is not None:
            allowed = [
                self.pattern.smallest(weights[name], masks[name], self.dims[name], self.signed) for name in weights
            ]
            left = sum(int(torch.count_nonzero(masks[name] & may)) for name, may in zip(weights, allowed, strict=True))
            if missing >= left:
                return {name: masks[name] & ~may for name, may in zip(weights, allowed, strict=True)}
        grown = take_smallest([*weights.values()], [masks[name] for name in weights], missing, allowed, self.signed)
        return dict(zip(weights, grown, strict=True))


@dataclass(frozen=True)
class GivenMasks(PruningMethod):
    """The masks as they are given (``custom_from_mask``)."""

    fixes_sparsity = True

    def grow(self, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], goal: float) -> Masks:
        return {name: masks[name] for name in weights}


@dataclass(frozen=True)
class TorchMethod(PruningMethod):
    """A rule of torch, or a user's, that takes single elements or masks of its own.

    Args:
        cls: computes the masks.
    """

    cls: type[prune.BasePruningMethod]

    @property
    def fixes_sparsity(self) -> bool:  # type: ignore[override]
        return not _accepts(self.cls, "amount")

    def grow(self, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], goal: float) -> Masks:
        if self.fixes_sparsity:
            return {name: self._mask(weight, masks[name], 0) for name, weight in weights.items()}
        missing = round(goal) - pruned(masks[name] for name in weights)
        if missing <= 0:
            return {name: masks[name] for name in weights}
        if len(weights) == 1:
            [(name, weight)] = weights.items()
            return {name: self._mask(weight, masks[name], missing)}
        # One ranking over all that is still kept, as one long vector.
        ranked = torch.cat([weight[masks[name]] for name, weight in weights.items()])
        stays = self._mask(ranked, torch.ones_like(ranked, dtype=torch.bool), missing)
        parts = stays.split([int(torch.count_nonzero(masks[name])) for name in weights])
        return {name: masks[name].masked_scatter(masks[name], part) for name, part in zip(weights, parts, strict=True)}

    def _mask(self, tensor: Tensor, mask: Tensor, amount: int, **settings: Any) -> Tensor:
        """``mask`` with ``amount`` more taken out of what it still keeps."""
        given = {"amount": amount, **settings}
        method = self.cls(**{name: value for name, value in given.items() if _accepts(self.cls, name)})
        # The container hands the rule only what is still kept, so nothing is pruned twice.
        container = prune.PruningContainer()
        container._tensor_name = method._tensor_name = "weight"
        container.add_pruning_method(method)
        grown: Tensor = container.compute_mask(tensor, mask.to(tensor.dtype))
        return grown.bool() & mask


@dataclass(frozen=True)
class UnitMethod(TorchMethod):
    """A structured rule: whole slices along ``dim`` go, the nearest number; every tensor keeps at least one.

    Args:
        cls: computes the masks of one tensor.
        dim: the dimension whose slices are the units.
        norm: for ``ln_structured``, the order of the norm.
    """

    structured = True

    dim: int = 0
    norm: float = 2.0

    @property
    def compares_layers(self) -> bool:  # type: ignore[override]
        return self.cls in (prune.LnStructured, prune.RandomStructured)

    def unit(self, weight: Tensor) -> int:
        return weight.numel() // weight.shape[self.dim]

    def grow(self, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], goal: float) -> Masks:
        if len(weights) > 1 and not self.fixes_sparsity:
            return self._grow_together(weights, masks, goal)
        return {name: self._grow_alone(weight, masks[name], goal) for name, weight in weights.items()}

    def _grow_alone(self, weight: Tensor, mask: Tensor, goal: float) -> Tensor:
        alive = self.alive(mask)
        goal_units = min(round(goal / self.unit(weight)), len(alive) - 1)
        amount = 0 if self.fixes_sparsity else goal_units - int((~alive).sum())
        if amount <= 0 and not self.fixes_sparsity:
            return mask
        return self._mask(weight, mask, amount, dim=self.dim, n=self.norm)

    def _grow_together(self, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], goal: float) -> Masks:
        """Takes the lowest units of all layers until the masked elements are nearest to the goal."""
        names = list(weights)
        alive = [self.alive(masks[name]).cpu() for name in names]
        sizes = [self.unit(weights[name]) for name in names]
        missing = round(goal) - sum(int((~units).sum()) * size for units, size in zip(alive, sizes, strict=True))
        ranked = sorted(
            (score, layer, unit)
            for layer, name in enumerate(names)
            for unit, score in enumerate(self._scores(weights[name]).tolist())
            if alive[layer][unit]
        )
        left = [int(units.sum()) for units in alive]
        for _, layer, unit in ranked:
            if missing < sizes[layer] / 2:
                break
            if left[layer] > 1:
                alive[layer][unit] = False
                left[layer] -= 1
                missing -= sizes[layer]
        return {name: masks[name] & self._spread(units, masks[name]) for name, units in zip(names, alive, strict=True)}

    def alive(self, mask: Tensor) -> Tensor:
        """For each unit, whether anything of it is kept."""
        return mask.movedim(self.dim, 0).flatten(1).any(dim=1)

    def _spread(self, units: Tensor, mask: Tensor) -> Tensor:
        shape = [1] * mask.dim()
        shape[self.dim] = -1
        return units.to(mask.device).view(shape)

    def _scores(self, weight: Tensor) -> Tensor:
        """One score for each unit, comparable between layers: the norm over the unit's size."""
        units = weight.movedim(self.dim, 0).flatten(1)
        if self.cls is prune.RandomStructured:
            return torch.rand(len(units), device=weight.device)
        norms: Tensor = torch.linalg.vector_norm(units.float(), ord=self.norm, dim=1)
        size = units.shape[1]
        return norms / (size ** (1 / self.norm) if self.norm else size)


def pruned(masks: Iterable[Tensor]) -> int:
    """How many elements ``masks`` prune."""
    # Not `mask.sum()`: that makes a copy of eight bytes an element first.
    return sum(mask.numel() - int(torch.count_nonzero(mask)) for mask in masks)


def resolve(method: str, dim: int = 0, norm: float = 2.0, n_m: str | None = None) -> PruningMethod:
    """The rule of a name in `NAMED` or `CRITERIA`, or of the import path of a `BasePruningMethod` subclass.

    Raises:
        CompressionError: no such name, nothing at that path, it isn't a `BasePruningMethod`, or it can't follow N:M.

    Example:
        >>> resolve("ln_structured", dim=0, norm=1.0).structured
        True
    """
    named = NAMED.get(method) if isinstance(method, str) else None  # a number isn't hashed as a name is
    cls = None if method in CRITERIA else named or _imported(method)
    if cls is None or cls is prune.L1Unstructured:
        return LowestScores("magnitude" if cls else method, None if n_m is None else Pattern.parse(n_m))
    if n_m is not None:
        raise invalid("n_m", f"be left out with method={method!r}; N:M goes with {', '.join(CRITERIA)}", n_m)
    if cls is prune.CustomFromMask:
        return GivenMasks()
    return UnitMethod(cls, dim, norm) if cls.PRUNING_TYPE == "structured" else TorchMethod(cls)  # type: ignore[attr-defined]


def _imported(method: object) -> type[prune.BasePruningMethod]:
    must = "be a pruning rule or the import path of one"
    if isinstance(method, type | prune.BasePruningMethod):
        kind = method if isinstance(method, type) else type(method)
        raise invalid("method", must, method, f"Write method='{kind.__module__}.{kind.__qualname__}'.")
    fraction: Any = None
    with suppress(TypeError, ValueError):
        fraction = float(method)  # type: ignore[arg-type]
    if fraction is not None:
        fraction = fraction / 100 if 1 < fraction < 100 else fraction
        share = f"{fraction:g}" if 0 <= fraction < 1 else "..."
        raise invalid("method", must, method, f"Is it the sparsity? Write sparsity={share}, a fraction in [0, 1).")
    if not isinstance(method, str) or "." not in method:
        raise invalid("method", must, method, nearest(str(method), [*NAMED, *CRITERIA]))
    module, _, name = method.rpartition(".")
    try:
        cls: Any = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise invalid("method", must, method, f"{error}.") from error
    if not (isinstance(cls, type) and issubclass(cls, prune.BasePruningMethod)):
        raise invalid("method", "name a subclass of torch.nn.utils.prune.BasePruningMethod", method)
    if getattr(cls, "PRUNING_TYPE", None) not in ("unstructured", "structured", "global"):
        raise CompressionError(
            f"`method` must set PRUNING_TYPE to 'unstructured', 'structured' or 'global'. Received: {method}."
        )
    known = {"self", "amount", "dim", "n"}
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        if name not in known and parameter.default is parameter.empty and parameter.kind not in _VARIADIC:
            raise invalid(
                "method", "be a rule that needs no argument but amount, dim and n", method, f"It needs `{name}` too."
            )
    return cls


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _accepts(cls: type[prune.BasePruningMethod], name: str) -> bool:
    if cls.__init__ is object.__init__:
        return False
    parameters = inspect.signature(cls.__init__).parameters
    return name in parameters or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
