"""Cosine similarity of hidden representations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lightning_compress.distillation.losses.arithmetic import check_shapes, exact, mean, unit
from lightning_compress.distillation.losses.base import FeatureLoss
from lightning_compress.distillation.losses.features import mask_features


def feature_cosine(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """One minus the cosine similarity of two hidden representations, averaged over the batch.

    ``mean_b (1 - <s_b, t_b> / (|s_b| |t_b|))``, each sample flattened.

    Args:
        student: Features of shape (B, ...).
        teacher: Features of the same shape.
        valid: Optional, which samples (B,) or positions (B, L) count.

    Returns:
        A scalar in float32 (float64 for float64 features), in [0, 2].

    Raises:
        CompressionError: If the shapes differ.

    Example:
        >>> import torch
        >>> f"{feature_cosine(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]])):.1f}"
        '1.0'
    """
    check_shapes(student, teacher)
    with exact(student):
        (student, teacher), samples = mask_features((student, teacher), valid)
        return mean(1 - (unit(student.flatten(1)) * unit(teacher.flatten(1))).sum(1), samples)


@dataclass(frozen=True)
class FeatureCosine(FeatureLoss):
    """Cosine similarity of hidden representations, ``1 - cos(s, t)``: see :func:`feature_cosine`.

    Where the two layers' shapes differ, an adapter brings the student's features to the teacher's shape first.

    Args:
        student_layer: Path of a layer within the student.
        teacher_layer: Path of a layer within the teacher.
        weight: Factor in the sum of all terms; with several pairs, that of their mean.
        pairs: ``auto`` finds pairs of layers in place of the two paths.

    Raises:
        CompressionError: If a value is out of range.

    Example:
        >>> import torch
        >>> f"{FeatureCosine('encoder', 'encoder')(torch.ones(2, 3), torch.ones(2, 3)):.1f}"
        '0.0'
    """

    student_layer: str | None = None
    teacher_layer: str | None = None
    weight: float = 0.25
    pairs: Literal["auto"] | None = None

    def __call__(self, student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
        return feature_cosine(student, teacher, valid)
