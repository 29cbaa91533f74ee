"""Pruning methods: each decides which elements or units of some weights go next.

Scores of a criterion are ranked by our own exact selection. All other methods run through
`torch.nn.utils.prune.BasePruningMethod.compute_mask`, so that a user's subclass is a method like any other.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import prune

from lightning_compress.errors import CompressionError
from lightning_compress.pruning.criteria import Criterion
from lightning_compress.pruning.n_m import Pattern
from lightning_compress.pruning.smallest import take_smallest

Masks = dict[str, Tensor]
"""Parameter name to a bool tensor of the parameter's shape; False is pruned."""


class PruningMethod(ABC):
    """Decides which elements or units go next.

    Attributes:
        structured: whether it takes whole units.
        fixes_sparsity: whether it decides itself how much goes.
        compares_layers: whether it can rank several tensors together.
        needs_gradients: whether its scores are carried along from step to step.
        calibrates: whether it goes by what layers are given, see `calibrated`.
    """

    structured = False
    fixes_sparsity = False
    compares_layers = True
    needs_gradients = False
    calibrates = False

    @abstractmethod
    def grow(self, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], goal: float) -> Masks:
        """Grow masks until ``goal`` elements are pruned, ranked over all of ``weights`` (their `scores`) together.

        What ``masks`` (which may name more) prune stays pruned; where they prune more than ``goal`` already, they stay
        as they are.
        """

    def scores(self, weight: Tensor) -> Tensor:
        """Compute what `grow` ranks in the place of ``weight``, unless scores are carried along."""
        return weight

    def unit(self, weight: Tensor) -> int:
        """Count the elements that go at once."""
        return 1


@dataclass(frozen=True)
class LowestScores(PruningMethod):
    """Takes the lowest scores of a criterion; if a pattern is given, only as far as it allows."""

    criterion: Criterion
    pattern: Pattern | None = None
    dims: Mapping[str, int] = field(default_factory=dict)  # with a pattern, the input dimension of each weight

    @property
    def needs_gradients(self) -> bool:  # type: ignore[override]
        return self.criterion.needs_gradients

    def scores(self, weight: Tensor) -> Tensor:
        return _checked(self.criterion.score(weight), weight)

    def next_scores(self, weight: Tensor, gradient: Tensor, scores: Tensor) -> Tensor:
        """Compute the scores after one more step, of a criterion that needs gradients."""
        return _checked(self.criterion.score(weight.float(), gradient.float().nan_to_num(0, 0, 0), scores), weight)

    def grow(self, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], goal: float) -> Masks:
        missing = round(goal) - pruned(masks[name] for name in weights)
        if missing <= 0:
            return {name: masks[name] for name in weights}
        allowed, signed = None, self.criterion.signed
        if self.pattern is not None:
            allowed = [self.pattern.smallest(weights[name], masks[name], self.dims[name], signed) for name in weights]
            left = sum(int(torch.count_nonzero(masks[name] & may)) for name, may in zip(weights, allowed, strict=True))
            if missing >= left:
                return {name: masks[name] & ~may for name, may in zip(weights, allowed, strict=True)}
        grown = take_smallest([*weights.values()], [masks[name] for name in weights], missing, allowed, signed)
        return dict(zip(weights, grown, strict=True))


@dataclass(frozen=True)
class Calibrated(LowestScores):
    """Takes the weights that matter least for what layers are given; by the criterion where nothing is given."""

    calibrates = True

    refits: bool = False  # whether those that stay are re-solved


@dataclass(frozen=True)
class TorchMethod(PruningMethod):
    """Runs a method of torch, or a user's, that takes single elements or masks of its own."""

    cls: type[prune.BasePruningMethod]

    @property
    def fixes_sparsity(self) -> bool:  # type: ignore[override]
        return not accepts(self.cls, "amount")

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
        """Take ``amount`` more out of what ``mask`` still keeps."""
        given = {"amount": amount, **settings}
        method = self.cls(**{name: value for name, value in given.items() if accepts(self.cls, name)})
        # The container hands the method only what is still kept, so nothing is pruned twice.
        container = prune.PruningContainer()
        container._tensor_name = method._tensor_name = "weight"
        container.add_pruning_method(method)
        grown: Tensor = container.compute_mask(tensor, mask.to(tensor.dtype))
        return grown.bool() & mask


@dataclass(frozen=True)
class UnitMethod(TorchMethod):
    """Takes whole slices along ``dim``, the nearest number; every tensor keeps at least one."""

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
        """Tell for each unit whether anything of it stays."""
        return mask.movedim(self.dim, 0).flatten(1).any(dim=1)

    def _spread(self, units: Tensor, mask: Tensor) -> Tensor:
        return units.to(mask.device).view(-1, *[1] * (mask.dim() - 1)).movedim(0, self.dim)

    def _scores(self, weight: Tensor) -> Tensor:
        """Score each unit, comparably between layers: by its norm over its size."""
        units = weight.movedim(self.dim, 0).flatten(1)
        if self.cls is prune.RandomStructured:
            return torch.rand(len(units), device=weight.device)
        norms: Tensor = torch.linalg.vector_norm(units.float(), ord=self.norm, dim=1)
        size = units.shape[1]
        return norms / (size ** (1 / self.norm) if self.norm else size)


def _checked(scores: Tensor, weight: Tensor) -> Tensor:
    if not isinstance(scores, Tensor) or scores.shape != weight.shape or not scores.is_floating_point():
        shape = f"{scores.dtype} of shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else repr(scores)
        raise CompressionError(
            f"`method` must be a criterion that gives a floating-point tensor of its weight's shape "
            f"{tuple(weight.shape)}. Received: {shape}."
        )
    return scores


def pruned(masks: Iterable[Tensor]) -> int:
    """Count the elements that ``masks`` prune."""
    # Not `mask.sum()`: that makes a copy of eight bytes an element first.
    return sum(mask.numel() - int(torch.count_nonzero(mask)) for mask in masks)


def accepts(cls: type[prune.BasePruningMethod], name: str) -> bool:
    """Tell whether a method of torch's kind can be made with an argument of this name."""
    if cls.__init__ is object.__init__:
        return False
    parameters = inspect.signature(cls.__init__).parameters
    return name in parameters or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
