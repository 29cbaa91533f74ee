"""Attention transfer: where student and teacher are active."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from lightning_compress.distillation.losses.arithmetic import exact, mean, unit
from lightning_compress.distillation.losses.base import LayerLoss, check_dim
from lightning_compress.distillation.losses.features import mask_features
from lightning_compress.errors import invalid


def attention_transfer(student: Tensor, teacher: Tensor, channel_dim: int = 1, valid: Tensor | None = None) -> Tensor:
    """Mean squared difference of where student and teacher are active, whatever their numbers of channels.

    ``mean_{b,i} (a_s - a_t)²`` with the attention map ``a = vec(Σ_c f_c²) / |vec(Σ_c f_c²)|`` over the positions i.
    Where the resolutions differ, the larger map is pooled to the smaller.

    Args:
        student: Features of shape (B, C, ...).
        teacher: Features of shape (B, C', ...).
        channel_dim: Where the channels stand: 1 for (B, C, H, W), -1 for (B, L, D).
        valid: Optional, which samples (B,) or positions (B, L) count.

    Returns:
        A scalar in float32 (float64 for float64 features).

    Raises:
        CompressionError: If the ranks or the batches differ, or there are no positions.

    Example:
        >>> import torch
        >>> features = torch.rand(2, 3, 4, 4)
        >>> f"{attention_transfer(features, 5 * features.repeat(1, 2, 1, 1)):.4f}"
        '0.0000'

    References:
        Zagoruyko and Komodakis, "Paying More Attention to Attention" (2017), eq. 2 with p = 2; the mean of squares, as
        in the authors' code, instead of the norm, hence the usual weight of 1000.
    """
    if student.dim() != teacher.dim() or student.dim() < 3 or len(student) != len(teacher):
        raise invalid(
            "student_layer",
            f"have features (B, C, ...) of the teacher's rank and batch, {tuple(teacher.shape)}",
            tuple(student.shape),
            "Attention transfer compares positions: name layers that put out maps or sequences.",
        )
    with exact(student):
        (student, teacher), samples = mask_features((student, teacher), valid)
        maps = [features.square().mean(channel_dim) for features in (student, teacher)]
        size = [min(sizes) for sizes in zip(maps[0].shape[1:], maps[1].shape[1:], strict=True)]
        pooled = (F.interpolate(side.unsqueeze(1), size, mode="area") for side in maps)
        student_map, teacher_map = (unit(side.flatten(1)) for side in pooled)
        squared, counts = (student_map - teacher_map).square(), samples.unsqueeze(1)
        if valid is not None and valid.shape == squared.shape == student.shape[:2] and student.dim() == 3:
            counts = counts & valid.bool()  # the positions of sequences
        return mean(squared, counts.expand_as(squared))


@dataclass(frozen=True)
class AttentionTransfer(LayerLoss):
    """Where student and teacher are active, ``mean (a_s - a_t)²`` of attention maps: see :func:`attention_transfer`.

    Numbers of channels may differ; resolutions are pooled to the smaller. No adapter is trained. The usual weight is
    for maps of 8x8 and more; on tiny maps it is too much.

    Args:
        student_layer: Path of a layer within the student.
        teacher_layer: Path of a layer within the teacher.
        weight: Factor in the sum of all terms; with several pairs, that of their mean.
        pairs: ``auto`` finds pairs of layers in place of the two paths.
        channel_dim: Where the channels stand: 1 for (B, C, H, W), -1 for (B, L, D).

    Raises:
        CompressionError: If a value is out of range.

    Example:
        >>> import torch
        >>> maps = torch.rand(2, 3, 4, 4)
        >>> f"{AttentionTransfer('features', 'features')(maps, maps.flip(1)):.1f}"
        '0.0'
    """

    weight: float = 1000.0
    channel_dim: int = 1
    adapts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_dim("channel_dim", self.channel_dim)

    def __call__(self, student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
        return attention_transfer(student, teacher, self.channel_dim, valid)
