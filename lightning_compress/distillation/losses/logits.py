"""Losses between logits; the formulas stand in `functional.logits`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightning_compress.distillation import functional
from lightning_compress.distillation.losses.base import LogitLoss, check_dim, check_number, check_weight
from lightning_compress.errors import invalid

_USUAL = "Usual values: 1 to 10."


@dataclass(frozen=True)
class SoftTarget(LogitLoss):
    """Soft targets: see :func:`~.functional.soft_target` for the formula.

    For classes that exclude each other. Labels that don't (multi-label) have no softmax: use :class:`LogitMSE`.

    Args:
        temperature: T > 0; higher values show the student more of what the teacher finds similar.
        weight: Factor in the sum of all terms.
        class_dim: Where the classes stand in the logits: -1 for (B, C) and (B, T, C), 1 for (B, C, H, W).
        standardize: Compare standardised logits (Sun et al., 2024), whose usual temperature is 2 and weight 9.

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
    standardize: bool = False

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, remedy=_USUAL)
        check_weight("weight", self.weight)
        check_dim("class_dim", self.class_dim)

    def __call__(
        self, student: Tensor, teacher: Tensor, valid: Tensor | None = None, targets: Tensor | None = None
    ) -> Tensor:
        return functional.soft_target(
            student, teacher, self.temperature, self.class_dim, valid, standardize=self.standardize
        )


@dataclass(frozen=True)
class HardTarget(LogitLoss):
    """Hard targets, the teacher's own choice as the label: see :func:`~.functional.hard_target` for the formula.

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
        return functional.hard_target(student, teacher, self.class_dim, valid)


@dataclass(frozen=True)
class LogitMSE(LogitLoss):
    """Mean squared error of logits, or of the outputs of a regression: see :func:`~.functional.logit_mse`.

    Args:
        weight: Factor in the sum of all terms.
        class_dim: Where the classes stand in the logits: -1 for (B, C) and (B, T, C), 1 for (B, C, H, W).
        standardize: Compare standardised logits; twice one minus Pearson's correlation.

    Raises:
        CompressionError: If a value is out of range.

    Example:
        >>> import torch
        >>> f"{LogitMSE()(torch.zeros(1, 3), torch.full((1, 3), 2.0)):.1f}"
        '4.0'
    """

    weight: float = 0.5
    class_dim: int = -1
    standardize: bool = False

    of_classes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_weight("weight", self.weight)
        check_dim("class_dim", self.class_dim)

    def __call__(
        self, student: Tensor, teacher: Tensor, valid: Tensor | None = None, targets: Tensor | None = None
    ) -> Tensor:
        return functional.logit_mse(student, teacher, self.class_dim, valid, standardize=self.standardize)


@dataclass(frozen=True)
class DKD(LogitLoss):
    """Decoupled knowledge distillation: see :func:`~.functional.dkd` for the formula.

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
        >>> import torch
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
        check_number("temperature", self.temperature, remedy=_USUAL)
        for name in ("alpha", "beta", "weight"):
            check_weight(name, getattr(self, name))
        check_dim("class_dim", self.class_dim)

    def __call__(
        self, student: Tensor, teacher: Tensor, valid: Tensor | None = None, targets: Tensor | None = None
    ) -> Tensor:
        if not isinstance(targets, Tensor):
            raise invalid("targets", "be a tensor of classes for DKD", type(targets).__name__, "Use SoftTarget.")
        return functional.dkd(
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


@dataclass(frozen=True)
class DIST(LogitLoss):
    """Correlations of the predictions, for teachers much stronger than the student: see :func:`~.functional.dist`.

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
        check_number("temperature", self.temperature, remedy=_USUAL)
        for name in ("beta", "gamma", "weight"):
            check_weight(name, getattr(self, name))
        check_dim("class_dim", self.class_dim)

    def __call__(
        self, student: Tensor, teacher: Tensor, valid: Tensor | None = None, targets: Tensor | None = None
    ) -> Tensor:
        return functional.dist(
            student,
            teacher,
            self.temperature,
            self.beta,
            self.gamma,
            self.class_dim,
            valid,
            standardize=self.standardize,
        )
