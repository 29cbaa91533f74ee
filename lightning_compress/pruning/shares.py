"""How many weights of which layer go, where layers are told apart by what their loss does to the outputs. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lightning_compress.pruning.methods import Masks, pruned
from lightning_compress.pruning.plan import PruningPlan

TRIED = 0.6
"""At so much sparsity of one layer alone its error is measured."""
STRENGTH = 0.07
"""So much sparsity a factor of e in the error for each weight is worth."""
REACH = 0.2
"""No layer loses so much more than the mean: its error was measured at `TRIED`, and beyond that nobody knows."""


def counts_of(plan: PruningPlan, masks: Masks, fraction: float, errors: Mapping[str, float]) -> dict[str, int]:
    """Return how many elements of each weight are zero when masks have grown to ``fraction`` of the budget.

    Args:
        plan: names the weights and the budget.
        masks: what is pruned already and stays so.
        fraction: of the budget.
        errors: of the outputs, with only one weight at `TRIED`; a weight without one gets the mean sparsity.
    """
    budget, sizes = plan.budget, {name: mask.numel() for name, mask in masks.items()}
    assert budget.sparsity is not None  # methods that calibrate fix nothing themselves
    alone = {**dict.fromkeys(masks, budget.sparsity), **plan.fractions} if budget.scope == "layer" else plan.fractions
    already = {name: pruned([mask]) for name, mask in masks.items()}
    counts = {name: max(round(fraction * goal * sizes[name]), already[name]) for name, goal in alone.items()}
    shared = [name for name in masks if name not in alone]
    total = budget.sparsity * sum(sizes.values())
    # Rounding on the way must not take what the end would have to give back.
    at_end = round(total) - sum(round(goal * sizes[name]) for name, goal in alone.items())
    left = min(round(fraction * total) - sum(counts.values()), at_end)
    most = {name: math.floor(round(budget.max_layer_sparsity * sizes[name], 6)) for name in shared}
    return counts | share(
        {name: sizes[name] for name in shared}, {name: already[name] for name in shared}, most, left, errors
    )


def share(
    sizes: Mapping[str, int], least: Mapping[str, int], most: Mapping[str, int], total: int, errors: Mapping[str, float]
) -> dict[str, int]:
    """Share ``total`` zeros out: ``s_n = clip(s + p (c - log(e_n / N_n)), 0, s + 0.2)``, c so that it is met.

    Small layers that do much may stay whole: what they would have lost costs large ones little.

    Example:
        >>> share({"a": 10, "b": 10}, {"a": 0, "b": 0}, {"a": 10, "b": 10}, 11, {})
        {'a': 6, 'b': 5}
    """
    if not sizes or total <= sum(least.values()):
        return dict(least)
    mean = total / sum(sizes.values())
    logs = _centred_logs({name: errors[name] / sizes[name] for name in sizes if name in errors})
    wanted = {name: mean - STRENGTH * logs.get(name, 0.0) for name in sizes}
    reach = {name: min(most[name], (mean + REACH) * size) for name, size in sizes.items()}
    high: Mapping[str, float] = {name: max(least[name], part) for name, part in reach.items()}
    if total > sum(high.values()):
        high = most

    def parts(shift: float) -> dict[str, float]:
        return {name: min(max(size * (wanted[name] + shift), least[name]), high[name]) for name, size in sizes.items()}

    under, over = -2.0, 2.0
    for _ in range(60):
        shift = (under + over) / 2
        under, over = (shift, over) if sum(parts(shift).values()) < total else (under, shift)
    exact = parts(over)
    counts = {name: math.floor(part + 1e-6) for name, part in exact.items()}
    by_rest = sorted(sizes, key=lambda name: counts[name] - exact[name])
    while (left := total - sum(counts.values())) > 0:
        for name in [name for name in by_rest if counts[name] < most[name]][:left]:
            counts[name] += 1
    return counts


def _centred_logs(errors: Mapping[str, float]) -> dict[str, float]:
    """Take logarithms less their mean; what does nothing counts as a millionth of what does most."""
    floor = max(errors.values(), default=0.0) * 1e-6
    if floor == 0:
        return {}
    logs = {name: math.log(max(error, floor)) for name, error in errors.items()}
    return {name: log - sum(logs.values()) / len(logs) for name, log in logs.items()}
