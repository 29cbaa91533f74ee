"""`search` chooses a level for each layer, so that a model is small within a drop, or best within a budget."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from lightning_compress.choosing.evaluations import Evaluate, Evaluation, Mode, check_mode, drop, evaluated
from lightning_compress.choosing.forms import Choice, Forms, Run
from lightning_compress.choosing.result import Point, SearchResult
from lightning_compress.choosing.resume import Progress, digest
from lightning_compress.choosing.sensitivity import Kind, Level, make_forms, measure_forms
from lightning_compress.choosing.steps import Steps, greedy
from lightning_compress.choosing.table import SensitivityTable
from lightning_compress.choosing.weight_forms import FINE
from lightning_compress.errors import CompressionError, invalid, nearest
from lightning_compress.modules.calls import way_without_trainer

CostKind = Literal["bytes", "params", "macs"]
_ATTRIBUTES = {"bytes": "size_bytes", "params": "parameters", "macs": "macs"}
DEFAULT_COST: dict[str, CostKind] = {"int8": "macs", "weights": "bytes", "pruning": "params", "channels": "macs"}
LEVELS: dict[str, Sequence[Level]] = {"pruning": FINE}
"""Levels by default where they aren't those of `sensitivity`."""
_FRONT = 6
"""So many choices along the way are evaluated for the front, beside those that the search needs."""
_MOST_STEPS_BACK = 12


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

    Args:
        model: any float module.
        evaluate: as for `sensitivity`. **Choices are made by it**: keep other data to test the result.
        batches: as for `sensitivity`.
        over: what is chosen: ``weights`` (schemes and bits), ``pruning`` (sparsities), ``channels`` (fractions that
            stay), or ``int8`` (which layers stay float).
        budget: the fraction of the cost that remains, in (0, 1); of pruned weights 0.1 is a sparsity of 0.9.
        max_drop: how far the metric may fall, in its own units, at least 0. Exactly one of the two is given.
        cost: ``bytes``, ``params`` (that aren't zero) or ``macs`` (in float). By default bytes of ``weights``, params
            of ``pruning``, and MACs of ``channels`` and ``int8``.
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
    check_search(over, budget, max_drop, cost, mode)
    run = way_without_trainer(model)
    forms, taken = make_forms(model, batches, over, levels or LEVELS.get(over), run)
    searcher = Searcher(forms, evaluate, taken, over, run, cost or DEFAULT_COST[over], mode, path, seed, digest(model))
    return searcher.search(budget, max_drop)


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
    if cost is not None and cost not in _ATTRIBUTES:
        raise invalid("cost", f"be one of {', '.join(_ATTRIBUTES)}", cost)
    check_mode(mode)


class Searcher:
    """Chooses among the forms of a model; see `search`."""

    steps: Steps

    def __init__(
        self,
        forms: Forms,
        evaluate: Evaluate,
        batches: Sequence[Any],
        over: str,
        run: Run,
        cost: CostKind,
        mode: Mode,
        path: str | Path | None = None,
        seed: int = 0,
        model_digest: str = "",
    ) -> None:
        self.forms, self.evaluate, self.mode, self.over, self.kind = forms, evaluate, mode, over, cost
        self.whole = self.cost({})
        with forms.compressed({}) as model:
            self.before = evaluated(evaluate, model)
        self.table = _table(forms, self.before, batches, over, run, mode, seed)
        settings = {"version": 1, "over": over, "levels": list(forms.levels), "mode": mode, "model": model_digest}
        self.progress = Progress(path, {**settings, "batches": len(batches), "metric": self.before.value})
        self.points: dict[tuple[tuple[str, str], ...], Point] = {}

    def cost(self, choice: Choice) -> float:
        """Return what a model with a choice costs."""
        return float(getattr(self.forms.cost(choice), _ATTRIBUTES[self.kind]))

    def point(self, choice: Choice, label: str = "") -> Point:
        """Evaluate a choice, unless it has been."""
        key = tuple(sorted(choice.items()))
        if key not in self.points:
            found = self.progress.found.get(("", repr(key), "choice"))
            if found is None:
                with self.forms.compressed(choice) as model:
                    fall = drop(self.before, evaluated(self.evaluate, model), self.mode)
                found = {"drop": fall.value, "drop_error": fall.error}
                self.progress.add(("", repr(key), "choice"), found)
            cost = self.cost(choice)
            self.points[key] = Point(dict(choice), cost, cost / self.whole, **found)
        if label:
            self.points[key] = replace(self.points[key], label=label)
        return self.points[key]

    def uniform(self) -> Iterator[tuple[str, dict[str, str]]]:
        """Yield what gives the same level to all layers that can have it."""
        for level in self.forms.levels:
            yield level, {layer: level for layer, levels in self.forms.layers.items() if level in levels}

    def search(self, budget: float | None, max_drop: float | None) -> SearchResult:
        """Choose; exactly one of the two limits is given."""
        uniform = dict(self.uniform())
        scores = {(row.layer, row.level): row.score or 0.0 for row in self.table.rows}
        if budget is not None:
            scores |= self.forms.errors_in_training()
        self.steps = greedy(self.forms.layers, scores, self.cost)
        if budget is not None:
            chosen = self._within_budget(budget, uniform)
        else:
            assert max_drop is not None
            chosen = self._within_drop(max_drop, uniform)
        for choice in self.steps.spread(_FRONT):
            self.point(choice)
        points = sorted(self.points.values(), key=lambda point: point.cost)
        settings = self.forms.settings(chosen.choice) if chosen.choice else {}
        return SearchResult(
            self.over,
            self.kind,
            self.whole,
            self.before.value,
            self.mode,
            chosen,
            tuple(points),
            self.forms.callback,
            settings,
            self.table,
        )

    def _within_budget(self, budget: float, uniform: Mapping[str, dict[str, str]]) -> Point:
        target = budget * self.whole
        if (choice := self.steps.within(target)) is None:
            least = min(self.cost(choice) for choice in [*uniform.values(), self.steps.last]) / self.whole
            raise CompressionError(
                f"`budget` must be within reach. Received: budget={budget} of {self.kind}, where the least is "
                f"{least:.4f}. Ask for more, or give `levels` that compress more."
            )
        tried = [self.point(choice)]
        same = {label: choice for label, choice in uniform.items() if self.cost(choice) <= target * (1 + 1e-9)}
        if same:  # the one that compresses least of those
            label = max(same, key=lambda label: self.cost(same[label]))
            tried.append(self.point(same[label], label))
        mixed, *others = tried
        is_final = self.over in ("weights", "int8")
        return others[0] if others and is_final and _is_better(others[0], mixed) else mixed

    def _within_drop(self, max_drop: float, uniform: Mapping[str, dict[str, str]]) -> Point:
        low, high = 0, len(self.steps.choices) - 1  # as far as `low` it is within
        if self.point(self.steps.choices[high]).drop <= max_drop:
            low = high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.point(self.steps.choices[middle]).drop <= max_drop else (low, middle)
        for label, choice in uniform.items():
            if self.cost(choice) < self.cost(self.steps.choices[low]):
                self.point(choice, label)
        fit = [point for point in self.points.values() if point.drop <= max_drop and point.choice]
        if not fit:
            best = min((point for point in self.points.values() if point.choice), key=lambda point: point.drop)
            raise CompressionError(
                f"`max_drop` must leave something to compress. Received: max_drop={max_drop}, where the metric falls "
                f"by {best.drop:.4g} at {best.fraction:.3f} of the {self.kind} already. Allow more, or give `levels` "
                "that compress less."
            )
        return min(fit, key=lambda point: point.cost)


def _is_better(point: Point, other: Point) -> bool:
    """Whether the metric falls less, by more than chance explains."""
    noise = math.hypot(point.drop_error or 0.0, other.drop_error or 0.0)
    return point.drop + noise < other.drop


def _table(
    forms: Forms, before: Evaluation, batches: Sequence[Any], over: str, run: Run, mode: Mode, seed: int
) -> SensitivityTable:
    return measure_forms(forms, lambda _: before.value, batches, over, run, mode=mode, top=0, seed=seed, splits=False)
