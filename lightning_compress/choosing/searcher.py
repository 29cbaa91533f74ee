"""Chooses among the forms of a model: by predicted errors, and by what is really evaluated."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lightning_compress.choosing.evaluations import Evaluate, Evaluation, Mode, drop, evaluated
from lightning_compress.choosing.forms import Choice, Forms, Run
from lightning_compress.choosing.result import Point, SearchResult
from lightning_compress.choosing.resume import Progress
from lightning_compress.choosing.sensitivity import measure_forms
from lightning_compress.choosing.steps import Steps, greedy
from lightning_compress.choosing.table import SensitivityTable
from lightning_compress.errors import CompressionError

CostKind = Literal["bytes", "params", "macs", "latency"]
COSTS = {"bytes": "size_bytes", "params": "parameters", "macs": "macs"}
"""Those that are known without a measurement."""
DEFAULT_COST: dict[str, CostKind] = {"int8": "macs", "weights": "bytes", "pruning": "params", "channels": "macs"}
_NAMED = 5
FRONT = 6
"""So many choices along the way are evaluated for the front, beside those that the search needs."""


class Searcher:
    """Chooses among the forms of a model; see `search`."""

    steps: Steps
    remedy = "Ask for more, or give `levels` that compress more."

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
        self.run, self.batch = run, batches[0]
        with forms.compressed({}) as model:
            self.before = evaluated(evaluate, model)
        self.table = _table(forms, self.before, batches, over, run, mode, seed)
        settings = {"version": 1, "over": over, "levels": list(forms.levels), "mode": mode, "model": model_digest}
        self.progress = Progress(path, {**settings, "batches": len(batches), "metric": self.before.value})
        self.points: dict[tuple[tuple[str, str], ...], Point] = {}
        self.whole = self.cost({})

    def computed(self, choice: Choice) -> float:
        """Return what a model with a choice costs, by what is known of its layers."""
        return float(getattr(self.forms.cost(choice), COSTS[self.kind]))

    def cost(self, choice: Choice) -> float:
        """Return what a model with a choice costs, in the unit of the limit."""
        return self.computed(choice)

    def spread(self, choice: Choice) -> tuple[float, float] | None:
        """Return between which fractions of the original's cost half of the measurements lie; None without any."""
        return None

    def within(self, cost: float) -> Choice | None:
        """Return the choice along the way with the least predicted error that costs no more; None if there is none."""
        return self.steps.within(cost)

    def settled(self, point: Point, budget: float | None) -> tuple[Point, tuple[str, ...]]:
        """Return what is chosen in the end, and what is to be said of it."""
        return point, ()

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
            self.points[key] = Point(dict(choice), cost, cost / self.whole, **found, spread=self.spread(choice))
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
        self.steps = greedy(self.forms.layers, scores, self.computed)
        if budget is not None:
            chosen = self._within_budget(budget, uniform)
        else:
            assert max_drop is not None
            chosen = self._within_drop(max_drop, uniform)
        for choice in self.steps.spread(FRONT):
            self.point(choice)
        chosen, notes = self.settled(chosen, budget)
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
            notes,
        )

    def _within_budget(self, budget: float, uniform: Mapping[str, dict[str, str]]) -> Point:
        target = budget * self.whole
        if (choice := self.within(target)) is None:
            least = min(self.cost(choice) for choice in [*uniform.values(), self.steps.last]) / self.whole
            raise CompressionError(
                f"`budget` must be within reach. Received: budget={budget} of {self.kind}, where the least is "
                f"{least:.4f}. {self.remedy}{self._skipped}"
            )
        tried = [self.point(choice)]
        same = {label: choice for label, choice in uniform.items() if self.cost(choice) <= target * (1 + 1e-9)}
        if same:  # the one that compresses least of those
            label = max(same, key=lambda label: self.cost(same[label]))
            tried.append(self.point(same[label], label))
        mixed, *others = tried
        is_final = self.over in ("weights", "int8")
        return others[0] if others and is_final and _is_better(others[0], mixed) else mixed

    @property
    def _skipped(self) -> str:
        skipped = list(self.forms.skipped.items())[:_NAMED]
        return f" Stays as it is: {'; '.join(f'{path}: {reason}' for path, reason in skipped)}." if skipped else ""

    def _within_drop(self, max_drop: float, uniform: Mapping[str, dict[str, str]]) -> Point:
        low, high = 0, len(self.steps.choices) - 1  # as far as `low` it is within
        if self.point(self.steps.choices[high]).drop <= max_drop:
            low = high
        low, _ = halved(low, high, lambda place: self.point(self.steps.choices[place]).drop <= max_drop)
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


def halved(low: int, high: int, is_low: Callable[[int], bool]) -> tuple[int, int]:
    """Return two neighbours between which ``is_low`` changes; it is taken to hold at ``low``, and not at ``high``.

    Example:
        >>> halved(0, 10, lambda place: place < 7)
        (6, 7)
    """
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_low(middle) else (low, middle)
    return low, high


def _is_better(point: Point, other: Point) -> bool:
    """Whether the metric falls less, by more than chance explains."""
    noise = math.hypot(point.drop_error or 0.0, other.drop_error or 0.0)
    return point.drop + noise < other.drop


def _table(
    forms: Forms, before: Evaluation, batches: Sequence[Any], over: str, run: Run, mode: Mode, seed: int
) -> SensitivityTable:
    return measure_forms(forms, lambda _: before.value, batches, over, run, mode=mode, top=0, seed=seed, splits=False)
