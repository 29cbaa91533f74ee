"""Searches for what stays of each group, so that a budget is met, and makes a plan of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_compress.channels.planning.blocks import Changes, best_count, cheapest_first
from lightning_compress.channels.planning.budget import Limits, Sizes, choose, lies_in
from lightning_compress.channels.planning.importance import rank
from lightning_compress.channels.planning.plan import PlanRow, RemovalPlan, Totals
from lightning_compress.channels.planning.recipe import Recipe
from lightning_compress.channels.planning.removable import removable, require_groups
from lightning_compress.channels.tracing.groups import DependencyGroups, Group
from lightning_compress.channels.tracing.verify import Subject
from lightning_compress.modules.latency import latency_ratio
from lightning_compress.modules.paths import is_below
from lightning_compress.targets import matches


@dataclass(frozen=True)
class Progress:
    """What was removed before; budgets are fractions of what there was at first.

    Attributes:
        params: the fraction of the parameters that remains so far.
        macs: of the multiply-accumulates.
        channels: of the channels that may leave.
        widths: channels that each group had, by its name.
        blocks: blocks that have left, and what takes their places.
    """

    params: float = 1.0
    macs: float = 1.0
    channels: float = 1.0
    widths: Mapping[str, int] = field(default_factory=dict)
    blocks: Mapping[str, str] = field(default_factory=dict)

    def after(self, plan: RemovalPlan) -> Progress:
        """Where a plan leads."""
        fractions = {
            name: getattr(self, name) * getattr(plan.after, name) / max(getattr(plan.before, name), 1)
            for name in ("params", "macs", "channels")
        }
        widths = {**{row.layers[0]: row.before for row in plan.rows if not row.block}, **self.widths}
        blocks = {row.layers[0]: row.block for row in plan.rows if row.block}
        return Progress(**fractions, widths=widths, blocks={**self.blocks, **blocks})

    def overall(self, plan: RemovalPlan) -> RemovalPlan:
        """The plan that led here, as seen from where it all began."""
        channels = [row for row in plan.rows if not row.block]
        rows = tuple(replace(row, before=self.widths.get(row.layers[0], row.before)) for row in channels)
        rows += tuple(PlanRow((path,), 1, 0, block=kind) for path, kind in self.blocks.items())
        whole = {
            name: round(getattr(plan.after, name) / getattr(self, name)) for name in ("params", "macs", "channels")
        }
        return replace(plan, rows=rows, before=Totals(**whole))


def make_plan(
    subject: Subject,
    groups: DependencyGroups,
    recipe: Recipe,
    carried: Mapping[str, Tensor],
    progress: Progress = Progress(),
) -> RemovalPlan:
    """Make a plan for the groups that `find_groups` found; it is verified before it is returned.

    Raises:
        CompressionError: nothing can be removed.
    """
    groups, fixed = removable(subject, groups, recipe)
    while True:
        search = _Search(subject, groups, recipe, progress, carried)
        keep, latency = search.meet()
        failures = _failures(subject, groups, keep)
        if not failures:
            return search.plan(keep, fixed, latency)
        fixed = {**fixed, **{groups.all[number].name: reason for number, reason in failures.items()}}
        groups = groups.only([number for number in range(len(groups.all)) if number not in failures])
        require_groups(subject.model, groups, fixed)


def _failures(subject: Subject, groups: DependencyGroups, keep: Sequence[Tensor]) -> dict[int, str]:
    """Return groups that can't be cut as planned, with the reason; all of them, where they only fail together."""
    cut = [number for number, mask in enumerate(keep) if not bool(mask.all())]
    blocks = [number for number in cut if groups.all[number].skip]
    together = ""
    if len(blocks) < len(cut):
        widths = [torch.ones_like(mask) if number in blocks else mask for number, mask in enumerate(keep)]
        together = subject.failure(groups, widths, runs=1)  # in the others every group was tried by `find_groups`
    if blocks:
        together = together or subject.failure(groups, keep)
    if not together:
        return {}
    alone = {}
    for number in cut:
        only = [mask if place == number else torch.ones_like(mask) for place, mask in enumerate(keep)]
        if reason := subject.failure(groups, only):
            alone[number] = reason
    return alone or dict.fromkeys(blocks or cut, together)


@dataclass
class _Search:
    subject: Subject
    groups: DependencyGroups
    recipe: Recipe
    progress: Progress
    carried: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        groups, recipe = self.groups.all, self.recipe
        self.sizes = Sizes(self.groups)
        self.every = [torch.ones(group.size, dtype=torch.bool) for group in groups]
        self._widths = [group for group in groups if not group.skip]
        self._ranked = rank(self.subject.model, self._widths, recipe.importance, self.carried, recipe.seed)
        self._blocks = list(range(len(self._widths), len(groups)))
        self._changes = Changes(self.subject, self.groups) if self._blocks else None

    def _choose(self, kind: str, fraction: float) -> list[Tensor]:
        """What stays: without the blocks by which the goal costs least, and on the way to it, they leave first."""
        goal = fraction if self.recipe.goal is None else self.recipe.goal
        cost, target = getattr(self.sizes, kind), fraction * self._whole(kind)
        without = list[int]()
        for number in self._blocks_for(kind, goal):
            if goal == fraction or cost(self._kept_without(without)) > target:
                without.append(number)
        if goal != fraction and cost(kept := self._kept_without(without)) <= target:
            return kept
        return self._narrowed(kind, fraction, without)

    def _blocks_for(self, kind: str, fraction: float) -> list[int]:
        """The blocks without which, and without channels to meet the budget, the outputs change least."""
        if (changes := self._changes) is None:
            return []
        cost, target = getattr(self.sizes, kind), fraction * self._whole(kind)
        order = self._order(changes, cost, (1 - _TOLERANCE[kind]) * target)
        reached = cost(self._narrowed(kind, fraction, order))
        if reached > (1 + _TOLERANCE[kind]) * target:  # channels can't make up the rest: one more block may come nearer
            order = self._order(changes, cost, 2 * target - reached)

        def loss(count: int) -> tuple[float, float]:
            keep = self._narrowed(kind, fraction, order[:count])
            missed = abs(cost(keep) / target - 1)
            return missed if missed > _TOLERANCE[kind] else 0.0, changes.by(keep)

        names = {number: self.groups.all[number].name for number in order[: best_count(len(order), loss)]}
        return [n for n, name in names.items() if not any(is_below(name, other) for other in names.values())]

    def _order(self, changes: Changes, cost: Callable[[list[Tensor]], float], least: float) -> list[int]:
        return cheapest_first(changes, self._blocks, lambda gone: cost(self._kept_without(gone)), least)

    def _kept_without(self, blocks: Sequence[int]) -> list[Tensor]:
        return [torch.zeros_like(mask) if number in blocks else mask for number, mask in enumerate(self.every)]

    def _narrowed(self, kind: str, fraction: float, without: Sequence[int]) -> list[Tensor]:
        """What stays of each group if some blocks leave, and channels of all others."""
        masks = self._kept_without(without)[len(self._widths) :]
        whole = getattr(self.sizes, kind)

        def cost(widths: list[Tensor]) -> float:
            return float(whole([*widths, *masks]))

        target = fraction * self._whole(kind)
        steps = (self.recipe.round_to,) if self.recipe.round_to else _STEPS
        goal = fraction if self.recipe.goal is None else self.recipe.goal
        measured = self.recipe.importance.needs_batches
        even = 0.0 if measured or self.recipe.scope == "layer" else self._even(cost, goal * self._whole(kind))
        share = self._share(cost, target, even)
        names = [self.groups.all[number].name for number in without]
        ranked, keep = self._by_cost(whole) if measured else self._ranked, list[Tensor]()
        for step in steps if self._widths else ():  # the coarsest that meets the budget
            limits = _limits(self._widths, self.recipe, self.progress, step, share)
            for number, group in enumerate(self._widths):
                if any(lies_in(group, name) for name in names):
                    limits[number] = Limits(group.size, group.size, 1)
            keep = choose(ranked, limits, cost, target, self.recipe.scope)
            if abs(cost(keep) - target) <= _TOLERANCE[kind] * target:
                break
        return [*keep, *masks]

    def _by_cost(self, whole: Callable[[list[Tensor]], float]) -> list[Tensor]:
        """Scores over what leaves with one unit."""
        everything, ranked = whole(self.every), list[Tensor]()
        for number, scores in enumerate(self._ranked):
            without = [mask.clone() for mask in self.every]
            without[number][0] = False
            ranked.append(scores / max(everything - whole(without), 1e-9))
        return ranked

    def _even(self, cost: Callable[[list[Tensor]], float], target: float) -> float:
        """The fraction of each group's original width that would meet the target, if all kept the same."""
        groups = self._widths
        limits = _limits(groups, self.recipe, self.progress, 1, 0.0)
        low, high = 0.0, 1.0
        for _ in range(20):
            middle = (low + high) / 2
            masks = [
                torch.arange(group.size)
                < (round(middle * _original(group, self.progress)) if limit.exactly is None else limit.exactly)
                for group, limit in zip(groups, limits, strict=True)
            ]
            low, high = (middle, high) if cost(masks) <= target else (low, middle)
        return low

    def _share(self, cost: Callable[[list[Tensor]], float], target: float, even: float) -> float:
        """The fraction of its width that each group keeps at least: less where else the target is out of reach."""
        for part in (SHARE, SHARE / 2, SHARE / 4):
            limits = _limits(self._widths, self.recipe, self.progress, 1, part * even)
            least = [limit.least if limit.exactly is None else limit.exactly for limit in limits]
            groups = zip(self._widths, least, strict=True)
            if cost([torch.arange(group.size) < count for group, count in groups]) <= target:
                return part * even
        return 0.0

    def _whole(self, kind: str) -> float:
        """What there was before anything was removed."""
        now: float = getattr(self.sizes, kind)(self.every)
        return now / float(getattr(self.progress, kind))

    def meet(self) -> tuple[list[Tensor], float | None]:
        """What stays of each group, and the measured latency if the budget is one."""
        kind, fraction = self.recipe.budget.kind, self.recipe.budget.fraction
        if kind != "latency":
            return self._choose(kind, fraction), None
        low, high, wanted = 0.0, 1.0, fraction  # of the multiply-accumulates
        found = list[tuple[float, float, list[Tensor]]]()
        for _ in range(_MEASUREMENTS):
            keep = self._choose("macs", wanted)
            cut = self.subject.cut(self.groups, keep)
            ratio = latency_ratio(self.subject.model, cut, self.subject.runs[0])
            found.append((abs(ratio - fraction), ratio, keep))
            if found[-1][0] <= 0.03 * fraction:
                break
            low, high = (low, wanted) if ratio > fraction else (wanted, high)
            wanted = (low + high) / 2
        _, ratio, keep = min(found, key=lambda trial: trial[0])
        return keep, ratio

    def plan(self, keep: list[Tensor], fixed: Mapping[str, str], latency: float | None) -> RemovalPlan:
        """The plan that keeps this."""
        sizes, samples = self.sizes, self.subject.samples
        before, after = (
            Totals(round(sizes.params(masks)), round(sizes.macs(masks) / samples), round(sizes.channels(masks)))
            for masks in (self.every, keep)
        )
        left = [group for group, mask in zip(self.groups.all, keep, strict=True) if group.skip and not bool(mask.all())]
        rows = tuple(
            PlanRow(group.layers, group.width, round(group.width * float(mask.double().mean())), group.spanned)
            for group, mask in zip(self._widths, keep, strict=False)
            if not any(lies_in(group, block.name) for block in left)
        )
        rows += tuple(PlanRow(block.layers, 1, 0, block=str(block.skip[0])) for block in left)
        return RemovalPlan(
            rows,
            fixed,
            before,
            after,
            self._missed(keep, latency),
            latency,
            self.groups.kept_slices(keep),
            self.groups.numbers(keep),
            self.groups.shapes,
        )

    def _missed(self, keep: list[Tensor], latency: float | None) -> str:
        kind, wanted = self.recipe.budget.kind, self.recipe.budget.fraction
        reached = getattr(self.sizes, kind)(keep) / self._whole(kind) if latency is None else latency
        if abs(reached - wanted) <= _TOLERANCE[kind] * wanted:
            return ""
        return (
            f"The budget is missed: {kind}={wanted} was asked for, {reached:.3f} is nearest. Allow more with "
            "`min_layer_channels`, `round_to` or `targets`, or ask for less to go."
        )


_MEASUREMENTS = 7
_STEPS = (8, 4, 2, 1)
"""Kernels work in blocks of eight channels; a coarse step that misses the budget is made finer."""
_TOLERANCE = {"params": 0.02, "macs": 0.02, "latency": 0.1, "channels": 0.02}


SHARE = 0.75
"""Ranked together, no group keeps less than this part of what it would keep in the end if all kept the same fraction:
how far scores spread depends on a layer's fan-in more than on what it is worth. ``benchmarks/defaults.md`` has figures.
"""


def _original(group: Group, progress: Progress) -> int:
    """The units that a group had at first."""
    return round(group.size * progress.widths.get(group.name, group.width) / group.width)


def _limits(groups: Sequence[Group], recipe: Recipe, progress: Progress, step: int, share: float) -> list[Limits]:
    limits = []
    for group in groups:
        original = _original(group, progress)
        units = step if recipe.round_to or original >= 4 * step else 1
        units = units if group.width <= 2 * group.size and original > units else 1  # a gate stands beside its channel
        exactly = None
        for pattern, fraction in recipe.overrides.items():
            if any(matches(layer, pattern) for layer in group.layers):
                exactly = min(group.size, max(1, round(fraction * original)))
        least = min(group.size, max(1, math.ceil(max(recipe.min_layer_channels, share) * original), units))
        most = group.size if group.size == original else max(least, group.size // units * units)
        limits.append(Limits(least, most, units, exactly))
    return limits
