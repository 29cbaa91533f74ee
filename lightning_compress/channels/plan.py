"""`plan_removal`: which channels go, decided before anything is touched."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_compress.channels.budget import Budget, Limits, Scope, Sizes, choose, make_budget
from lightning_compress.channels.explore import explore
from lightning_compress.channels.groups import Group, Run, Structure
from lightning_compress.channels.importance import check_importance, rank, taylor_step
from lightning_compress.channels.remove import check_shapes, cut_, modules_of, named_tensors
from lightning_compress.channels.slices import followed, kept_slices
from lightning_compress.channels.steady import steady
from lightning_compress.channels.trial import Subject
from lightning_compress.channels.turns import latency_ratio
from lightning_compress.errors import CompressionError, invalid
from lightning_compress.inputs import bind_example
from lightning_compress.optimizers import Kept, resize_state_
from lightning_compress.quantization import forms
from lightning_compress.quantization.calls import copy_module
from lightning_compress.targets import Targets, matches


@dataclass(frozen=True)
class PlanRow:
    """One group of layers in a plan.

    Attributes:
        layers: paths of the layers that make these channels.
        before: channels now.
        after: channels that stay.
        approximate: what is computed across them, if something is: what stays computes something else then.
    """

    layers: tuple[str, ...]
    before: int
    after: int
    approximate: str = ""


@dataclass(frozen=True)
class Totals:
    """What a model costs on the example inputs."""

    params: int
    macs: int
    channels: int


@dataclass(frozen=True)
class RemovalPlan:
    """Which slices of which tensors stay. Print it before you apply it.

    Attributes:
        rows: what shrinks.
        fixed: layers that stay whole, with the reason.
        before: totals of the model that it was planned for.
        after: totals once it is applied.
        missed: what keeps the budget from being met within its tolerance; empty if nothing does.
        latency: measured time of a run after over before, where the budget is one of latency.
        kept: tensor name to what stays along its dimensions.
        numbers: ``path.name`` of attributes that follow, with their new values.
        shapes: of the tensors that it was planned for.
    """

    rows: tuple[PlanRow, ...]
    fixed: Mapping[str, str]
    before: Totals
    after: Totals
    missed: str
    latency: float | None
    kept: Mapping[str, Kept]
    numbers: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]

    def __str__(self) -> str:
        shown = [(_names(row.layers), f"{row.before} -> {row.after}", _mark(row)) for row in self.rows]
        width = max((len(name) for name, _, _ in shown), default=0)
        middle = max((len(count) for _, count, _ in shown), default=0)
        lines = [f"{name:<{width}}  {count:>{middle}}{mark}" for name, count, mark in shown]
        lines += [f"stays whole: {layer}: {reason}" for layer, reason in self.fixed.items()]
        for name in ("channels", "params", "macs"):
            old, new = getattr(self.before, name), getattr(self.after, name)
            lines.append(f"{name}: {old:,} -> {new:,} ({new / max(old, 1):.3f})")
        if self.latency is not None:
            lines.append(f"latency: {self.latency:.3f} of before, measured")
        return "\n".join([*lines, self.missed] if self.missed else lines)


def _names(layers: tuple[str, ...]) -> str:
    return ", ".join(layers[:3]) + (f" and {len(layers) - 3} more" if len(layers) > 3 else "")


def _mark(row: PlanRow) -> str:
    return f"  (approximate: {row.approximate})" if row.approximate and row.after < row.before else ""


@dataclass(frozen=True)
class Recipe:
    """How channels are chosen; the arguments of `plan_removal`, checked."""

    budget: Budget
    importance: str
    scope: Scope
    targets: Targets
    overrides: Mapping[str, float]
    min_layer_channels: float
    round_to: int | None
    seed: int


def make_recipe(
    channels: float | None,
    params: float | None,
    macs: float | None,
    latency: float | None,
    importance: str,
    scope: Scope,
    targets: Targets,
    overrides: Mapping[str, float] | None,
    min_layer_channels: float,
    round_to: int | None,
    seed: int,
) -> Recipe:
    """The recipe of these arguments.

    Raises:
        CompressionError: one of them is out of range.
    """
    budget = make_budget({"channels": channels, "params": params, "macs": macs, "latency": latency})
    check_importance(importance)
    if scope not in ("global", "layer"):
        raise invalid("scope", "be 'global' or 'layer'", scope)
    if not isinstance(targets, Targets):
        raise invalid("targets", "be a Targets", targets, "Such as Targets(exclude=['head']).")
    if not isinstance(overrides or {}, Mapping) or not all(map(_is_fraction, (overrides or {}).values())):
        raise invalid("overrides", "map patterns to fractions that remain, in (0, 1]", overrides)
    if min_layer_channels != 0 and not _is_fraction(min_layer_channels):
        raise invalid("min_layer_channels", "lie in [0, 1]", min_layer_channels, "It is the fraction that stays.")
    if round_to is not None and (type(round_to) is not int or round_to < 1):
        raise invalid("round_to", "be a whole number, at least 1", round_to, "1 keeps any number of channels.")
    if type(seed) is not int:
        raise invalid("seed", "be a whole number", seed)
    return Recipe(budget, importance, scope, targets, overrides or {}, min_layer_channels, round_to, seed)


def _is_fraction(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0.0 < value <= 1.0


def plan_removal(
    model: nn.Module,
    inputs: Any = None,
    *,
    channels: float | None = None,
    params: float | None = None,
    macs: float | None = None,
    latency: float | None = None,
    importance: str = "l2",
    scope: Scope = "global",
    targets: Targets | None = None,
    overrides: Mapping[str, float] | None = None,
    min_layer_channels: float = 0.1,
    round_to: int | None = None,
    seed: int = 0,
) -> RemovalPlan:
    """Decide which channels, neurons, heads and hidden widths of ``model`` go, so that a budget is met.

    The model is traced on a copy, so that what hangs together goes together: the layers of a residual sum, a
    convolution and its BatchNorm, the rows of queries, keys and values of a head. What must keep its size is found
    too, and stays: outputs, what meets the inputs, what the code writes as a number. Each group is tried on a copy:
    without its channels the model computes what it computes with zeros in their place.

    Args:
        model: any module; nothing of it is changed.
        inputs: example inputs of the real shape: a tensor, a tuple of arguments, a dict of keywords; by default the
            model's ``example_input_array``.
        channels: budget: the fraction of the channels that remains.
        params: budget: the fraction of the parameters that remains.
        macs: budget: the fraction of the multiply-accumulates on ``inputs`` that remains.
        latency: budget: the fraction of the time of a run on ``inputs`` that remains, measured here and now.
        importance: ``l1``, ``l2``, ``batchnorm``, ``taylor`` (call ``loss.backward()`` before), ``fpgm``, ``random``:
            see `rank`.
        scope: ``global`` ranks the channels of all layers together, ``layer`` takes the same fraction of each.
        targets: which layers; by default all that can lose channels and are trained. A width that a norm spans
            (LayerNorm, GroupNorm) is cut only if ``include`` names one of its layers exactly, as that is approximate.
        overrides: pattern of layers' paths to the fraction of their channels that remains; the last match wins.
        min_layer_channels: no layer keeps a smaller fraction of its channels.
        round_to: keep a multiple of this in each layer; by default of 8 in layers of 32 channels and more, or of less
            where that misses the budget.
        seed: of ``importance="random"``.

    Returns:
        The plan; print it, then apply it with `remove_channels_`.

    Raises:
        CompressionError: bad arguments, or nothing can be removed; the reasons are listed.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> plan = plan_removal(model, torch.ones(1, 8), channels=0.5)
        >>> print(plan)
        0  16 -> 8
        stays whole: 2: an output
        channels: 16 -> 8 (0.500)
        params: 178 -> 90 (0.506)
        macs: 160 -> 80 (0.500)
        >>> remove_channels_(model, plan)
        >>> model
        Sequential(
          (0): Linear(in_features=8, out_features=8, bias=True)
          (1): ReLU()
          (2): Linear(in_features=8, out_features=2, bias=True)
        )
    """
    recipe = make_recipe(channels, params, macs, latency, importance, scope, targets or Targets(), overrides,
                         min_layer_channels, round_to, seed)  # fmt: skip
    example = getattr(model, "example_input_array", None) if inputs is None else inputs
    if example is None:
        raise invalid("inputs", "be example inputs", None, "Pass a tensor, or set model.example_input_array.")
    check_module(model)
    args, kwargs = bind_example(example, next((one.device for one in model.parameters()), None))
    with torch.inference_mode(False):
        subject = Subject(model, _runs(model, args, kwargs))
        structure = explore(subject)
    tensors = named_tensors(model)
    taylor = dict[str, Tensor]()
    if importance == "taylor":
        taylor_step(structure.groups, tensors, taylor)
        if not taylor:
            raise CompressionError(
                "`importance='taylor'` must have gradients. Received: none. Call loss.backward() before."
            )
    return make_plan(subject, structure, recipe, taylor)


def check_module(model: nn.Module) -> None:
    """Raise for a module whose channels can't be followed at all."""
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise CompressionError(f"`model` must be of Python code. Received: {path or 'a model'} that is scripted.")
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise CompressionError(
                f"`{name}` must have its shape. Received: a lazy layer that hasn't run yet. Run one forward pass."
            )
    if forms.form_of(model) != "float":
        raise CompressionError(
            f"`model` must be float. Received: a {forms.form_of(model)} one. Remove channels before you quantize."
        )


def _runs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Run]:
    """Evaluation, and training too if the model runs in it: both must go on working."""

    def evaluate(twin: nn.Module) -> Any:
        twin.eval()  # which need not return the module
        return twin(*args, **kwargs)

    def train(twin: nn.Module) -> Any:
        twin.train()
        return twin(*args, **kwargs)

    twin = copy_module(model)
    try:
        with steady():
            evaluate(twin)
    except Exception as error:  # it is the user's
        raise CompressionError(
            f"`inputs` must be what {type(model).__name__} runs on. Received: {type(error).__name__}: {error}."
        ) from error
    try:
        with steady():
            train(twin)
    except Exception:
        return [evaluate]  # it wants targets too, or a BatchNorm gets a single value
    return [evaluate, train]


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


def make_plan(
    subject: Subject,
    structure: Structure,
    recipe: Recipe,
    taylor: Mapping[str, Tensor],
    progress: Progress = Progress(),
) -> RemovalPlan:
    """A plan for a structure that is known, tried before it is returned.

    Args:
        subject: the model, and how it is called; a latency budget times its first run.
        structure: as `explore` found it.
        recipe: what is wanted.
        taylor: as `taylor_step` carried it along.
        progress: what was removed before.

    Raises:
        CompressionError: nothing can be removed.
    """
    structure, fixed = _selected(subject.model, structure, recipe)
    while True:
        if not structure.groups:
            reasons = "; ".join(f"{layer}: {reason}" for layer, reason in list(fixed.items())[:6])
            raise CompressionError(
                f"`model` must have channels that can be removed. Received: {type(subject.model).__name__}, where "
                f"everything stays whole: {reasons or 'no layer was called'}."
            )
        search = _Search(subject, structure, recipe, progress, taylor)
        keep, latency = search.meet()
        faulty = _faulty(subject, structure, keep)
        if not faulty:
            return search.plan(keep, fixed, latency)
        fixed = {**fixed, **{structure.groups[number].name: reason for number, reason in faulty.items()}}
        structure = structure.only([number for number in range(len(structure.groups)) if number not in faulty])


def _faulty(subject: Subject, structure: Structure, keep: Sequence[Tensor]) -> dict[int, str]:
    """The groups that can't be cut as planned, with the reason; all that are cut, where only together they can't."""
    together = subject.fault(structure, keep, runs=1)  # in the others every group was tried by `explore`
    if not together:
        return {}
    cut = [number for number, kept in enumerate(keep) if not bool(kept.all())]
    alone = {}
    for number in cut:
        only = [kept if place == number else torch.ones_like(kept) for place, kept in enumerate(keep)]
        if reason := subject.fault(structure, only):
            alone[number] = reason
    return alone or dict.fromkeys(cut, together)


class _Search:
    def __init__(
        self, subject: Subject, structure: Structure, recipe: Recipe, progress: Progress, taylor: Mapping[str, Tensor]
    ) -> None:
        self.subject = subject
        self.structure = structure
        self.recipe = recipe
        self.progress = progress
        self.sizes = Sizes(structure, structure.macs)
        self.every = [torch.ones(group.size, dtype=torch.bool) for group in structure.groups]
        model = subject.model
        self._ranked = rank(
            structure.groups, named_tensors(model), modules_of(model), recipe.importance, taylor, recipe.seed
        )

    def meet(self) -> tuple[list[Tensor], float | None]:
        """What stays of each group, and the measured latency if the budget is one."""
        budget = self.recipe.budget
        if budget.kind != "latency":
            return self._choose(budget.kind, budget.fraction), None
        return self._meet_latency(budget.fraction)

    def _choose(self, kind: str, fraction: float) -> list[Tensor]:
        cost = getattr(self.sizes, kind)
        target = fraction * self._whole(kind)
        steps = (self.recipe.round_to,) if self.recipe.round_to else _STEPS
        for step in steps:  # the coarsest that meets the budget
            limits = _limits(self.structure.groups, self.recipe, self.progress, step)
            keep = choose(self._ranked, limits, cost, target, self.recipe.scope)
            if abs(cost(keep) - target) <= _TOLERANCE[kind] * target:
                break
        return keep

    def _whole(self, kind: str) -> float:
        """What there was before anything was removed."""
        now: float = getattr(self.sizes, kind)(self.every)
        return now / float(getattr(self.progress, kind))

    def _meet_latency(self, fraction: float) -> tuple[list[Tensor], float]:
        """Look for the multiply-accumulates at which the measured time is what is wanted."""
        low, high, wanted = 0.0, 1.0, fraction
        found = list[tuple[float, float, list[Tensor]]]()
        for _ in range(_MEASUREMENTS):
            keep = self._choose("macs", wanted)
            cut = self.subject.cut(self.structure, keep)
            ratio = latency_ratio(self.subject.model, cut, self.subject.runs[0])
            found.append((abs(ratio - fraction), ratio, keep))
            if found[-1][0] <= 0.03 * fraction:
                break
            low, high = (low, wanted) if ratio > fraction else (wanted, high)
            wanted = (low + high) / 2
        _, ratio, keep = min(found, key=lambda one: one[0])
        return keep, ratio

    def plan(self, keep: list[Tensor], fixed: Mapping[str, str], latency: float | None) -> RemovalPlan:
        """The plan that keeps this."""
        sizes = self.sizes
        before, after = (
            Totals(round(sizes.params(masks)), round(sizes.macs(masks)), round(sizes.channels(masks)))
            for masks in (self.every, keep)
        )
        rows = tuple(
            PlanRow(group.layers, group.width, round(group.width * float(mask.double().mean())), group.spanned)
            for group, mask in zip(self.structure.groups, keep, strict=True)
        )
        return RemovalPlan(
            rows,
            fixed,
            before,
            after,
            self._missed(after, latency),
            latency,
            kept_slices(self.structure, keep),
            followed(self.structure, keep),
            self.structure.shapes,
        )

    def _missed(self, after: Totals, latency: float | None) -> str:
        kind, wanted = self.recipe.budget.kind, self.recipe.budget.fraction
        reached = latency if kind == "latency" else getattr(after, kind) / self._whole(kind)
        tolerance = _TOLERANCE[kind]
        if reached is None or abs(reached - wanted) <= tolerance * wanted:
            return ""
        return (
            f"The budget is missed: {kind}={wanted} was asked for, {reached:.3f} is nearest. Allow more with "
            "`min_layer_channels`, `round_to` or `targets`, or ask for less to go."
        )


_MEASUREMENTS = 7
_STEPS = (8, 4, 2, 1)
"""Kernels work in blocks of eight channels; a coarse step that misses the budget is made finer."""
_TOLERANCE = {"params": 0.02, "macs": 0.02, "latency": 0.1, "channels": 0.02}


def _selected(model: nn.Module, structure: Structure, recipe: Recipe) -> tuple[Structure, dict[str, str]]:
    """The structure with only the groups that may lose channels, and why the others stay."""
    recipe.targets.check_patterns(model)
    check_patterns(recipe.overrides, structure)
    tensors = named_tensors(model)
    keep, fixed = [], dict(structure.fixed)
    for number, group in enumerate(structure.groups):
        reason = _refusal(group, recipe.targets, tensors)
        if reason:
            fixed[group.name] = reason
        else:
            keep.append(number)
    return structure.only(keep), fixed


def check_patterns(overrides: Mapping[str, float], structure: Structure) -> None:
    """Raise if an override matches no layer."""
    layers = [layer for group in structure.groups for layer in group.layers]
    for pattern in overrides:
        if not any(matches(layer, pattern) for layer in layers):
            raise invalid("overrides", "match layers that can lose channels", pattern, f"These are {layers[:8]}.")


def _refusal(group: Group, targets: Targets, tensors: Mapping[str, Tensor]) -> str:
    for layer in group.layers:
        if reason := targets.leaves_out(layer):
            return reason
    makers = [tensors[member.name] for member in group.members if member.makes]
    if any(isinstance(one, nn.Parameter) and one.dim() > 1 and not one.requires_grad for one in makers):
        return "frozen"
    owners = {member.name.rpartition(".")[0] for member in group.members}
    if group.spanned and not owners & set(targets.include or ()):
        return f"{group.spanned}; name a layer of it exactly in targets.include to cut it all the same, approximately"
    return ""


def _limits(groups: Sequence[Group], recipe: Recipe, progress: Progress, step: int) -> list[Limits]:
    limits = []
    for group in groups:
        original = round(group.size * progress.widths.get(group.name, group.width) / group.width)
        mine = step if recipe.round_to or original >= 4 * step else 1
        mine = mine if group.width == group.size and original > mine else 1
        least = max(1, math.ceil(recipe.min_layer_channels * original), min(mine, group.size))
        exactly = None
        for pattern, fraction in recipe.overrides.items():
            if any(matches(layer, pattern) for layer in group.layers):
                exactly = min(group.size, max(1, round(fraction * original)))
        limits.append(Limits(min(least, group.size), mine, exactly))
    return limits


def remove_channels_(
    model: nn.Module, plan: RemovalPlan, optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] = ()
) -> None:
    """Apply a plan: channels leave ``model``, and what optimizers remember of them.

    Parameters stay the same objects, with their hooks and places in optimizers; the keys of ``state_dict`` stay.

    Args:
        model: the module that the plan was made for.
        plan: from `plan_removal`.
        optimizers: that train it; their moments are cut with the same indices.

    Raises:
        CompressionError: the plan is for another model, or for this one before other channels left; nothing has
            changed then.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> remove_channels_(model, plan_removal(model, torch.ones(1, 8), macs=0.25), [optimizer])
        >>> model[0].weight.shape
        torch.Size([4, 8])
    """
    optimizers = [optimizers] if isinstance(optimizers, Optimizer) else optimizers
    if not all(isinstance(one, Optimizer) for one in optimizers):
        raise invalid("optimizers", "be a list of optimizers", optimizers)
    check_shapes(model, plan.shapes)
    with torch.inference_mode(False):
        cut = cut_(model, plan.kept, plan.numbers)
        resize_state_(optimizers, cut.changes)
