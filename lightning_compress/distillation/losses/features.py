"""Losses between hidden representations; the formulas stand in `functional.features`.

Layers are named by path within student and teacher, such as ``features.4``, ``encoder:output.hidden.2`` or
``head:input``: see `features.parse`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from lightning_compress.distillation import functional
from lightning_compress.distillation.losses.base import FeatureLoss, check_dim


@dataclass(frozen=True)
class FeatureCosine(FeatureLoss):
    """Cosine similarity of hidden representations: see :func:`~.functional.feature_cosine` for the formula.

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
        return functional.feature_cosine(student, teacher, valid)


@dataclass(frozen=True)
class FeatureMSE(FeatureLoss):
    """Mean squared error of feature maps, FitNets' hint: see :func:`~.functional.feature_mse` for the formula.

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
        return functional.feature_mse(student, teacher, valid)


@dataclass(frozen=True)
class AttentionTransfer(FeatureLoss):
    """Where student and teacher are active: see :func:`~.functional.attention_transfer` for the formula.

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

    student_layer: str | None = None
    teacher_layer: str | None = None
    weight: float = 1000.0
    pairs: Literal["auto"] | None = None
    channel_dim: int = 1

    adapts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_dim("channel_dim", self.channel_dim)

    def __call__(self, student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
        return functional.attention_transfer(student, teacher, self.channel_dim, valid)


@dataclass(frozen=True)
class SimilarityPreserving(FeatureLoss):
    """Similarities between the samples of a batch: see :func:`~.functional.similarity_preserving` for the formula.

    Shapes may differ beyond the batch. No adapter is trained.

    Args:
        student_layer: Path of a layer within the student.
        teacher_layer: Path of a layer within the teacher.
        weight: Factor in the sum of all terms; with several pairs, that of their mean.
        pairs: ``auto`` finds pairs of layers in place of the two paths.

    Raises:
        CompressionError: If a value is out of range.

    Example:
        >>> import torch
        >>> f"{SimilarityPreserving('features', 'features')(torch.eye(3), 2 * torch.eye(3)):.1f}"
        '0.0'
    """

    student_layer: str | None = None
    teacher_layer: str | None = None
    weight: float = 3000.0
    pairs: Literal["auto"] | None = None

    adapts: ClassVar[bool] = False

    def __call__(self, student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
        return functional.similarity_preserving(student, teacher, valid)


@dataclass(frozen=True)
class RelationalDistance(FeatureLoss):
    """Distances between the samples of a batch: see :func:`~.functional.relational_distance` for the formula.

    Shapes may differ beyond the batch. No adapter is trained.

    Args:
        student_layer: Path of a layer within the student.
        teacher_layer: Path of a layer within the teacher.
        weight: Factor in the sum of all terms; with several pairs, that of their mean.
        pairs: ``auto`` finds pairs of layers in place of the two paths.

    Raises:
        CompressionError: If a value is out of range.

    Example:
        >>> import torch
        >>> f"{RelationalDistance('features', 'features')(torch.eye(3), 2 * torch.eye(3)):.1f}"
        '0.0'
    """

    student_layer: str | None = None
    teacher_layer: str | None = None
    weight: float = 25.0
    pairs: Literal["auto"] | None = None

    adapts: ClassVar[bool] = False

    def __call__(self, student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
        return functional.relational_distance(student, teacher, valid)


@dataclass(frozen=True)
class RelationalAngle(FeatureLoss):
    """Angles between the samples of a batch: see :func:`~.functional.relational_angle` for the formula.

    Shapes may differ beyond the batch. No adapter is trained.

    Args:
        student_layer: Path of a layer within the student.
        teacher_layer: Path of a layer within the teacher.
        weight: Factor in the sum of all terms; with several pairs, that of their mean.
        pairs: ``auto`` finds pairs of layers in place of the two paths.

    Raises:
        CompressionError: If a value is out of range.

    Example:
        >>> import torch
        >>> f"{RelationalAngle('features', 'features')(torch.eye(3), 2 * torch.eye(3)):.1f}"
        '0.0'
    """

    student_layer: str | None = None
    teacher_layer: str | None = None
    weight: float = 50.0
    pairs: Literal["auto"] | None = None

    adapts: ClassVar[bool] = False

    def __call__(self, student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
        return functional.relational_angle(student, teacher, valid)
