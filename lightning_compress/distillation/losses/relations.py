"""Relations between the samples of a batch: similarities and distances of pairs, angles of triples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compress.distillation.losses.arithmetic import exact, mean, unit
from lightning_compress.distillation.losses.base import LayerLoss
from lightning_compress.distillation.losses.features import mask_features


def similarity_preserving(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean squared difference of the similarities between the samples of a batch, whatever the features' shapes.

    ``|G_s - G_t|² / B²``, G the rows of ``F Fᵀ`` at length 1, F the batch with each sample flattened.

    Args:
        student: Features of shape (B, ...).
        teacher: Features of shape (B, ...).
        valid: Optional, which samples (B,) or positions (B, L) count.

    Returns:
        A scalar in float32 (float64 for float64 features).

    Raises:
        CompressionError: If the batches differ.

    Example:
        >>> features = torch.rand(4, 6)
        >>> f"{similarity_preserving(features, features @ torch.eye(6).flip(0)):.4f}"
        '0.0000'

    References:
        Tung and Mori, "Similarity-Preserving Knowledge Distillation" (2019), eqs. 2 to 4.
    """
    with exact(student):
        (student, teacher), samples = mask_features((student, teacher), valid)
        student, teacher = (unit(side.flatten(1) @ side.flatten(1).T) for side in (student, teacher))
        return (student - teacher).square().sum() / samples.sum().clamp(min=1).square()


@dataclass(frozen=True)
class SimilarityPreserving(LayerLoss):
    """Similarities between the samples of a batch, ``|G_s - G_t|² / B²``: see :func:`similarity_preserving`.

    Shapes may differ beyond the batch. No adapter is trained.

    Args:
        student_layer: Path of a layer within the student.
        teacher_layer: Path of a layer within the teacher.
        weight: Factor in the sum of all terms; with several pairs, that of their mean.
        pairs: ``auto`` finds pairs of layers in place of the two paths.

    Raises:
        CompressionError: If a value is out of range.

    Example:
        >>> f"{SimilarityPreserving('features', 'features')(torch.eye(3), 2 * torch.eye(3)):.1f}"
        '0.0'
    """

    weight: float = 3000.0
    adapts: ClassVar[bool] = False

    def __call__(self, student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
        return similarity_preserving(student, teacher, valid)


def relational_distance(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """Huber loss between the distances of all pairs in a batch, whatever the features' shapes.

    ``mean_{i,j} huber(d_s - d_t)`` with ``d = |f_i - f_j| / μ``, μ the mean over pairs of different samples. Memory
    grows with B².

    Args:
        student: Features of shape (B, ...), each sample flattened.
        teacher: Features of shape (B, ...).
        valid: Optional, which samples (B,) or positions (B, L) count.

    Returns:
        A scalar in float32 (float64 for float64 features); 0 for a batch of one.

    Raises:
        CompressionError: If the batches differ.

    Example:
        >>> features = torch.rand(4, 6)
        >>> f"{relational_distance(features, 3 * features + 1):.4f}"
        '0.0000'

    References:
        Park et al., "Relational Knowledge Distillation" (2019), eqs. 4 to 7.
    """
    with exact(student):
        (student, teacher), samples = mask_features((student, teacher), valid)
        pairs = samples.unsqueeze(0) & samples.unsqueeze(1)
        student, teacher = (_relative_distances(side.flatten(1), pairs) for side in (student, teacher))
        return mean(F.smooth_l1_loss(student, teacher, reduction="none"), pairs)


@dataclass(frozen=True)
class RelationalDistance(LayerLoss):
    """Distances between the samples of a batch, ``mean huber(d_s - d_t)``: see :func:`relational_distance`.

    Shapes may differ beyond the batch. No adapter is trained.

    Args:
        student_layer: Path of a layer within the student.
        teacher_layer: Path of a layer within the teacher.
        weight: Factor in the sum of all terms; with several pairs, that of their mean.
        pairs: ``auto`` finds pairs of layers in place of the two paths.

    Raises:
        CompressionError: If a value is out of range.

    Example:
        >>> f"{RelationalDistance('features', 'features')(torch.eye(3), 2 * torch.eye(3)):.1f}"
        '0.0'
    """

    weight: float = 25.0
    adapts: ClassVar[bool] = False

    def __call__(self, student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
        return relational_distance(student, teacher, valid)


def relational_angle(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """Huber loss between the cosines of the angles in all triples of a batch, whatever the features' shapes.

    ``mean_{i,j,k} huber(cos_s - cos_t)`` with the cosine of the angle at sample j between those to i and to k. Memory
    grows with B³ + B² · D.

    Args:
        student: Features of shape (B, ...), each sample flattened.
        teacher: Features of shape (B, ...).
        valid: Optional, which samples (B,) or positions (B, L) count.

    Returns:
        A scalar in float32 (float64 for float64 features); 0 for a batch of two.

    Raises:
        CompressionError: If the batches differ.

    Example:
        >>> features = torch.rand(4, 6)
        >>> f"{relational_angle(features, 3 * features + 1):.4f}"
        '0.0000'

    References:
        Park et al., "Relational Knowledge Distillation" (2019), eqs. 8 and 9.
    """
    with exact(student):
        (student, teacher), samples = mask_features((student, teacher), valid)
        triples = samples.view(-1, 1, 1) & samples.view(1, -1, 1) & samples.view(1, 1, -1)
        student, teacher = (_cosines(side.flatten(1)) for side in (student, teacher))
        return mean(F.smooth_l1_loss(student, teacher, reduction="none"), triples)


@dataclass(frozen=True)
class RelationalAngle(LayerLoss):
    """Angles between the samples of a batch, ``mean huber(cos_s - cos_t)``: see :func:`relational_angle`.

    Shapes may differ beyond the batch. No adapter is trained.

    Args:
        student_layer: Path of a layer within the student.
        teacher_layer: Path of a layer within the teacher.
        weight: Factor in the sum of all terms; with several pairs, that of their mean.
        pairs: ``auto`` finds pairs of layers in place of the two paths.

    Raises:
        CompressionError: If a value is out of range.

    Example:
        >>> f"{RelationalAngle('features', 'features')(torch.eye(3), 2 * torch.eye(3)):.1f}"
        '0.0'
    """

    weight: float = 50.0
    adapts: ClassVar[bool] = False

    def __call__(self, student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
        return relational_angle(student, teacher, valid)


def _relative_distances(features: Tensor, pairs: Tensor) -> Tensor:
    # Not by way of the Gram matrix, which cancels; and cdist has a gradient of 0 where the distance is 0.
    distances = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist").where(pairs, 0.0)
    others = pairs.sum() - pairs.diagonal().sum()
    mu = distances.sum() / others.clamp(min=1)
    return distances / mu.where(mu > 0, 1.0)


def _cosines(features: Tensor) -> Tensor:
    directions = unit(features.unsqueeze(0) - features.unsqueeze(1))
    return directions @ directions.mT
