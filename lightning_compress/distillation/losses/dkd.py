"""Decoupled knowledge distillation: the target class apart from all others."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compress.distillation.losses.arithmetic import exact, mean
from lightning_compress.distillation.losses.base import LogitLoss, check_dim, check_temperature, check_weight
from lightning_compress.distillation.losses.logits import compare, divergence
from lightning_compress.errors import invalid


def dkd(
    student: Tensor,
    teacher: Tensor,
    targets: Tensor,
    temperature: float,
    alpha: float = 1.0,
    beta: float = 8.0,
    class_dim: int = -1,
    valid: Tensor | None = None,
    standardize: bool = False,
) -> Tensor:
    """Decoupled knowledge distillation: the divergence on the target class apart from that on all others.

    ``T² · mean over valid positions of (α · TCKD + β · NCKD)``. TCKD is the divergence of the two binary distributions
    (p_t, 1 - p_t) and (q_t, 1 - q_t), NCKD that of the distributions over the other classes, each normalised by
    itself. With ``β = 1 - p_t`` this would be :func:`soft_target`. With two classes NCKD is 0, and ``α = 1`` gives
    :func:`soft_target`.

    Args:
        student: Logits, any shape with the classes along ``class_dim``.
        teacher: Logits of the same shape.
        targets: The true classes, integers of the logits' shape without ``class_dim``. A position whose target is no
            class (such as -100), or one that is masked, doesn't count.
        temperature: T > 0.
        alpha: Weight of TCKD.
        beta: Weight of NCKD.
        class_dim: Where the classes stand.
        valid: Optional, which positions count: a boolean tensor of the targets' shape.
        standardize: Compare :func:`standardize_logits` of both.

    Returns:
        A scalar in float32 (float64 for float64 logits).

    Raises:
        CompressionError: If the shapes differ, there is only one class, or the targets are no classes.

    Example:
        >>> from lightning_compress.distillation.losses.soft_target import soft_target
        >>> student, teacher = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        >>> f"{dkd(student, teacher, torch.tensor([0]), 1.0):.4f} {soft_target(student, teacher, 1.0):.4f}"
        '1.5232 1.5232'

    References:
        Zhao et al., "Decoupled Knowledge Distillation" (2022), eq. 7.
    """
    pair = compare(student, teacher, class_dim, valid, standardize)
    _check_targets(targets, pair.counts.shape)
    with exact(student):
        classes = pair.student.shape[-1]
        target = targets.long().clamp(0, classes - 1).unsqueeze(-1)
        counts = pair.counts & (targets >= 0) & (targets < classes) & pair.unmasked.gather(-1, target).squeeze(-1)
        counts = counts & pair.unmasked.scatter(-1, target, False).any(-1)
        # Filled, as in `compare`: with the target or all others masked, a difference of two -inf would arise.
        sides = [logits.where(counts.unsqueeze(-1), 0.0) / temperature for logits in (pair.student, pair.teacher)]
        others = [logits.scatter(-1, target, -math.inf) for logits in sides]
        log_q, log_p = (_binary(logits, target) for logits in sides)
        tckd, nckd = (log_p.exp() * (log_p - log_q)).sum(-1), divergence(*others)
        return mean(alpha * tckd + beta * nckd, counts) * temperature**2


@dataclass(frozen=True)
class DKD(LogitLoss):
    """Decoupled knowledge distillation, ``T² · (α · TCKD + β · NCKD)``: see :func:`dkd`.

    The batch's targets must be classes. The authors let its weight grow over the first twenty of 240 epochs, which
    ``Ramp("dkd", window=Window(0.0, 0.08))`` does.

    Args:
        temperature: T > 0.
        alpha: Weight of the divergence on the target class, within the loss.
        beta: Weight of the divergence over the other classes, within the loss.
        weight: Factor in the sum of all terms.
        class_dim: Where the classes stand in the logits: -1 for (B, C) and (B, T, C), 1 for (B, C, H, W).
        standardize: Compare standardised logits.

    Raises:
        CompressionError: If a value is out of range; when called, if there are no targets.

    Example:
        >>> f"{DKD()(torch.zeros(2, 3), torch.zeros(2, 3), targets=torch.tensor([0, 2])):.1f}"
        '0.0'
    """

    temperature: float = 4.0
    alpha: float = 1.0
    beta: float = 8.0
    weight: float = 1.0
    class_dim: int = -1
    standardize: bool = False

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        for name in ("alpha", "beta", "weight"):
            check_weight(name, getattr(self, name))
        check_dim("class_dim", self.class_dim)

    def __call__(
        self, student: Tensor, teacher: Tensor, valid: Tensor | None = None, targets: Tensor | None = None
    ) -> Tensor:
        if not isinstance(targets, Tensor):
            raise invalid("targets", "be a tensor of classes for DKD", type(targets).__name__, "Use SoftTarget.")
        return dkd(
            student,
            teacher,
            targets,
            self.temperature,
            self.alpha,
            self.beta,
            self.class_dim,
            valid,
            standardize=self.standardize,
        )


def _binary(logits: Tensor, target: Tensor) -> Tensor:
    """``(log p_t, log (1 - p_t))``, the latter as a sum over the other classes: 1 - p_t would round to 0."""
    logs = F.log_softmax(logits, dim=-1)
    rest = logs.scatter(-1, target, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logs.gather(-1, target), rest], -1)


def _check_targets(targets: Tensor, shape: torch.Size) -> None:
    if targets.is_floating_point() or targets.dtype == torch.bool or targets.shape != shape:
        raise invalid(
            "targets",
            f"be classes, integers of the positions' shape {tuple(shape)}",
            (str(targets.dtype), tuple(targets.shape)),
            "DKD takes the true class apart from the others; with mixed or soft labels use SoftTarget.",
        )
