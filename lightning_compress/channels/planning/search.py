"""Searches for what stays of each group, so that a budget is met, and makes a plan of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lightning_compress.channels.planning.budget import Limits, Sizes, choose
from lightning_compress.channels.planning.importance import rank
from lightning_compress.channels.planning.plan import PlanRow, RemovalPlan, Totals
from lightning_compress.channels.planning.recipe import Recipe
from lightning_compress.channels.tracing.groups import DependencyGroups, Group
from lightning_compress.channels.tracing.verify import Subject
from lightning_compress.errors import CompressionError, invalid
from lightning_compress.modules.latency import latency_ratio
from lightning_compress.modules.paths import named_tensors
from lightning_compress.targets import Targets, matches


@dataclass(frozen=True)
class Progress:
    """What was removed before; budgets are fractions of what there was at first.

    Attributes:
        params: the fraction of the parameters that remains so far.
        macs: of the multiply-accumulates.
        channels: of the channels that may leave.
        widths: channels that each group had, by its name.
    """

    params: float = 1.0
    macs: float = 1.0
    channels: float = 1.0
    widths: Mapping[str, int] = field(default_factory=dict)

    def after(self, plan: RemovalPlan) -> Progress:
        """Where a plan leads."""
        fractions = {
            name: getattr(self, name) * getattr(plan.after, name) / max(getattr(plan.before, name), 1)
            for name in ("params", "macs", "channels")
        }
        return Progress(**fractions, widths={**{row.layers[0]: row.before for row in plan.rows}, **self.widths})

    def overall(self, plan: RemovalPlan) -> RemovalPlan:
        """The plan that led here, as seen from where it all began."""
        rows = tuple(replace(row, before=self.widths.get(row.layers[0], row.before)) for row in plan.rows)
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
    groups, fixed = removable(subject.model, groups, recipe)
    while True:
        search = _Search(subject, groups, recipe, progress, carried)
        keep, latency = search.meet()
        failures = _failures(subject, groups, keep)
        if not failures:
            return search.plan(keep, fixed, latency)
        fixed = {**fixed, **{groups.all[number].name: reason for number, reason in failures.items()}}
        groups = groups.only([number for number in range(len(groups.all)) if number not in failures])
        _require_groups(subject.model, groups, fixed)


def _failures(subject: Subject, groups: DependencyGroups, keep: Sequence[Tensor]) -> dict[int, str]:
    """Return groups that can't be cut as planned, with the reason; all of them, where they only fail together."""
    together = subject.failure(groups, keep, runs=1)  # in the others every group was tried by `find_groups`
    if not together:
        return {}
    cut = [number for number, mask in enumerate(keep) if not bool(mask.all())]
    alone = {}
    for number in cut:
        only = [mask if place == number else torch.ones_like(mask) for place, mask in enumerate(keep)]
        if reason := subject.failure(groups, only):
            alone[number] = reason
    return alone or dict.fromkeys(cut, together)


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
        self._ranked = rank(self.subject.model, groups, recipe.importance, self.carried, recipe.seed)

    def _choose(self, kind: str, fraction: float) -> list[Tensor]:
        cost = getattr(self.sizes, kind)
        target = fraction * self._whole(kind)
        steps = (self.recipe.round_to,) if self.recipe.round_to else _STEPS
        goal = fraction if self.recipe.goal is None else self.recipe.goal
        even = self._even(cost, goal * self._whole(kind)) if self.recipe.scope == "global" else 0.0
        for step in steps:  # the coarsest that meets the budget
            limits = _limits(self.groups.all, self.recipe, self.progress, step, SHARE * even)
            keep = choose(self._ranked, limits, cost, target, self.recipe.scope)
            if abs(cost(keep) - target) <= _TOLERANCE[kind] * target:
                break
        return keep

    def _even(self, cost: Callable[[list[Tensor]], float], target: float) -> float:
        """The fraction of each group's original width that would meet the target, if all kept the same."""
        groups = self.groups.all
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
        rows = tuple(
            PlanRow(group.layers, group.width, round(group.width * float(mask.double().mean())), group.spanned)
            for group, mask in zip(self.groups.all, keep, strict=True)
        )
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


def removable(model: nn.Module, groups: DependencyGroups, recipe: Recipe) -> tuple[DependencyGroups, dict[str, str]]:
    """Only the groups that may lose channels, and why the others stay.

    Raises:
        CompressionError: a pattern matches nothing, or nothing can be removed.
    """
    recipe.targets.check_patterns(model)
    layers = [layer for group in groups.all for layer in group.layers]
    for pattern in recipe.overrides:
        if not any(matches(layer, pattern) for layer in layers):
            raise invalid("overrides", "match layers that can lose channels", pattern, f"These are {layers[:8]}.")
    tensors = named_tensors(model)
    refusals = [_refusal(group, recipe.targets, tensors) for group in groups.all]
    refused = {group.name: reason for group, reason in zip(groups.all, refusals, strict=True) if reason}
    groups = groups.only([number for number, reason in enumerate(refusals) if not reason])
    fixed = {**groups.fixed, **refused}
    _require_groups(model, groups, fixed)
    return groups, fixed


def _require_groups(model: nn.Module, groups: DependencyGroups, fixed: Mapping[str, str]) -> None:
    if not groups.all:
        reasons = "; ".join(f"{layer}: {reason}" for layer, reason in list(fixed.items())[:6])
        raise CompressionError(
            f"`model` must have channels that can be removed. Received: {type(model).__name__}, where everything stays "
            f"whole: {reasons or 'no layer was called'}."
        )


def _refusal(group: Group, targets: Targets, tensors: Mapping[str, Tensor]) -> str:
    for layer in group.layers:
        if reason := targets.leaves_out(layer):
            return reason
    makers = [tensors[member.name] for member in group.members if member.makes]
    if any(isinstance(tensor, nn.Parameter) and tensor.dim() > 1 and not tensor.requires_grad for tensor in makers):
        return "frozen"
    owners = {member.name.rpartition(".")[0] for member in group.members}
    if group.spanned and not owners & set(targets.include or ()):
        return f"{group.spanned}; name a layer of it exactly in targets.include to cut it all the same, approximately"
    return ""


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
        units = units if group.width == group.size and original > units else 1
        exactly = None
        for pattern, fraction in recipe.overrides.items():
            if any(matches(layer, pattern) for layer in group.layers):
                exactly = min(group.size, max(1, round(fraction * original)))
        least = min(group.size, max(1, math.ceil(max(recipe.min_layer_channels, share) * original), units))
        most = group.size if group.size == original else max(least, group.size // units * units)
        limits.append(Limits(least, most, units, exactly))
    return limits
