"""`search` chooses a level for each layer, so that a model is small within a drop, or best within a budget."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lightning_compress.choosing.evaluations import Evaluate, Mode, check_mode
from lightning_compress.choosing.forms import Run
from lightning_compress.choosing.result import SearchResult
from lightning_compress.choosing.resume import digest
from lightning_compress.choosing.searcher import COSTS, DEFAULT_COST, CostKind, Searcher
from lightning_compress.choosing.sensitivity import Kind, Level, make_forms
from lightning_compress.choosing.timed_searcher import TimedSearcher
from lightning_compress.choosing.weight_forms import FINE
from lightning_compress.errors import CompressionError, invalid, nearest
from lightning_compress.modules.calls import way_without_trainer

LEVELS: dict[str, Sequence[Level]] = {"pruning": FINE}
"""Levels by default where they aren't those of `sensitivity`."""


def search(
    model: nn.Module,
    evaluate: Evaluate,
    batches: Iterable[Any],
    over: Kind = "weights",
    budget: float | None = None,
    max_drop: float | None = None,
    cost: CostKind | None = None,
    levels: Sequence[Level] | None = None,
    mode: Mode = "max",
    path: str | Path | None = None,
    seed: int = 0,
) -> SearchResult:
    """Choose a level for each layer; the model is left as it is.

    With ``max_drop``, the cost is made small while the metric falls no further; with ``budget``, the metric is to be
    best within it. From the whole model on, the step is taken again and again that has the least predicted error for
    what it saves: to the next level of a layer, or further where that is better. The errors are the Taylor scores of
    `sensitivity`, which are added up. What is chosen is then really compressed and evaluated; where the sum was wrong,
    steps are taken back. What gives all layers the same level is evaluated too, and of ``weights`` and ``int8`` taken
    where it is better beyond the noise. Pruning to a budget is for a fit, before which the metric says little of what
    will be: what is added up then is ``-log(||W'||^2 / ||W||^2)``, by which layers keep the largest product of their
    weights' squared norms.

    Time isn't foretold: the way is that of the cost by default, and choices on it are compressed as the callback does
    it and timed in turns with the model, until it is known where they come within the budget. What is chosen is timed
    anew, as it was chosen for its time; the result says so where it isn't faster.

    Args:
        model: any float module.
        evaluate: as for `sensitivity`. **Choices are made by it**: keep other data to test the result.
        batches: as for `sensitivity`.
        over: what is chosen: ``weights`` (schemes and bits), ``pruning`` (sparsities), ``channels`` (fractions that
            stay), or ``int8`` (which layers stay float).
        budget: the fraction of the cost that remains, in (0, 1); of pruned weights 0.1 is a sparsity of 0.9.
        max_drop: how far the metric may fall, in its own units, at least 0. Exactly one of the two is given.
        cost: ``bytes``, ``params`` (that aren't zero), ``macs`` (in float), or ``latency`` of the first batch on this
            machine, but of ``pruning``. By default bytes of ``weights``, params of ``pruning``, and MACs of
            ``channels`` and ``int8``.
        levels: as for `sensitivity`; of pruning by default more, up to 0.99.
        mode: ``max`` where more of the metric is better, ``min`` where less is.
        path: a file of JSON lines that each evaluation is appended to. An interrupted run goes on where it was.
        seed: of the Taylor scores' random products.

    Returns:
        The choice with its figures, what else was evaluated, and the YAML of the callback that does it.

    Raises:
        CompressionError: bad arguments, a budget out of reach, or no choice within ``max_drop``; the best that there is
            is named then.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
        >>> batches = [torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) for _ in range(4)]
        >>> y = model(batches[0])
        >>> def loss(model):
        ...     return (model(batches[0]) - y).square().mean(1)
        >>> found = search(model, loss, batches, budget=0.2, mode="min")
        >>> found.chosen.fraction <= 0.2
        True

    References:
        Sinha and Zoltners, "The multiple-choice knapsack problem", 1979, for greedy steps along each item's convex
        hull; with many layers they are within a step of the optimum for costs and errors that add up.
    """
    run = way_without_trainer(model)
    return search_by(run, model, evaluate, batches, over, budget, max_drop, cost, levels, mode, path, seed)


def search_by(
    run: Run,
    model: nn.Module,
    evaluate: Evaluate,
    batches: Iterable[Any],
    over: Kind,
    budget: float | None,
    max_drop: float | None,
    cost: CostKind | None,
    levels: Sequence[Level] | None,
    mode: Mode,
    path: str | Path | None,
    seed: int = 0,
) -> SearchResult:
    """Search where batches go through the model in a way of their own; the other arguments are those of `search`."""
    check_search(over, budget, max_drop, cost, mode)
    forms, taken = make_forms(model, batches, over, levels or LEVELS.get(over), run)
    kind = cost or DEFAULT_COST[over]
    searcher = TimedSearcher if kind == "latency" else Searcher
    return searcher(forms, evaluate, taken, over, run, kind, mode, path, seed, digest(model)).search(budget, max_drop)


def check_search(over: str, budget: float | None, max_drop: float | None, cost: str | None, mode: str) -> None:
    """Check arguments of `search`.

    Raises:
        CompressionError: one of them is wrong.
    """
    if over not in DEFAULT_COST:
        raise invalid("over", f"be one of {', '.join(DEFAULT_COST)}", over, nearest(str(over), DEFAULT_COST))
    if (budget is None) == (max_drop is None):
        raise CompressionError(
            "`budget` or `max_drop` must be given, exactly one of them. Received: "
            f"budget={budget}, max_drop={max_drop}. With a budget the metric is to be best, with a drop the cost least."
        )
    if budget is not None and not 0.0 < budget < 1.0:
        raise invalid("budget", "lie in (0, 1)", budget, "It is the fraction of the cost that remains.")
    if max_drop is not None and not max_drop >= 0.0:
        raise invalid("max_drop", "be at least 0", max_drop, "It is in the metric's own units.")
    if over == "pruning" and cost == "latency":
        remedy = "Zeros are multiplied like any other number. Search over channels, or int8."
        raise invalid("cost", f"be one of {', '.join(COSTS)} over pruning", cost, remedy)
    if cost is not None and cost not in (*COSTS, "latency"):
        raise invalid("cost", f"be one of {', '.join(COSTS)}, latency", cost)
    check_mode(mode)
