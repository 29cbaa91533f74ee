"""Correlations of predictions, for teachers much stronger than the student."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_compress.distillation.losses.arithmetic import exact, mean, unit
from lightning_compress.distillation.losses.base import LogitLoss, check_dim, check_temperature, check_weight
from lightning_compress.distillation.losses.logits import centre, compare


def dist(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
    class_dim: int = -1,
    valid: Tensor | None = None,
    standardize: bool = False,
) -> Tensor:
    """Distance of correlations: only the relations within the teacher's predictions are imitated, not their scale.

    ``T² · (β · mean over positions of (1 - ρ(q_i, p_i)) + γ · mean over classes of (1 - ρ(q^c, p^c)))``: Pearson's
    correlation ρ of the softened distributions, over the classes of one position (inter-class), and over the
    positions for one class (intra-class). The second needs two positions or more. Where either side is constant, its
    correlation counts as 0.

    Args:
        student: Logits, any shape with the classes along ``class_dim``.
        teacher: Logits of the same shape.
        temperature: T > 0.
        beta: Weight of the inter-class term.
        gamma: Weight of the intra-class term.
        class_dim: Where the classes stand.
        valid: Optional, which positions count: a boolean tensor of the logits' shape without ``class_dim``.
        standardize: Compare :func:`standardize_logits` of both.

    Returns:
        A scalar in float32 (float64 for float64 logits).

    Raises:
        CompressionError: If the shapes differ, or there is only one class.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 3.0]])
        >>> abs(float(dist(logits, logits))) < 1e-6
        True

    References:
        Huang et al., "Knowledge Distillation from A Stronger Teacher" (2022), eqs. 8 to 10.
    """
    pair = compare(student, teacher, class_dim, valid, standardize)
    with exact(student):
        unmasked = (pair.unmasked & pair.counts.unsqueeze(-1)).reshape(-1, pair.unmasked.shape[-1])
        q, p = (
            (logits / temperature).softmax(-1).reshape(unmasked.shape).where(unmasked, 0.0)
            for logits in (pair.student, pair.teacher)
        )
        inter = mean(1 - _correlation(q, p, unmasked, -1), pair.counts.flatten())
        intra = mean(1 - _correlation(q, p, unmasked, 0), unmasked.sum(0) > 1)
        return (beta * inter + gamma * intra) * temperature**2


@dataclass(frozen=True)
class DIST(LogitLoss):
    """Correlations of predictions, ``T² · (β · inter + γ · intra)``, for much stronger teachers: see :func:`dist`.

    Args:
        temperature: T > 0; the authors use 1 on ImageNet and 4 on CIFAR-100.
        beta: Weight of the correlation over classes, within the loss.
        gamma: Weight of the correlation over the batch, within the loss.
        weight: Factor in the sum of all terms.
        class_dim: Where the classes stand in the logits: -1 for (B, C) and (B, T, C), 1 for (B, C, H, W).
        standardize: Compare standardised logits.

    Raises:
        CompressionError: If a value is out of range.

    Example:
        >>> import torch
        >>> abs(float(DIST()(torch.eye(3), 2 * torch.eye(3)))) < 1e-6
        True
    """

    temperature: float = 1.0
    beta: float = 1.0
    gamma: float = 1.0
    weight: float = 2.0
    class_dim: int = -1
    standardize: bool = False

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        for name in ("beta", "gamma", "weight"):
            check_weight(name, getattr(self, name))
        check_dim("class_dim", self.class_dim)

    def __call__(
        self, student: Tensor, teacher: Tensor, valid: Tensor | None = None, targets: Tensor | None = None
    ) -> Tensor:
        return dist(
            student,
            teacher,
            self.temperature,
            self.beta,
            self.gamma,
            self.class_dim,
            valid,
            standardize=self.standardize,
        )


def _correlation(x: Tensor, y: Tensor, unmasked: Tensor, dim: int) -> Tensor:
    return (unit(centre(x, unmasked, dim), dim) * unit(centre(y, unmasked, dim), dim)).sum(dim)
