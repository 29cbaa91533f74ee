"""`PruningPlan`: which weights of a model a recipe prunes, and how their masks grow; it changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightning_compress.compensation.layer_rows import input_dim
from lightning_compress.errors import CompressionError, invalid
from lightning_compress.messages import by_reason, in_short, named
from lightning_compress.modules.layer_weights import PRUNABLE
from lightning_compress.modules.paths import compressible_modules
from lightning_compress.pruning.budget import SparsityBudget
from lightning_compress.pruning.layout import Layout, UnitView
from lightning_compress.pruning.methods import LowestScores, Masks, PruningMethod
from lightning_compress.pruning.recipe import PruningRecipe
from lightning_compress.targets import Selection


@dataclass(frozen=True)
class PruningPlan:
    """Says which weights of a model are pruned, and how."""

    method: PruningMethod
    budget: SparsityBudget
    selection: Selection
    warning: str  # what the targets name and don't reach, and why; empty if nothing
    units: UnitView  # how each weight lies, for a method that takes whole units
    fractions: dict[str, float]  # by the weight that is ranked, of those that have one of their own

    def __str__(self) -> str:
        head = f"{len(self.selection.targets)} tensors are pruned, and these are left out:"
        lines = [f"{named(names)}: {reason}" for reason, names in by_reason(self.selection.skipped).items()]
        return "\n  ".join(in_short([head, *lines]))

    def grow(self, ranked: Mapping[str, Tensor], masks: Masks, fraction: float) -> Masks:
        """Grow ``masks`` to ``fraction`` of the budget, by what ``ranked`` has for each weight."""
        view = self.units.outputs_first
        return self.units.undo(self.budget.grow(self.method, view(ranked), view(masks), self.fractions, fraction))

    def is_met(self, masks: Masks) -> bool:
        """Tell whether the masks hold what the budget asks for, to the nearest unit."""
        return self.budget.is_met(self.method, self.units.outputs_first(masks), self.fractions)


def make_plan(recipe: PruningRecipe, model: nn.Module) -> PruningPlan:
    """Plan what a recipe means for a model; raise where its targets can't be ranked, changed, or pruned that far."""
    method, selection = recipe.method, recipe.targets.select(model)
    layers = compressible_modules(model)
    if isinstance(method, LowestScores) and method.pattern is not None:
        method, selection = _in_groups(method, method.pattern.m, selection, layers)
    dim: int = getattr(method, "dim", 0)
    units = UnitView.of(selection.targets if method.structured else (), layers, dim)
    weights = {target.name: target.parameter for target in selection.targets}
    for name, weight in weights.items():
        _check_weight(name, weight, method, dim, units.layouts)
    if recipe.regrow and any(target.magnitude is not None for target in selection.targets):
        raise invalid("regrow", "be False where a weight norm is pruned", True, "Exclude its layer.")
    fractions = recipe.budget.of_layers(selection.targets)
    recipe.budget.check(weights, fractions)
    for _, *others in units.pairs:  # ranked under the first name
        fractions = {name: fraction for name, fraction in fractions.items() if name not in others}
    return PruningPlan(method, recipe.budget, selection, selection.warning, units, fractions)


def _in_groups(
    method: LowestScores, size: int, selection: Selection, modules: Mapping[str, nn.Module]
) -> tuple[PruningMethod, Selection]:
    """Give the method each weight's input dimension, and leave out weights whose inputs don't divide into groups."""
    dims, targets, skipped = {}, [], dict(selection.skipped)
    for target in selection.targets:
        layer = modules[target.layer]
        dim = input_dim(layer)
        if target.parameter.dim() < 2:
            skipped[target.name] = "it has no inputs"
        elif not isinstance(layer, PRUNABLE):
            skipped[target.name] = f"which dimension of a {type(layer).__name__}'s weight are its inputs isn't known"
        elif target.parameter.shape[dim] % size:
            skipped[target.name] = f"{target.parameter.shape[dim]} inputs are no multiple of {size}"
        else:
            dims[target.name] = dim
            targets.append(target)
    if not targets:
        reasons = "; ".join(f"{name}: {skipped[name]}" for name in list(skipped)[:5])
        raise CompressionError(
            f"`n_m` must have layers whose inputs divide into groups of {size}. Received: {reasons}."
        )
    return replace(method, dims=dims), replace(selection, targets=tuple(targets), skipped=skipped)


def _check_weight(name: str, weight: Tensor, method: PruningMethod, dim: int, layouts: Mapping[str, Layout]) -> None:
    """Raise if a weight can't be ranked or changed, or a structured method's ``dim`` isn't a dimension of it."""
    if weight.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise CompressionError(
            f"`targets` must select real floating-point weights. Received: {name} of {weight.dtype}. Exclude it."
        )
    if weight.is_inference() or 0 in weight.stride():
        kind = "made in inference mode" if weight.is_inference() else "expanded, with one value in many places"
        raise CompressionError(
            f"`targets` must select weights that can be changed in place. Received: {name}, {kind}. Clone it first."
        )
    if method.structured and weight.dim() < 2:
        raise CompressionError(
            f"`targets` must select weights of two dimensions and more for a method that takes whole units. "
            f"Received: {name} of shape {tuple(weight.shape)}. Exclude it; a bias goes with its layer's units."
        )
    shape = layouts[name].outputs_first(weight).shape if name in layouts else weight.shape
    if method.structured and not -len(shape) <= dim < len(shape):
        raise CompressionError(
            f"`dim` must be a dimension of every target. Received: dim={dim} for {name} of shape "
            f"{tuple(shape)}. Exclude the layer, or choose another dim."
        )
