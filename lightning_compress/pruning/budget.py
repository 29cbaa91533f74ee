"""Budgets: how many weights of which layer go, and masks that grow to just that many. Pure; nothing is changed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_compress.errors import CompressionError, invalid, is_number, nearest
from lightning_compress.pruning.methods import Masks, PruningMethod, pruned
from lightning_compress.targets import Scope, Target, matches


@dataclass(frozen=True)
class SparsityBudget:
    """Says how much is pruned at the end, as fractions of the original weights: by arguments of `prune_`."""

    sparsity: float | None
    scope: Scope = "global"
    overrides: Mapping[str, float] | None = None
    max_layer_sparsity: float = 1.0

    def __post_init__(self) -> None:
        if self.sparsity is not None and not _is_fraction(self.sparsity):
            raise invalid("sparsity", "lie in [0, 1)", self.sparsity, "It is the fraction of weights that become zero.")
        if self.scope not in ("global", "layer"):
            raise invalid("scope", "be 'global' or 'layer'", self.scope)
        if not isinstance(self.overrides or {}, Mapping):
            raise invalid("overrides", "be a mapping from patterns to fractions", self.overrides)
        for pattern, fraction in (self.overrides or {}).items():
            if not _is_fraction(fraction):
                raise invalid("overrides", "hold fractions in [0, 1)", {pattern: fraction})
        if not (is_number(self.max_layer_sparsity) and 0 < self.max_layer_sparsity <= 1):
            raise invalid("max_layer_sparsity", "lie in (0, 1]", self.max_layer_sparsity)
        if self.max_layer_sparsity < 1.0 and self.scope == "layer":
            raise invalid("max_layer_sparsity", "be left out with scope='layer'", self.max_layer_sparsity)
        if self.sparsity is None and (self.overrides or self.max_layer_sparsity < 1.0):
            name = "overrides" if self.overrides else "max_layer_sparsity"
            raise invalid(name, "be left out where the method fixes the sparsity itself", getattr(self, name))

    def of_layers(self, targets: Sequence[Target]) -> dict[str, float]:
        """Find the fractions that overrides give, by parameter name; each pattern must match targeted layers."""
        found: dict[str, float] = {}
        for pattern, fraction in (self.overrides or {}).items():
            names = [target.name for target in targets if matches(target.layer, pattern)]
            names = names or [target.name for target in targets if matches(target.name, pattern)]
            if not names:
                near = nearest(pattern, [target.layer for target in targets])
                raise invalid("overrides", "match layers that are targeted", pattern, near)
            found.update(dict.fromkeys(names, fraction))
        return found

    def check(self, weights: Mapping[str, Tensor], fractions: Mapping[str, float]) -> None:
        """Raise if what overrides and cap leave can't hold the whole budget."""
        if self.sparsity is None or self.scope == "layer":
            return
        total = round(self.sparsity * sum(weight.numel() for weight in weights.values()))
        left = total - sum(round(fractions[name] * weights[name].numel()) for name in fractions)
        room = sum(self._most(weight) for name, weight in weights.items() if name not in fractions)
        if not 0 <= left <= room:
            raise CompressionError(
                f"`sparsity` must be within reach of the layers that share it. Received: sparsity={self.sparsity}, "
                f"which asks them for {left:,} zeros, where `overrides` and `max_layer_sparsity` leave 0 to {room:,}. "
                "Change one of the three."
            )

    def is_met(self, method: PruningMethod, masks: Masks, fractions: Mapping[str, float]) -> bool:
        """Tell whether ``masks`` hold the whole budget, to the nearest unit."""
        if self.sparsity is None:
            return True
        alone = {**dict.fromkeys(masks, self.sparsity), **fractions} if self.scope == "layer" else fractions
        pairs = [(fraction * masks[name].numel(), [masks[name]]) for name, fraction in alone.items()]
        if self.scope == "global":
            pairs.append((self.sparsity * sum(mask.numel() for mask in masks.values()), [*masks.values()]))
        return all(abs(goal - pruned(held)) <= max(method.unit(mask) for mask in held) / 2 for goal, held in pairs)

    def _most(self, weight: Tensor, unit: int = 1) -> int:
        # Rounded first, as 0.29 * 200 is a hair below 58.
        return math.floor(round(self.max_layer_sparsity * weight.numel(), 6)) // unit * unit

    def grow(
        self,
        method: PruningMethod,
        weights: Mapping[str, Tensor],
        masks: Masks,
        fractions: Mapping[str, float],
        fraction: float = 1.0,
    ) -> Masks:
        """Grow ``masks`` to ``fraction`` of the budget; everything that they prune stays pruned.

        ``global`` prunes round(fraction * sparsity * N) of all N elements, ``layer`` the same of each tensor;
        structured methods take the nearest number of whole units. Where ``masks`` already prune more, they stay as
        they are. ``fractions`` are those of weights that have one of their own.
        """
        if self.sparsity is None or method.fixes_sparsity:
            return method.grow(weights, masks, 0)
        alone = {**dict.fromkeys(weights, self.sparsity), **fractions} if self.scope == "layer" else fractions
        grown: Masks = {}
        for name, goal in alone.items():
            grown |= method.grow({name: weights[name]}, masks, fraction * goal * weights[name].numel())
        shared = [name for name in weights if name not in alone]
        total = self.sparsity * sum(weight.numel() for weight in weights.values())
        left = round(fraction * total) - pruned(grown.values())
        # Rounding on the way must not take what the end would have to give back.
        left = min(left, round(total) - sum(round(goal * weights[name].numel()) for name, goal in alone.items()))
        while shared:
            ranked = method.grow({name: weights[name] for name in shared}, masks, left)
            most = {name: self._most(weights[name], method.unit(weights[name])) for name in shared}
            over = [name for name in shared if pruned([ranked[name]]) > most[name]]
            grown |= ranked
            if self.max_layer_sparsity == 1.0 or not over:
                break
            for name in over:
                grown |= method.grow({name: weights[name]}, masks, most[name])
                left -= pruned([grown[name]])
            shared = [name for name in shared if name not in over]
        return {name: grown[name] for name in weights}


def _is_fraction(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0.0 <= value < 1.0
