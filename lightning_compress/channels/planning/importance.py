"""Scores how much each unit of a group matters; an importance is one function and its line in `IMPORTANCES`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_compress.channels.tracing.groups import Group, Member
from lightning_compress.errors import CompressionError, invalid, nearest
from lightning_compress.modules.paths import modules_of, named_tensors


@dataclass(frozen=True)
class UnitWeight:
    """Holds a parameter, and which slices of it belong to which unit of a group.

    Attributes:
        parameter: its values, and its gradient if there is one.
        layer: the module that it belongs to.
        member: which place along which dimension belongs to which unit, and whether these are what the layer ``makes``.
        size: how many units the group has.
    """

    parameter: nn.Parameter
    layer: nn.Module | None
    member: Member
    size: int

    def sums(self, values: Tensor) -> Tensor:
        """Sum ``values`` of the parameter's shape over each unit's slices: float64 ``(units,)``."""
        others = [dim for dim in range(values.dim()) if dim != self.member.dim]
        sums = (values.sum(others, dtype=torch.float64) if others else values.double()).cpu()
        inside = self.member.units >= 0
        return torch.zeros(self.size, dtype=torch.float64).index_add_(0, self.member.units[inside], sums[inside])


@dataclass(frozen=True)
class UnitWeights:
    """Holds a group of channels as an importance sees it.

    Attributes:
        size: how many units it has.
        weights: its floating-point parameters: of each unit's channels, what makes them and what takes them in.
        generator: the only source of random numbers.
    """

    size: int
    weights: Sequence[UnitWeight]
    generator: torch.Generator


@dataclass(frozen=True)
class Importance:
    """Scores the units of a group; those with the lowest scores leave first.

    Args:
        score: ``score(group)`` gives a score of at least 0 for each unit of a `UnitWeights`, ``(size,)``, or None where
            it can't tell, so that all matter alike. It is called without gradients, and must change nothing.
        needs_gradients: whether it reads gradients: then scores are summed over steps, before each of them.
        needs_batches: whether scores are measured on batches, as `output_changes` does. They compare between groups as
            they are, by what leaves with a unit.
    """

    score: Callable[[UnitWeights], Tensor | None]
    needs_gradients: bool = False
    needs_batches: bool = False


def l1(group: UnitWeights) -> Tensor | None:
    """The mean over the weights of ``sum |W[u]|``; biases and norms don't count.

    References:
        Fang et al., "DepGraph", 2023 (arXiv:2301.12900), section 3.3, for the mean over a group.
    """
    return _mean([weight.sums(weight.parameter.abs()) for weight in group.weights if weight.parameter.dim() > 1])


def l2(group: UnitWeights) -> Tensor | None:
    """The mean over the weights of ``sum W[u]^2``: as `l1`."""
    return _mean([weight.sums(weight.parameter.square()) for weight in group.weights if weight.parameter.dim() > 1])


def batchnorm(group: UnitWeights) -> Tensor | None:
    """The mean over the group's BatchNorms of ``|gamma[u]|``.

    References:
        Liu et al., "Network Slimming", 2017 (arXiv:1708.06519).
    """
    scales = [
        weight
        for weight in group.weights
        if isinstance(weight.layer, _BatchNorm) and weight.parameter is weight.layer.weight
    ]
    return _mean([scale.sums(scale.parameter.abs()) for scale in scales])


def fpgm(group: UnitWeights) -> Tensor | None:
    """The mean over what makes the channel of ``sum_v ||W[u] - W[v]||``: the distance to the geometric median.

    References:
        He et al., "Filter Pruning via Geometric Median", 2019 (arXiv:1811.00250).
    """
    return _mean([_distances(weight) for weight in group.weights if weight.member.makes and weight.parameter.dim() > 1])


def _distances(weight: UnitWeight) -> Tensor:
    dim, units = weight.member.dim, weight.member.units
    rows = weight.parameter.double().movedim(dim, 0).reshape(weight.parameter.shape[dim], -1).cpu()
    units, rows = units[units >= 0], rows[units >= 0]
    counts = torch.bincount(units, minlength=weight.size)
    if bool((counts == counts[0]).all()):
        rows = rows[units.argsort(stable=True)].reshape(weight.size, -1)
        return torch.cdist(rows, rows).sum(1)
    return torch.zeros(weight.size, dtype=torch.float64).index_add_(0, units, torch.cdist(rows, rows).sum(1))


def taylor(group: UnitWeights) -> Tensor | None:
    """``(sum of gradient * weight over what makes the channel)^2``: what the loss would change by without it.

    References:
        Molchanov et al., "Importance Estimation for Neural Network Pruning", 2019 (arXiv:1906.10771), eq. 8.
    """
    sums = []
    for weight in group.weights:
        gradient = weight.parameter.grad
        if weight.member.makes and gradient is not None:
            sums.append(weight.sums(weight.parameter * (gradient.to_dense() if gradient.is_sparse else gradient)))
    return sum(sums[1:], sums[0]).square() if sums else None


def random(group: UnitWeights) -> Tensor | None:
    """Uniform random numbers, as a baseline."""
    return torch.rand(group.size, generator=group.generator, dtype=torch.float64) + 1e-9


def outputs(group: UnitWeights) -> Tensor | None:
    """How much the model's outputs would change without the unit, by what leaves with it: see `output_changes`."""
    return None


def _mean(scores: list[Tensor]) -> Tensor | None:
    return torch.stack(scores).mean(0) if scores else None


IMPORTANCES = {
    "l1": Importance(l1),
    "l2": Importance(l2),
    "batchnorm": Importance(batchnorm),
    "taylor": Importance(taylor, needs_gradients=True),
    "fpgm": Importance(fpgm),
    "random": Importance(random),
    "outputs": Importance(outputs, needs_batches=True),
}


def resolve_importance(name: str) -> Importance:
    """Return the importance of a name in `IMPORTANCES`, or at an import path: an `Importance`, or its function.

    Raises:
        CompressionError: no such name, nothing at that path, or no function of one argument.

    Example:
        >>> resolve_importance("taylor").needs_gradients
        True
    """
    must = "be the name of one, or the import path of one"
    if isinstance(name, str) and name in IMPORTANCES:
        return IMPORTANCES[name]
    if not isinstance(name, str) or "." not in name:
        where = f"{name.__module__}.{name.__qualname__}" if inspect.isroutine(name) else ""
        raise invalid(
            "importance", must, name, f"Write importance='{where}'." if where else nearest(str(name), IMPORTANCES)
        )
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:  # the last two: of "..x" and ".x"
        raise invalid("importance", must, name, f"{error}. {nearest(name, IMPORTANCES)}") from error
    if isinstance(found, Importance):
        return found
    try:
        inspect.signature(found).bind(None)
    except (TypeError, ValueError) as error:
        raise invalid("importance", "name a function of one argument, the group", name, f"{error}.") from error
    return Importance(found)


@torch.no_grad()
def score(model: nn.Module, groups: Sequence[Group], importance: Importance, seed: int = 0) -> list[Tensor | None]:
    """Score the units of each group of a model, float64 ``(size,)``, or None where the importance can't tell.

    Raises:
        CompressionError: a user's own doesn't give a score of at least 0 for each unit.
    """
    tensors, modules = named_tensors(model), modules_of(model)
    generator = torch.Generator().manual_seed(seed)
    found: list[Tensor | None] = []
    for group in groups:
        weights = [
            UnitWeight(parameter, modules.get(member.layer), member, group.size)
            for member in group.members
            if isinstance(parameter := tensors[member.name], nn.Parameter) and parameter.is_floating_point()
        ]
        scores = importance.score(UnitWeights(group.size, weights, generator))
        if scores is not None:
            if not isinstance(scores, Tensor) or scores.shape != (group.size,) or not bool((scores >= 0).all()):
                raise CompressionError(
                    f"`importance` must give a score of at least 0 for each unit of a group. Received: {scores!r} for "
                    f"{group.size} units of {group.name}."
                )
            scores = scores.double().cpu()
        found.append(scores)
    return found


def carry_scores_(
    model: nn.Module, groups: Sequence[Group], importance: Importance, carried: dict[str, Tensor]
) -> None:
    """Add the scores of a step by an importance of gradients to ``carried``: a group's name to its sums so far."""
    for group, scores in zip(groups, score(model, groups, importance), strict=True):
        if scores is not None:
            before = carried.get(group.name)
            carried[group.name] = scores + (before if before is not None and len(before) == len(scores) else 0.0)


def rank(
    model: nn.Module, groups: Sequence[Group], importance: Importance, carried: Mapping[str, Tensor], seed: int
) -> list[Tensor]:
    """Return each group's scores over their mean, so that groups compare: float64 ``(size,)``.

    Those of an importance of gradients are ``carried``, as `carry_scores_` summed them; those that are measured on
    batches too, and they aren't divided.
    """
    if importance.needs_batches:
        return [carried[group.name] for group in groups]
    found = [carried.get(group.name) for group in groups] if importance.needs_gradients else None
    return [
        scores / scores.mean() if scores is not None and scores.mean() > 0 else torch.ones(group.size).double()
        for group, scores in zip(groups, found or score(model, groups, importance, seed), strict=True)
    ]
