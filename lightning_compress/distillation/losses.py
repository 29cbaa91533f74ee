"""What a student is asked to imitate: each loss is a small frozen class around a pure function, with its weight."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from lightning_compress.distillation.functional import feature_cosine, feature_mse, hard_target, soft_target
from lightning_compress.errors import invalid


class DistillationLoss(ABC):
    """What all distillation losses share: a ``weight``, a ``name`` in the log, and being called with two tensors.

    Derive your own from :class:`LogitLoss` or :class:`FeatureLoss`, which say what the two tensors are.
    """

    weight: float

    @property
    def name(self) -> str:
        """The loss's name in the log: its class name in lower case.

        Example:
            >>> SoftTarget().name
            'soft_target'
        """
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", type(self).__name__)
        return words.lower()

    @abstractmethod
    def __call__(self, student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
        """The unweighted loss, a scalar; ``valid`` says which positions of logits count (None: all)."""


class LogitLoss(DistillationLoss):
    """A loss between the logits of student and teacher."""


class FeatureLoss(DistillationLoss):
    """A loss between the outputs of two layers, named by dotted path within the student and within the teacher."""

    student_layer: str
    teacher_layer: str


@dataclass(frozen=True)
class SoftTarget(LogitLoss):
    """Soft targets: see :func:`soft_target` for the formula.

    Args:
        temperature: T > 0; higher values show the student more of what the teacher finds similar.
        weight: Factor in the sum of all terms.
        class_dim: Where the classes stand in the logits: -1 for (B, C) and (B, T, C), 1 for (B, C, H, W).

    Raises:
        CompressionError: If a value is out of range.

    Example:
        >>> loss = SoftTarget(temperature=4.0)
        >>> import torch
        >>> f"{loss(torch.zeros(1, 3), torch.zeros(1, 3)):.1f}"
        '0.0'
    """

    temperature: float = 2.0
    weight: float = 0.75
    class_dim: int = -1

    def __post_init__(self) -> None:
        if not (_is_number(self.temperature) and self.temperature > 0):
            raise invalid("temperature", "be a finite number above 0", self.temperature, "Usual values: 1 to 10.")
        _check_weight(self.weight)
        _check_class_dim(self.class_dim)

    def __call__(self, student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
        return soft_target(student, teacher, self.temperature, self.class_dim, valid)


@dataclass(frozen=True)
class HardTarget(LogitLoss):
    """Hard targets, the teacher's own choice as the label: see :func:`hard_target` for the formula.

    Args:
        weight: Factor in the sum of all terms.
        class_dim: Where the classes stand in the logits: -1 for (B, C) and (B, T, C), 1 for (B, C, H, W).

    Raises:
        CompressionError: If a value is out of range.

    Example:
        >>> import torch
        >>> f"{HardTarget()(torch.tensor([[9.0, 0.0]]), torch.tensor([[1.0, 0.0]])):.4f}"
        '0.0001'
    """

    weight: float = 0.5
    class_dim: int = -1

    def __post_init__(self) -> None:
        _check_weight(self.weight)
        _check_class_dim(self.class_dim)

    def __call__(self, student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
        return hard_target(student, teacher, self.class_dim, valid)


@dataclass(frozen=True)
class FeatureCosine(FeatureLoss):
    """Cosine similarity of hidden representations: see :func:`feature_cosine` for the formula.

    Where the two layers' shapes differ, an adapter brings the student's features to the teacher's shape first.

    Args:
        student_layer: Dotted path of a layer within the student, such as ``features.4``.
        teacher_layer: Dotted path of a layer within the teacher.
        weight: Factor in the sum of all terms.

    Raises:
        CompressionError: If a value is out of range.

    Example:
        >>> import torch
        >>> f"{FeatureCosine('encoder', 'encoder')(torch.ones(2, 3), torch.ones(2, 3)):.1f}"
        '0.0'
    """

    student_layer: str
    teacher_layer: str
    weight: float = 0.25

    def __post_init__(self) -> None:
        _check_weight(self.weight)

    def __call__(self, student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
        return feature_cosine(student, teacher)


@dataclass(frozen=True)
class FeatureMSE(FeatureLoss):
    """Mean squared error of feature maps: see :func:`feature_mse` for the formula.

    Where the two layers' shapes differ, a regressor brings the student's features to the teacher's shape first.

    Args:
        student_layer: Dotted path of a layer within the student, such as ``features.4``.
        teacher_layer: Dotted path of a layer within the teacher.
        weight: Factor in the sum of all terms.

    Raises:
        CompressionError: If a value is out of range.

    Example:
        >>> import torch
        >>> f"{FeatureMSE('features', 'features')(torch.zeros(2, 3), torch.ones(2, 3)):.1f}"
        '1.0'
    """

    student_layer: str
    teacher_layer: str
    weight: float = 0.25

    def __post_init__(self) -> None:
        _check_weight(self.weight)

    def __call__(self, student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
        return feature_mse(student, teacher)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_weight(weight: float) -> None:
    if not (_is_number(weight) and weight >= 0):
        raise invalid("weight", "be a finite number, at least 0", weight)


def _check_class_dim(class_dim: int) -> None:
    if isinstance(class_dim, bool) or not isinstance(class_dim, int) or class_dim == 0:
        raise invalid("class_dim", "be a dimension other than 0, which is the batch", class_dim, "Usual: -1 or 1.")
