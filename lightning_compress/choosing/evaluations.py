"""What does the user's metric say of a model, and how far is it from what it said of another?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_compress.choosing.paired import Group
from lightning_compress.errors import CompressionError, invalid
from lightning_compress.modules.isolation import isolated_evaluation

Mode = Literal["max", "min"]


@dataclass(frozen=True)
class Evaluation:
    """What the metric says of a model.

    Attributes:
        value: of the metric.
        samples: its value for each sample, or each group of samples; None where they aren't known.
        sizes: of the groups; None where all are alike.
    """

    value: float
    samples: Tensor | None = field(default=None, repr=False)
    sizes: Tensor | None = field(default=None, repr=False)

    @classmethod
    def of(cls, groups: Sequence[Group]) -> Evaluation:
        """Return the mean over groups, which counts each by its samples."""
        values = torch.tensor([group.value for group in groups], dtype=torch.float64)
        sizes = torch.tensor([group.samples for group in groups], dtype=torch.float64)
        mean = float((sizes * values).sum() / sizes.sum())
        return cls(mean, values, sizes) if len(groups) > 1 else cls(mean)


Evaluate = Callable[[Any], float | Tensor | Evaluation]
"""Returns the metric of a model: a number, or one for each sample, ``(samples,)``, whose mean counts."""


@dataclass(frozen=True)
class Drop:
    """How far the metric falls; a loss that rises falls too.

    Attributes:
        value: of the fall; negative where the metric gets better.
        error: its standard error, of differences paired by sample or group; None where these aren't known.
    """

    value: float
    error: float | None = None

    def __str__(self) -> str:
        return f"{self.value:+.4f}" + ("" if self.error is None else f" ±{self.error:.4f}")


def evaluated(evaluate: Evaluate, model: nn.Module) -> Evaluation:
    """Evaluate a model in evaluation mode, without gradients; nothing of it changes.

    Raises:
        CompressionError: the metric is neither a number nor one for each sample.
    """
    with isolated_evaluation(model):
        found = evaluate(model)
    if isinstance(found, Evaluation):
        return found
    if isinstance(found, Tensor) and found.dim() == 1 and len(found) > 1:
        samples = found.detach().double().cpu()
        return Evaluation(float(samples.mean()), samples)
    try:
        return Evaluation(float(found))
    except (TypeError, ValueError) as error:
        shown = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise CompressionError(
            f"`evaluate` must return a number, or a tensor with one for each sample. Received: {shown}."
        ) from error


def drop(before: Evaluation, after: Evaluation, mode: Mode) -> Drop:
    """Return how far the metric falls from one model to another.

    Example:
        >>> drop(Evaluation(0.9), Evaluation(0.8), "max").value
        0.09999999999999998
    """
    sign = 1.0 if mode == "max" else -1.0
    value = sign * (before.value - after.value)
    if math.isnan(value):
        return Drop(math.inf)
    if before.samples is None or after.samples is None or before.samples.shape != after.samples.shape:
        return Drop(value)
    apart, count = before.samples - after.samples, len(before.samples)
    sizes = torch.ones_like(apart) if before.sizes is None else before.sizes
    parts = sizes / sizes.sum() * (apart - (sizes * apart).sum() / sizes.sum())
    return Drop(value, math.sqrt(count / (count - 1) * float(parts.square().sum())))


def check_mode(mode: str) -> None:
    """Raise `CompressionError` if a metric has no such direction."""
    if mode not in ("max", "min"):
        raise invalid("mode", "be 'max' or 'min'", mode, "It is 'max' where more is better, as of an accuracy.")


def rank_correlation(first: list[float], second: list[float]) -> float:
    """Return Spearman's rank correlation; ties share their mean rank. NaN where one side is constant.

    Example:
        >>> rank_correlation([1.0, 2.0, 3.0], [10.0, 30.0, 20.0])
        0.5
    """
    ranks = [_ranks(torch.tensor(values, dtype=torch.float64)) for values in (first, second)]
    a, b = (side - side.mean() for side in ranks)
    spread = float((a.square().sum() * b.square().sum()).sqrt())
    return round(float((a * b).sum()) / spread, 12) if spread else math.nan


def _ranks(values: Tensor) -> Tensor:
    below = (values[None] < values[:, None]).sum(1)
    return below + ((values[None] == values[:, None]).sum(1) + 1) / 2
