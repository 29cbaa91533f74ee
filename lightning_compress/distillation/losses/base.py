"""What all losses share: a weight, a name, and what they compare. A loss of your own derives from these classes."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from lightning_compress.errors import invalid, is_number


class DistillationLoss(ABC):  # noqa: B024 - its two kinds declare what they are called with
    """Base of all losses: a ``weight`` in the sum of all terms, and a ``name`` in the log."""

    weight: float = 1.0

    @property
    def name(self) -> str:
        """The name in the log: the class name in lower case.

        Example:
            >>> from lightning_compress import SoftTarget
            >>> SoftTarget().name
            'soft_target'
        """
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", type(self).__name__)
        return words.lower()


class LogitLoss(DistillationLoss):
    """A loss between the logits of student and teacher, whose classes stand along ``class_dim``.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class LogitL1(LogitLoss):
        ...     weight: float = 0.5
        ...
        ...     def __call__(self, student, teacher, valid=None, targets=None):
        ...         return (student - teacher).abs().mean()
        >>> LogitL1(weight=2.0).name
        'logit_l1'
    """

    class_dim: int = -1

    of_classes: ClassVar[bool] = True
    """Whether the loss is for classes alone; False where it may compare the outputs of a regression too."""

    @abstractmethod
    def __call__(
        self, student: Tensor, teacher: Tensor, valid: Tensor | None = None, targets: Tensor | None = None
    ) -> Tensor:
        """Compute the unweighted loss, a scalar.

        Args:
            student: Logits.
            teacher: Logits of the same shape.
            valid: Which positions count, a boolean tensor of the logits' shape without ``class_dim``; None: all.
            targets: The batch's targets, for losses that look at the true class.
        """


class FeatureLoss(DistillationLoss):
    """A loss between the inputs or outputs of two layers, named by path: see :func:`~.taps.parse`.

    ``pairs="auto"`` in place of the two layers pairs the deepest layers of each resolution that both models have, which
    suits models of one kind: what ends a resolution in a CNN may begin it in a transformer.

    Raises:
        CompressionError: If not both layers or ``pairs`` are named, or the weight is out of range.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class FeatureL1(FeatureLoss):
        ...     student_layer: str | None = None
        ...     teacher_layer: str | None = None
        ...     weight: float = 0.5
        ...
        ...     def __call__(self, student, teacher, valid=None):
        ...         return (student - teacher).abs().mean()
        >>> FeatureL1("features", "features").name
        'feature_l1'
    """

    student_layer: str | None = None
    teacher_layer: str | None = None
    pairs: Literal["auto"] | None = None

    adapts: ClassVar[bool] = True
    """Whether the loss needs an adapter where the student's features differ in shape from the teacher's."""

    def __post_init__(self) -> None:
        named = [layer for layer in (self.student_layer, self.teacher_layer) if layer is not None]
        if self.pairs not in (None, "auto"):
            raise invalid("pairs", "be 'auto', or left out where the layers are named", self.pairs)
        if len(named) != (0 if self.pairs else 2):
            raise invalid(
                "student_layer",
                "be named together with `teacher_layer`, or both be left out with pairs='auto'",
                self.student_layer,
                f"`teacher_layer` is {self.teacher_layer!r}, `pairs` is {self.pairs!r}.",
            )
        check_weight("weight", self.weight)

    @abstractmethod
    def __call__(self, student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
        """Compute the unweighted loss, a scalar.

        Args:
            student: Features (B, ...), of the teacher's shape if ``adapts``.
            teacher: Features (B, ...).
            valid: Which samples (B,) or positions (B, L) count; None: all.
        """


@dataclass(frozen=True)
class LayerLoss(FeatureLoss):
    """The fields of the package's own losses of features."""

    student_layer: str | None = None
    teacher_layer: str | None = None
    weight: float = 1.0
    pairs: Literal["auto"] | None = None


def check_temperature(value: float) -> None:
    """Raise unless ``value`` is a finite number above 0."""
    if not (is_number(value) and value > 0):
        raise invalid("temperature", "be a finite number above 0", value, "Usual values: 1 to 10.")


def check_weight(name: str, value: float) -> None:
    """Raise unless ``value`` is a finite number, at least 0."""
    if not (is_number(value) and value >= 0):
        raise invalid(name, "be a finite number, at least 0", value)


def check_dim(name: str, dim: int) -> None:
    """Raise unless ``dim`` may be a dimension other than the batch."""
    if isinstance(dim, bool) or not isinstance(dim, int) or dim == 0:
        raise invalid(name, "be a dimension other than 0, which is the batch", dim, "Usual: -1 or 1.")


def name_losses(losses: Iterable[DistillationLoss]) -> dict[str, DistillationLoss]:
    """Name the losses as in the log; a name that comes again is numbered.

    Example:
        >>> from lightning_compress import SoftTarget
        >>> list(name_losses([SoftTarget(), SoftTarget(temperature=8.0)]))
        ['soft_target', 'soft_target_2']
    """
    named: dict[str, DistillationLoss] = {}
    for loss in losses:
        name, count = loss.name, 2
        while name in named:
            name, count = f"{loss.name}_{count}", count + 1
        named[name] = loss
    return named
