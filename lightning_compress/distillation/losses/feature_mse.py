"""Mean squared error of feature maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from lightning_compress.distillation.losses.arithmetic import check_shapes, exact, full, mean
from lightning_compress.distillation.losses.base import FeatureLoss
from lightning_compress.distillation.losses.features import broadcast_mask


def feature_mse(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean squared error between two feature maps: ``mean (s - t)²`` over all elements.

    Args:
        student: Features of shape (B, ...), already brought to the teacher's shape by a regressor where they differed.
        teacher: Features of the same shape.
        valid: Optional, which samples (B,) or positions (B, L) count.

    Returns:
        A scalar in float32 (float64 for float64 features).

    Raises:
        CompressionError: If the shapes differ.

    Example:
        >>> import torch
        >>> f"{feature_mse(torch.zeros(1, 4), torch.full((1, 4), 3.0)):.1f}"
        '9.0'

    References:
        Romero et al., "FitNets: Hints for Thin Deep Nets" (2015), eq. 3; the mean over elements instead of their sum.
    """
    check_shapes(student, teacher)
    with exact(student):
        mask = broadcast_mask(student, valid)
        if mask is None:
            return F.mse_loss(full(student), full(teacher)) if student.numel() else full(student).sum()
        difference = full(student).where(mask, 0.0) - full(teacher).where(mask, 0.0)
        return mean(difference.square(), mask.expand_as(difference))


@dataclass(frozen=True)
class FeatureMSE(FeatureLoss):
    """Mean squared error of feature maps, ``mean (s - t)²``, the hint of FitNets: see :func:`feature_mse`.

    Where the two layers' shapes differ, a regressor brings the student's features to the teacher's shape first.

    Args:
        student_layer: Path of a layer within the student.
        teacher_layer: Path of a layer within the teacher.
        weight: Factor in the sum of all terms; with several pairs, that of their mean.
        pairs: ``auto`` finds pairs of layers in place of the two paths.

    Raises:
        CompressionError: If a value is out of range.

    Example:
        >>> import torch
        >>> f"{FeatureMSE('features', 'features')(torch.zeros(2, 3), torch.ones(2, 3)):.1f}"
        '1.0'
    """

    student_layer: str | None = None
    teacher_layer: str | None = None
    weight: float = 0.25
    pairs: Literal["auto"] | None = None

    def __call__(self, student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
        return feature_mse(student, teacher, valid)
