"""The rounds in which channels leave during a fit: what is due, what a round takes, and how far that has led."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, NotRequired, TypedDict

from torch import Tensor, nn

from lightning_compress.channels.planning.importance import carry_scores_, rank, resolve_importance
from lightning_compress.channels.planning.plan import RemovalPlan
from lightning_compress.channels.planning.recipe import IMPORTANCE, Budget, Recipe
from lightning_compress.channels.planning.regularize import regularize_
from lightning_compress.channels.planning.removable import removable
from lightning_compress.channels.planning.search import Progress, make_plan
from lightning_compress.channels.tracing.find_groups import find_groups
from lightning_compress.channels.tracing.groups import DependencyGroups, Group
from lightning_compress.channels.tracing.verify import Subject
from lightning_compress.messages import by_reason, named, they
from lightning_compress.modules.paths import named_tensors
from lightning_compress.schedules import OneShot, Schedule
from lightning_compress.window import Bounds, Window

Measure = Callable[[Sequence[Group]], dict[str, Tensor] | None]

_WORTH = 0.1
"""Between two removals at least this fraction of the way to the budget is gone: less isn't worth a plan."""


class ProgressState(TypedDict):
    """What a checkpoint holds of a `Progress`."""

    params: float
    macs: float
    channels: float
    widths: dict[str, int]
    blocks: NotRequired[dict[str, str]]


class RoundsState(TypedDict):
    """What a checkpoint holds of `Rounds`."""

    last: NotRequired[tuple[float, float, bool]]
    asked: float
    progress: ProgressState
    goal: float | None
    latency: float | None
    taylor: dict[str, Tensor]
    settings: dict[str, str]


class Rounds:
    """What a fit that removes channels must remember, and what it decides by that.

    Attributes:
        asked: the fraction of the way that the last round asked for.
        largest: what fraction of the way a round may be: all of it, until one has cost too much.
        given_up: whether nothing more leaves, although not all has left that was asked for.
        progress: what has left so far.
        scores: what an importance of gradients has summed since the last round: a group's name to its units' scores.
        latency: the measured fraction of the time that the whole removal leaves, where the budget is one of latency.
        missed: what keeps the budget from being met; empty if nothing does.
        plans: what each round of this fit led to, as seen from the original.
        groups: what hangs together in the module as it is now, where that is known.
        checked: whether it was checked in this fit that something can be removed.
        waiting: the progress of a round that waits for the next batch.
        batch: a batch that a round is to be planned on, and its number.
    """

    def __init__(self, recipe: Recipe, schedule: Schedule, window: Window) -> None:
        self.recipe = recipe
        self.schedule = schedule
        self.window = window
        self.reset()
        self.begin_fit()

    def reset(self) -> None:
        """Begin with another model, of which nothing has left."""
        self.asked = self._before = 0.0
        self.largest = 1.0
        self.given_up = False
        self.progress = Progress()
        self.scores: dict[str, Tensor] = {}
        self.latency: float | None = None
        self.missed = ""
        self.slower = ""
        self._macs: float | None = None

    def begin_fit(self) -> None:
        """Begin another fit, of the same model or another."""
        self.plans: list[RemovalPlan] = []
        self.checked = False
        self.end_fit()

    def end_fit(self) -> None:
        """Let go of what holds for this fit's batches."""
        self.groups: DependencyGroups | None = None
        self.waiting: float | None = None
        self.batch: tuple[Any, int] | None = None

    @property
    def is_final(self) -> bool:
        """Whether the last channels have left."""
        return self.asked >= 1.0

    @property
    def last_place(self) -> float:
        """Where in the window's unit the last channels leave."""
        end = self.window.end if self.window.end is not None else math.inf
        return self.window.start if isinstance(self.schedule, OneShot) else end

    def last_step(self, bounds: Bounds) -> int:
        """The optimizer step after which the last channels leave."""
        return bounds.start if isinstance(self.schedule, OneShot) else bounds.end

    def overlap(self, other: Window, bounds: Bounds | None, other_bounds: Bounds | None) -> str:
        """Where ``other`` is to start instead if it begins before the last channels have left; empty if it doesn't."""
        # Where both are fractions of the same, rounding to steps may cross: then quantization waits.
        if other.unit == self.window.unit:
            return f"start={self.last_place}, unit={self.window.unit!r}" if other.start < self.last_place else ""
        if bounds is None or other_bounds is None:
            return ""
        last = self.last_step(bounds)
        return f"start={last}, unit='step'" if other_bounds.start < last else ""

    def needs_groups(self, at_each_step: bool) -> bool:
        """Whether the module is to be traced now: to check it, and after each round where steps need its groups."""
        return self.groups is None and not self.is_final and (at_each_step or not self.checked)

    def trace(self, subject: Subject) -> None:
        """Find what hangs together in the module as it is now, for the first time or after a round.

        Raises:
            CompressionError: nothing can be removed: now, and not when the first channels are to leave.
        """
        self.groups = find_groups(subject)
        if not self.checked:
            removable(subject, self.groups, self.recipe)

    def use_gradients_(self, model: nn.Module, parameters: Collection[int], strength: float) -> None:
        """Sum scores of gradients, and by `regularize_` draw units of ``parameters`` (ids) to zero, before a step."""
        groups, importance = self.groups.all if self.groups else (), self.recipe.importance
        if importance.needs_gradients:
            carry_scores_(model, groups, importance, self.scores)
        if strength > 0:
            ranked = rank(model, groups, importance, self.scores, self.recipe.seed)
            regularize_(groups, named_tensors(model), ranked, strength, parameters)

    def is_due(self, progress: float | None) -> bool:
        """Whether the schedule asks for enough at this progress of the window to be worth a round."""
        asked = 0.0 if progress is None else self.schedule.value(progress, 1.0)
        # Rounded: a tenth is a hair less than that in some steps of a schedule.
        return round(asked - self.asked, 6) >= min(_WORTH, self.largest) or asked == 1.0 > self.asked

    def start(self, progress: float, step: int) -> tuple[Any, int] | None:
        """The batch that a round which is due can be planned on; None if it has to wait for the next one."""
        batch, self.batch = self.batch, None
        if batch is None or step == 0:  # the first batch shows what the model does
            self.waiting = progress
            return None
        return batch

    def take_waiting(self) -> float | None:
        """The progress of the round that has waited for a batch, once."""
        progress, self.waiting = self.waiting, None
        return progress

    def shrink(self) -> None:
        """Let rounds be half as large as the last one, which has cost too much."""
        if self.asked > self._before:
            self.largest = (self.asked - self._before) / 2

    def plan(
        self, subject: Subject, progress: float, step: int, agree: Callable[[Any], Any], measure: Measure | None = None
    ) -> RemovalPlan:
        """Decide what leaves now: a part of the way from the original to the budget.

        Seeds differ by ``step`` from round to round; ``agree`` gives all ranks the first one's value; ``measure`` gives
        the scores of an importance that is measured on batches, None where there are no batches: then weights decide.
        """
        self._before, self.checked = self.asked, True
        self.asked = min(self.schedule.value(progress, 1.0), self.asked + self.largest)
        groups = find_groups(subject)
        recipe = self.recipe
        if recipe.importance.needs_batches:
            scores = None if measure is None else measure(groups.all)
            if scores is None:
                recipe = replace(recipe, importance=resolve_importance(IMPORTANCE))
            self.scores = scores or {}
        if recipe.budget.kind == "latency":
            if self._macs is None:
                timed = make_plan(subject, groups, recipe, self.scores, self.progress)
                self._macs = agree(timed.after.macs / timed.before.macs)
                self.latency, self.missed = timed.latency, timed.missed
            recipe = replace(recipe, budget=Budget("macs", self._macs))
        overrides = {pattern: self._on_the_way(final) for pattern, final in recipe.overrides.items()}
        budget = replace(recipe.budget, fraction=self._on_the_way(recipe.budget.fraction))
        goal, seed = recipe.budget.fraction, recipe.seed + step
        # Steps are for the end: a round takes less than one from most layers.
        round_to = recipe.round_to if self.is_final else 1
        recipe = replace(recipe, budget=budget, goal=goal, overrides=overrides, seed=seed, round_to=round_to)
        plan = make_plan(subject, groups, recipe, self.scores, self.progress)
        return agree(replace(plan, latency=self.latency))  # type: ignore[no-any-return]

    def _on_the_way(self, final: float) -> float:
        return final if self.is_final else 1.0 - self.asked * (1.0 - final)

    def advance(self, plan: RemovalPlan) -> None:
        """Note that a plan is carried out."""
        self.progress = self.progress.after(plan)
        self.plans.append(self.progress.overall(plan))
        self.groups, self.scores = None, {}
        if self.is_final:
            self.missed = self.missed or plan.missed

    @property
    def logged(self) -> str:
        """What the remaining fraction is logged of."""
        kind = self.recipe.budget.kind
        return "macs" if kind == "latency" else kind

    @property
    def remaining(self) -> float:
        """The fraction of the original that is logged."""
        return float(getattr(self.progress, self.logged))

    def outcome(self, step: int) -> list[str]:
        """What the last round led to, line by line."""
        head = f"ChannelPruning, after step {step}:"
        if not self.is_final:
            return [f"{head} remaining_{self.logged} is {self.remaining:.3f}."]
        return [f"{head} {'; '.join(self.plans[-1].totals())}", *self.plans[-1].lines()]

    def notes(self) -> list[str]:
        """Lines for the report: what was cut approximately, what stays whole and why, what was missed."""
        notes = []
        if self.plans:
            last = self.plans[-1]
            spanned = [row.layers[0] for row in last.rows if row.approximate and row.after < row.before]
            if spanned:
                notes.append(f"ChannelPruning cut {named(spanned)} approximately: a norm spans its width.")
            if gone := [row.layers[0] for row in last.rows if row.block]:
                notes.append(f"{they(gone, 'has', 'have')} left whole.")
            whole = by_reason({layer: why for layer, why in last.fixed.items() if why != "an output"})
            notes += [f"{they(layers, 'keeps its', 'keep their')} width: {why}" for why, layers in whole.items()]
        if self.latency is not None:
            notes.append(f"ChannelPruning: a forward pass took {self.latency:.2f} of its time when this was planned.")
        notes += [self.slower] if self.slower else []
        return [*notes, f"ChannelPruning: {self.missed}"] if self.missed else notes

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold: plain data."""
        # What is known of the last round matters as long as another may follow.
        last = [self._before, self.largest, self.given_up]
        return {
            **({} if self.is_final or last == [0.0, 1.0, False] else {"last": last}),
            "asked": self.asked,
            "progress": asdict(self.progress),
            "goal": self._macs,
            "latency": self.latency,
            "taylor": self.scores,
            "settings": self.settings,
        }

    @property
    def settings(self) -> dict[str, str]:
        """What a checkpoint's progress holds for."""
        return {"budget": repr(self.recipe.budget), "schedule": repr(self.schedule), "window": repr(self.window)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.asked = state["asked"]
        self._before, self.largest, self.given_up = state.get("last", (0.0, 1.0, False))
        self.progress = Progress(**state["progress"])
        self._macs, self.latency, self.scores = state["goal"], state["latency"], dict(state["taylor"])

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "groups": None, "batch": None}
