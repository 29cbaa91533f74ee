"""The teacher's answer as the label: its softened distribution (soft targets), or its choice (hard targets)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from lightning_compress.distillation.losses.arithmetic import exact, mean
from lightning_compress.distillation.losses.base import LogitLoss, check_dim, check_temperature, check_weight
from lightning_compress.distillation.losses.logits import compare, divergence


def soft_target(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    class_dim: int = -1,
    valid: Tensor | None = None,
    standardize: bool = False,
) -> Tensor:
    """Kullback-Leibler divergence from the teacher's softened distribution to the student's.

    ``T² · mean over valid positions of Σ_c p_c (log p_c - log q_c)`` with ``p = softmax(teacher / T)`` and
    ``q = softmax(student / T)``. For logits of shape ``(B, C)`` that is ``F.kl_div(..., reduction="batchmean") · T²``.

    Args:
        student: Logits, any shape with the classes along ``class_dim``.
        teacher: Logits of the same shape.
        temperature: T > 0.
        class_dim: Where the classes stand: -1 for (B, C) and (B, T, C), 1 for (B, C, H, W).
        valid: Optional, which positions count: a boolean tensor of the logits' shape without ``class_dim``.
        standardize: Compare :func:`standardize_logits` of both.

    Returns:
        A scalar in float32 (float64 for float64 logits).

    Raises:
        CompressionError: If the shapes differ, or there is only one class.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> f"{soft_target(logits, logits, temperature=2.0):.4f}"
        '0.0000'
        >>> f"{soft_target(logits, logits.flip(1), temperature=2.0):.4f}"
        '1.1692'

    References:
        Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015).
    """
    pair = compare(student, teacher, class_dim, valid, standardize)
    with exact(student):
        if pair.whole:
            log_q, log_p = (F.log_softmax(logits / temperature, dim=-1) for logits in (pair.student, pair.teacher))
            return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean() * temperature**2
        return mean(divergence(pair.student / temperature, pair.teacher / temperature), pair.counts) * temperature**2


@dataclass(frozen=True)
class SoftTarget(LogitLoss):
    """Soft targets, ``T² · KL(softmax(teacher / T), softmax(student / T))``: see :func:`soft_target`.

    For classes that exclude each other. Labels that don't (multi-label) have no softmax: use :class:`LogitMSE`.

    Args:
        temperature: T > 0; higher values show the student more of what the teacher finds similar.
        weight: Factor in the sum of all terms.
        class_dim: Where the classes stand in the logits: -1 for (B, C) and (B, T, C), 1 for (B, C, H, W).
        standardize: Compare standardised logits (Sun et al., 2024), whose usual temperature is 2 and weight 9.

    Raises:
        CompressionError: If a value is out of range.

    Example:
        >>> import torch
        >>> loss = SoftTarget(temperature=4.0)
        >>> f"{loss(torch.zeros(1, 3), torch.zeros(1, 3)):.1f}"
        '0.0'
    """

    temperature: float = 2.0
    weight: float = 0.75
    class_dim: int = -1
    standardize: bool = False

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        check_weight("weight", self.weight)
        check_dim("class_dim", self.class_dim)

    def __call__(
        self, student: Tensor, teacher: Tensor, valid: Tensor | None = None, targets: Tensor | None = None
    ) -> Tensor:
        return soft_target(student, teacher, self.temperature, self.class_dim, valid, standardize=self.standardize)


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
