"""`PruningRecipe`: what is pruned and how much of it, checked as far as that goes without a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lightning_compress.errors import invalid
from lightning_compress.pruning.budget import SparsityBudget
from lightning_compress.pruning.methods import LowestScores, PruningMethod, resolve
from lightning_compress.targets import Scope, Targets

METHOD = "lamp"
"""Magnitudes as they are compare badly between layers, whose weights differ in scale by their fan-in alone: some layers
are emptied while others stay whole. ``benchmarks/defaults.md`` says what that costs."""


@dataclass(frozen=True)
class PruningRecipe:
    """What is pruned and how much of it, checked as far as that goes without a model.

    Attributes:
        method: as the user wrote it.
        rule: decides which weights go.
        budget: how many.
        targets: of which.
    """

    method: str
    rule: PruningMethod
    budget: SparsityBudget
    targets: Targets


def make_recipe(
    method: str,
    sparsity: float | None,
    scope: Scope,
    targets: Targets,
    overrides: Mapping[str, float] | None,
    max_layer_sparsity: float,
    n_m: str | None,
    dim: int,
    norm: float,
) -> PruningRecipe:
    """The recipe of `prune_`'s arguments.

    Raises:
        CompressionError: one is out of range, or two don't go together.
    """
    rule = resolve(method, dim, norm, n_m)
    fixed = f"method={method!r}" if rule.fixes_sparsity else f"n_m={n_m!r}" if n_m is not None else ""
    if fixed and sparsity is not None:
        raise invalid("sparsity", f"be left out: {fixed} fixes it itself", sparsity)
    if not fixed and sparsity is None:
        raise invalid("sparsity", f"be given for method={method!r}", sparsity, "0.9 zeroes nine weights of ten.")
    budget = SparsityBudget(sparsity, scope, overrides, max_layer_sparsity)
    if isinstance(rule, LowestScores) and rule.pattern is not None:
        budget = replace(budget, sparsity=1 - rule.pattern.n / rule.pattern.m)
    if scope == "global" and not rule.compares_layers:
        raise invalid("scope", f"be 'layer' for method={method!r}, whose units compare within a layer only", scope)
    return PruningRecipe(method, rule, budget, targets)
