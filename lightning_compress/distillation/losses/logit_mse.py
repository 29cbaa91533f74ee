"""Mean squared error of logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightning_compress.distillation.losses.arithmetic import exact, mean
from lightning_compress.distillation.losses.base import LogitLoss, check_dim, check_weight
from lightning_compress.distillation.losses.logits import compare


def logit_mse(
    student: Tensor, teacher: Tensor, class_dim: int = -1, valid: Tensor | None = None, standardize: bool = False
) -> Tensor:
    """Mean squared error of the logits themselves: ``mean over valid positions and classes of (s - t)²``.

    It also serves outputs that are no logits: the predictions of a regression, (B,) or (B, targets).

    Args:
        student: Logits, any shape with the classes along ``class_dim``.
        teacher: Logits of the same shape.
        class_dim: Where the classes stand.
        valid: Optional, which positions count: a boolean tensor of the logits' shape without ``class_dim``.
        standardize: Compare :func:`standardize_logits` of both.

    Returns:
        A scalar in float32 (float64 for float64 logits).

    Raises:
        CompressionError: If the shapes differ.

    Example:
        >>> import torch
        >>> f"{logit_mse(torch.tensor([[1.0, 5.0]]), torch.tensor([[3.0, 5.0]])):.1f}"
        '2.0'

    References:
        Ba and Caruana, "Do Deep Nets Really Need to be Deep?" (2014), eq. 1; the mean over classes, not half the sum.
    """
    if student.dim() == 1 and student.shape == teacher.shape:  # one number a sample: every sample is a position
        student, teacher, class_dim = student.unsqueeze(-1), teacher.unsqueeze(-1), -1
    pair = compare(student, teacher, class_dim, valid, standardize, least_classes=1)
    with exact(student):
        squared = (pair.student.where(pair.unmasked, 0.0) - pair.teacher.where(pair.unmasked, 0.0)).square()
        return mean(squared, pair.unmasked & pair.counts.unsqueeze(-1))


@dataclass(frozen=True)
class LogitMSE(LogitLoss):
    """Mean squared error of logits, or of the outputs of a regression, ``mean (s - t)²``: see :func:`logit_mse`.

    Args:
        weight: Factor in the sum of all terms.
        class_dim: Where the classes stand in the logits: -1 for (B, C) and (B, T, C), 1 for (B, C, H, W).
        standardize: Compare standardised logits; twice one minus Pearson's correlation.

    Raises:
        CompressionError: If a value is out of range.

    Example:
        >>> import torch
        >>> f"{LogitMSE()(torch.zeros(1, 3), torch.full((1, 3), 2.0)):.1f}"
        '4.0'
    """

    weight: float = 0.5
    class_dim: int = -1
    standardize: bool = False

    of_classes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_weight("weight", self.weight)
        check_dim("class_dim", self.class_dim)

    def __call__(
        self, student: Tensor, teacher: Tensor, valid: Tensor | None = None, targets: Tensor | None = None
    ) -> Tensor:
        return logit_mse(student, teacher, self.class_dim, valid, standardize=self.standardize)
