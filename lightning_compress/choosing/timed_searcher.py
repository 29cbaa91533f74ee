"""Chooses by time, which is measured: models are compressed in earnest, and timed in turns with the original."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch

from lightning_compress.choosing.forms import Choice
from lightning_compress.choosing.result import Point
from lightning_compress.choosing.searcher import COSTS, DEFAULT_COST, FRONT, Searcher, halved
from lightning_compress.choosing.speed import Speed, milliseconds
from lightning_compress.errors import NoEffectWarning


class TimedSearcher(Searcher):
    """Chooses among the forms of a model by their time for the first batch; see `search`.

    A model's time isn't the sum of its layers': one alone in int8 pays for rounding what comes in and goes out, a chain
    of them once. So whole models are timed, on the way of the cost that is known of them.
    """

    remedy = "It was timed. Ask for more, give `levels` that compress more, or search over channels."

    def computed(self, choice: Choice) -> float:
        return float(getattr(self.forms.cost(choice), COSTS[DEFAULT_COST[self.over]]))

    def cost(self, choice: Choice) -> float:
        if not choice:
            key = ("", "", "milliseconds")
            if key not in self.progress.found:
                self.progress.add(key, {"latency": milliseconds(self.forms.floats, self.run, self.batch)})
            return float(self.progress.found[key]["latency"])
        return self.whole / self._speed(choice).median

    def spread(self, choice: Choice) -> tuple[float, float] | None:
        return _quartiles(self._speed(choice)) if choice else None

    def _speed(self, choice: Choice, what: str = "speed") -> Speed:
        key = ("", repr(tuple(sorted(choice.items()))), what)
        if key not in self.progress.found:
            with warnings.catch_warnings(action="ignore"), torch.inference_mode(False):
                other = self.forms.deployed(choice)
            speed = Speed.beside(self.forms.floats, other, self.run, self.batch)
            self.progress.add(key, {"median": speed.median, "low": speed.low, "high": speed.high})
        return Speed(**self.progress.found[key])

    def within(self, cost: float) -> Choice | None:
        choices = self.steps.choices
        if self.cost(choices[-1]) > cost:  # what compresses most need not be the fastest
            found = [choice for choice in self.steps.spread(FRONT) if self.cost(choice) <= cost]
            return min(found, key=self.steps.error, default=None)
        _, place = halved(0, len(choices) - 1, lambda place: self.cost(choices[place]) > cost)
        return choices[place]

    def settled(self, point: Point, budget: float | None) -> tuple[Point, tuple[str, ...]]:
        """Time what is chosen anew, as chance had a part in the choice; go on along the way where it misses."""
        tried = [self._anew(point.choice)]
        further = [choice for choice in self.steps.spread(FRONT) if self.computed(choice) < self.computed(point.choice)]
        while budget is not None and tried[-1].fraction > budget and further:
            tried.append(self._anew(further.pop(0)))
        chosen = tried[-1]
        if budget is not None and chosen.fraction > budget:
            chosen = min(tried, key=lambda point: point.fraction)
        notes = _notes(chosen, budget)
        if notes:
            warnings.warn(f"search: {' '.join(notes)}", NoEffectWarning, stacklevel=5)
        return chosen, notes

    def _anew(self, choice: Choice) -> Point:
        point, speed = self.point(choice), self._speed(choice, "speed anew")
        cost = self.whole / speed.median
        anew = replace(point, cost=cost, fraction=cost / self.whole, spread=_quartiles(speed))
        self.points[tuple(sorted(choice.items()))] = anew
        return anew


def _quartiles(speed: Speed) -> tuple[float, float]:
    return 1 / speed.high, 1 / speed.low


def _notes(point: Point, budget: float | None) -> tuple[str, ...]:
    assert point.spread is not None
    low, high = point.spread
    notes = list[str]()
    if budget is not None and point.fraction > budget:
        notes.append(f"BEYOND the budget of {budget}: timed anew, {point.fraction:.3f} of the time remains.")
    if low > 1.0:
        notes.append(f"SLOWER than the model as it is: {point.fraction:.2f} times as long.")
    elif high >= 1.0:
        notes.append("No measurable difference in time to the model as it is.")
    return tuple(notes)
