"""Hard targets: the teacher's own choice as the label."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from lightning_compress.distillation.losses.arithmetic import exact, mean
from lightning_compress.distillation.losses.base import LogitLoss, check_dim, check_weight
from lightning_compress.distillation.losses.logits import compare


def hard_target(student: Tensor, teacher: Tensor, class_dim: int = -1, valid: Tensor | None = None) -> Tensor:
    """Cross-entropy of the student against the class that the teacher would choose.

    ``mean over valid positions of -log softmax(student)[argmax teacher]``.

    Args:
        student: Logits, any shape with the classes along ``class_dim``.
        teacher: Logits of the same shape.
        class_dim: Where the classes stand.
        valid: Optional, which positions count: a boolean tensor of the logits' shape without ``class_dim``.

    Returns:
        A scalar in float32 (float64 for float64 logits).

    Raises:
        CompressionError: If the shapes differ, or there is only one class.

    Example:
        >>> import torch
        >>> f"{hard_target(torch.tensor([[0.0, 0.0]]), torch.tensor([[5.0, 1.0]])):.4f}"
        '0.6931'

    References:
        Touvron et al., "Training data-efficient image transformers & distillation through attention" (2021), eq. 3.
    """
    pair = compare(student, teacher, class_dim, valid)
    with exact(student):
        chosen = F.log_softmax(pair.student, dim=-1).gather(-1, pair.teacher.argmax(-1, keepdim=True)).squeeze(-1)
        return mean(-chosen, pair.counts)


@dataclass(frozen=True)
class HardTarget(LogitLoss):
    """Hard targets, the teacher's choice as label, ``-log softmax(student)[argmax teacher]``: see :func:`hard_target`.

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
        check_weight("weight", self.weight)
        check_dim("class_dim", self.class_dim)

    def __call__(
        self, student: Tensor, teacher: Tensor, valid: Tensor | None = None, targets: Tensor | None = None
    ) -> Tensor:
        return hard_target(student, teacher, self.class_dim, valid)
