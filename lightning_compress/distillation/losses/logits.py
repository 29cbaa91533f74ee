"""Logits, of any shape with the classes along one dimension: mean squared error, and what all losses of logits share.

A *position* is what is left of the shape without the classes: a sample, a token, a pixel. Classes that the student
masks (-inf) leave the teacher's distribution, which is normalised over the rest (the divergence would be infinite); a
position where nothing is left to compare doesn't count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compress.distillation.losses.arithmetic import check_shapes, exact, full, mean
from lightning_compress.distillation.losses.base import LogitLoss, check_dim, check_weight
from lightning_compress.errors import invalid

_EPSILON = 1e-8
"""Added to a variance, so that equal logits have a gradient; a ten-thousandth of their scale."""


@dataclass(frozen=True)
class Comparison:
    """Both logits in full precision, classes last, over the same classes.

    Attributes:
        student: (..., C); where a position doesn't count, zeros.
        teacher: (..., C); where a position doesn't count, zeros.
        unmasked: (..., C), which classes are masked on neither side.
        counts: (...), which positions count.
        whole: Whether everything is known to count.
    """

    student: Tensor
    teacher: Tensor
    unmasked: Tensor
    counts: Tensor
    whole: bool = False


def compare(
    student: Tensor,
    teacher: Tensor,
    class_dim: int,
    valid: Tensor | None,
    standardize: bool = False,
    least_classes: int = 2,
) -> Comparison:
    """Bring both logits to one form, standardized if asked, or raise where they can't be compared."""
    check_shapes(student, teacher)
    rank = student.dim()
    if not -rank <= class_dim < rank or (rank > 1 and class_dim % rank == 0):
        remedy = "Usual: -1, or 1 for (B, C, H, W)."
        raise invalid(
            "class_dim", f"be a dimension of the logits {tuple(student.shape)}, not the batch", class_dim, remedy
        )
    if student.shape[class_dim] < least_classes:
        raise invalid(
            "class_dim",
            "be a dimension of two classes or more",
            class_dim,
            f"The logits have shape {tuple(student.shape)}. Override `logits` to give a single logit z of a binary "
            "task as [0, z]; for a regression use LogitMSE.",
        )
    student, teacher = full(student).movedim(class_dim, -1), full(teacher).movedim(class_dim, -1)
    # Only where reading a value doesn't wait for a device.
    readable = valid is None and student.device.type == "cpu" and student.numel() > 0
    if readable and min(student.min().item(), teacher.min().item()) > -math.inf:
        unmasked = torch.ones((), dtype=torch.bool).expand(student.shape)
        if standardize:
            student, teacher = standardize_logits(student), standardize_logits(teacher)
        return Comparison(student, teacher, unmasked, unmasked[..., 0], whole=True)
    teacher = teacher.masked_fill(student == -math.inf, -math.inf)
    unmasked = teacher != -math.inf
    counts = unmasked.any(-1)
    if valid is not None:
        if valid.shape != counts.shape:
            raise invalid("valid", f"have the positions' shape {tuple(counts.shape)}", tuple(valid.shape))
        counts = counts & valid.bool()
    # Positions that don't count are filled before anything is computed: a NaN times a mask of 0 would still be NaN.
    left_out = ~counts.unsqueeze(-1)
    student, teacher = student.masked_fill(left_out, 0.0), teacher.masked_fill(left_out, 0.0)
    unmasked = unmasked | left_out
    if standardize:
        # A class that the teacher alone masks still has the student's probability, and isn't standardized with.
        student, teacher = standardize_logits(student, student != -math.inf), standardize_logits(teacher, unmasked)
    return Comparison(student, teacher, unmasked, counts)


def standardize_logits(logits: Tensor, unmasked: Tensor | None = None) -> Tensor:
    """Logits with mean 0 and standard deviation 1 over the last dimension.

    ``(z - mean(z)) / sqrt(var(z) + 1e-8)``: the student needs to match the teacher's shape, not its scale. The
    variance is that of the whole, as in the paper (its code divides by C - 1).

    Args:
        logits: Any shape with the classes last.
        unmasked: Optional, which classes count, a boolean tensor of that shape; the others become -inf.

    Returns:
        Logits of the same shape.

    Example:
        >>> standardize_logits(torch.tensor([[1.0, 3.0]]))
        tensor([[-1.,  1.]])

    References:
        Sun et al., "Logit Standardization in Knowledge Distillation" (2024), algorithm 1.
    """
    unmasked = torch.ones_like(logits, dtype=torch.bool) if unmasked is None else unmasked
    centred = centre(logits.where(unmasked, 0.0), unmasked, -1)
    variance = centred.square().sum(-1, keepdim=True) / unmasked.sum(-1, keepdim=True).clamp(min=1)
    return (centred / (variance + _EPSILON).sqrt()).where(unmasked, -math.inf)


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """``Σ_c p_c (log p_c - log q_c)`` over the last dimension; the teacher masks what the student masks."""
    log_q, log_p = F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1)
    # A masked class has p = 0 and adds nothing; left in, it would be 0 · inf in the value or in the gradient.
    unmasked = log_p != -math.inf
    log_q, log_p = log_q.where(unmasked, 0.0), log_p.where(unmasked, 0.0)
    return (log_p.exp() * unmasked * (log_p - log_q)).sum(-1)


def centre(x: Tensor, unmasked: Tensor, dim: int) -> Tensor:
    """``x``, 0 where it is masked, minus its mean over the rest; 0 where it is masked, and where all is equal."""
    centred = (x - x.sum(dim, keepdim=True) / unmasked.sum(dim, keepdim=True).clamp(min=1)).where(unmasked, 0.0)
    # Of equal values the rounding of their mean would be left, and be taken for a direction.
    rounding = 8 * torch.finfo(x.dtype).eps * x.detach().abs().amax(dim, keepdim=True)
    return centred.where(centred.detach().abs().amax(dim, keepdim=True) > rounding, 0.0)


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
