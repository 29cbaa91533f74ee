"""How teacher and student compare on a batch: what to know of a teacher before hours of training are spent."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy

from lightning_compress.distillation.losses.soft_target import soft_target


@dataclass(frozen=True)
class TeacherCheck:
    """What one batch says of a teacher.

    Attributes:
        positions: How many predictions there are.
        classes: How many classes there are.
        entropy: Of the teacher's predictions, mean in nats; at most log(classes).
        agreement: Fraction of positions where teacher and student choose the same class.
        probabilities: Whether the teacher puts out probabilities instead of logits.
        teacher: The teacher's accuracy; None where the targets are no classes.
        student: The student's accuracy.
    """

    positions: int
    classes: int
    entropy: float
    agreement: float
    probabilities: bool
    teacher: float | None
    student: float | None

    def __str__(self) -> str:
        accuracy = "" if self.teacher is None else f"accuracy {self.teacher:.3f} (student {self.student:.3f}), "
        return (
            f"teacher on the first {self.positions:,} predictions: {accuracy}entropy {self.entropy:.3f} of at most "
            f"{math.log(self.classes):.3f} nats, same choice as the student's on {self.agreement:.3f}"
        )

    def warnings(self) -> list[str]:
        """What looks wrong with the teacher, beyond what so few predictions leave to chance."""
        if self.probabilities:
            return [
                "The teacher puts out probabilities, where logits are compared: after another softmax they say almost "
                "nothing. Leave its softmax out, or override `logits` to take their logarithm."
            ]
        if self.teacher is None or self.student is None:
            return []
        chance = 1 / self.classes
        halfway = (1 + chance) / 2
        # As bad as guessing, and on enough predictions that a fair teacher would have that once in a hundred times.
        near = self.teacher <= chance + self._error(chance)
        if near and self.teacher < halfway - 2.33 * self._error(halfway):
            return [
                f"The teacher's accuracy is near chance: {self.teacher:.3f} on {self.positions:,} predictions, where "
                f"guessing among {self.classes} classes gives {chance:.3f}. Check its weights (`teacher_checkpoint`), "
                "its normalisation and resolution (`teacher_adapter`) and the order of its classes."
            ]
        if self.teacher < self.student - 2.33 * math.hypot(self._error(self.teacher), self._error(self.student)):
            return [
                f"The teacher is behind the student: accuracy {self.teacher:.3f} against {self.student:.3f} on "
                f"{self.positions:,} predictions. A student seldom gains from a weaker teacher."
            ]
        return []

    def _error(self, accuracy: float) -> float:
        return math.sqrt(accuracy * (1 - accuracy) / self.positions)


@torch.no_grad()
def check_teacher(
    student: Tensor, teacher: Tensor, targets: object, class_dim: int, valid: Tensor | None = None
) -> TeacherCheck | None:
    """Compare the logits of student and teacher on one batch; None where no position counts.

    Example:
        >>> logits = torch.eye(3) * 9
        >>> check = check_teacher(torch.zeros(3, 3), logits, torch.tensor([0, 1, 2]), -1)
        >>> check.teacher, round(check.agreement, 3), round(check.entropy, 3)
        (1.0, 0.333, 0.002)
    """
    student, teacher = student.movedim(class_dim, -1), teacher.movedim(class_dim, -1)
    counts = torch.ones_like(student[..., 0], dtype=torch.bool) if valid is None else valid.bool()
    labels = targets if isinstance(targets, Tensor) and is_classes(targets, counts.shape) else None
    if labels is not None:
        counts = counts & (labels >= 0) & (labels < student.shape[-1])
    student, teacher = student[counts].float(), teacher[counts].float()
    if not len(student):
        return None
    accuracies = [
        None if labels is None else (logits.argmax(-1) == labels[counts]).float().mean().item()
        for logits in (student, teacher)
    ]
    return TeacherCheck(
        positions=len(student),
        classes=student.shape[-1],
        entropy=torch.distributions.Categorical(logits=teacher, validate_args=False).entropy().mean().item(),
        probabilities=bool(((teacher >= 0) & (teacher <= 1)).all() and (teacher.sum(-1) - 1).abs().max() < 1e-3),
        agreement=(student.argmax(-1) == teacher.argmax(-1)).float().mean().item(),
        teacher=accuracies[1],
        student=accuracies[0],
    )


@torch.no_grad()
def closeness(
    student: Tensor, teacher: Tensor, class_dim: int, valid: Tensor | None = None
) -> tuple[dict[str, Tensor], int]:
    """Compute how close two predictions are, and over how many positions that is a mean.

    Returns:
        ``agreement``, the fraction of positions with the same first choice, and ``kl``, the divergence at temperature
        1 in nats; and the number of positions.

    Example:
        >>> values, count = closeness(torch.eye(2), torch.eye(2).flip(0), -1)
        >>> float(values["agreement"]), round(float(values["kl"]), 3), count
        (0.0, 0.462, 2)
    """
    same = (student.argmax(class_dim) == teacher.argmax(class_dim)).float()
    counts = torch.ones_like(same, dtype=torch.bool) if valid is None else valid.bool()
    count = int(counts.sum())
    agreement = same.where(counts, 0.0).sum() / max(count, 1)
    return {"agreement": agreement, "kl": soft_target(student, teacher, 1.0, class_dim, valid)}, count


def accuracy(
    logits: Tensor, targets: object, class_dim: int | None, valid: Tensor | None, ignore_index: int | None
) -> tuple[Tensor, int] | None:
    """Compute the accuracy, and over how many positions; None unless the targets are classes along ``class_dim``.

    Example:
        >>> value, count = accuracy(torch.eye(3), torch.tensor([0, 1, -100]), -1, None, ignore_index=-100)
        >>> float(value), count
        (1.0, 2)
    """
    if class_dim is None or not isinstance(targets, Tensor):
        return None
    classes = logits.detach().movedim(class_dim, 1).float()
    if not is_classes(targets, classes.shape[:1] + classes.shape[2:]):
        return None
    ignored = -100 if ignore_index is None else ignore_index
    if valid is not None:
        targets = targets.masked_fill(~valid.bool(), ignored)
    value = multiclass_accuracy(
        classes, targets, classes.shape[1], average="micro", ignore_index=ignored, validate_args=False
    )
    return value, int((targets != ignored).sum())


def find_class_dim(logits: Tensor, targets: object) -> int | None:
    """Find the dimension of the classes, 1 or the last; None unless ``targets`` are classes of ``logits``.

    Example:
        >>> find_class_dim(torch.zeros(2, 5, 7), torch.zeros(2, 5, dtype=torch.long))
        -1
    """
    wide = (dim for dim in (1, -1) if logits.dim() > 1 and logits.shape[dim] > 1)
    return next((dim for dim in wide if is_classes(targets, logits.movedim(dim, -1).shape[:-1])), None)


def is_classes(targets: object, shape: torch.Size) -> bool:
    """Whether ``targets`` are integers of this shape."""
    return (
        isinstance(targets, Tensor)
        and not (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool)
        and targets.shape == shape
    )
