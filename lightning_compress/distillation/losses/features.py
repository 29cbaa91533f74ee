"""Features, (B, ...): mean squared error and cosine similarity, and what all losses of features share.

``valid`` says what counts where not everything does: which samples, a boolean tensor (B,); or which positions of
features (B, L, D), a boolean tensor (B, L). A mask of any other shape (that of a dense output, say) leaves features
whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compress.distillation.losses.arithmetic import check_shapes, exact, full, mean, unit
from lightning_compress.distillation.losses.base import LayerLoss
from lightning_compress.errors import invalid


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
class FeatureMSE(LayerLoss):
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
        >>> f"{FeatureMSE('features', 'features')(torch.zeros(2, 3), torch.ones(2, 3)):.1f}"
        '1.0'
    """

    weight: float = 0.25

    def __call__(self, student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
        return feature_mse(student, teacher, valid)


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
        >>> f"{feature_cosine(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]])):.1f}"
        '1.0'
    """
    check_shapes(student, teacher)
    with exact(student):
        (student, teacher), samples = mask_features((student, teacher), valid)
        return mean(1 - (unit(student.flatten(1)) * unit(teacher.flatten(1))).sum(1), samples)


@dataclass(frozen=True)
class FeatureCosine(LayerLoss):
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
        >>> f"{FeatureCosine('encoder', 'encoder')(torch.ones(2, 3), torch.ones(2, 3)):.1f}"
        '0.0'
    """

    weight: float = 0.25

    def __call__(self, student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
        return feature_cosine(student, teacher, valid)


def mask_features(pair: tuple[Tensor, Tensor], valid: Tensor | None) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Both features in full precision, zeros where they don't count; and which samples do. Raises for two batches."""
    if len(pair[0]) != len(pair[1]):
        raise invalid("teacher", f"put out features of the student's batch of {len(pair[0])}", tuple(pair[1].shape))
    samples = torch.ones(len(pair[0]), dtype=torch.bool, device=pair[0].device)
    masked = []
    for features in (full(side.unsqueeze(1) if side.dim() == 1 else side) for side in pair):
        mask = broadcast_mask(features, valid)
        masked.append(features if mask is None else features.where(mask, 0.0))
        samples = samples if mask is None else samples & mask.flatten(1).any(1)
    # A sample that doesn't count on one side counts on neither.
    student, teacher = (side.where(samples.view(-1, *[1] * (side.dim() - 1)), 0.0) for side in masked)
    return (student, teacher), samples


def broadcast_mask(features: Tensor, valid: Tensor | None) -> Tensor | None:
    """``valid`` as a mask that broadcasts over the features; None where it says nothing of them."""
    if valid is None or not (valid.dim() == 1 or (valid.dim() == 2 and features.dim() == 3)):
        return None
    if valid.shape != features.shape[: valid.dim()]:
        return None
    return valid.bool().reshape(*valid.shape, *[1] * (features.dim() - valid.dim()))
