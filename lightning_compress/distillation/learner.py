"""`Learner`: student, adapters and a frozen teacher as one `nn.Module` that computes the loss; it needs no Trainer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from lightning_compress.distillation.adapters import Adapters
from lightning_compress.distillation.features import Taps
from lightning_compress.distillation.losses import DistillationLoss, FeatureLoss, SoftTarget
from lightning_compress.distillation.objective import (
    buffers_kept,
    check_logits,
    distillation_terms,
    dry_run,
    find_logits,
    merge_adapters_,
    name_losses,
    plan_adapters,
    to_device_of,
)
from lightning_compress.distillation.teacher import Teacher, call, shared_with
from lightning_compress.errors import invalid


class Learner(nn.Module):
    """What :class:`DistillationModule` is without Lightning; its arguments are explained there."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        losses: list[DistillationLoss] | None,
        task_loss: nn.Module | None,
        task_weight: float,
        teacher_checkpoint: str | None,
    ) -> None:
        super().__init__()
        number = isinstance(task_weight, int | float) and not isinstance(task_weight, bool)
        if not (number and math.isfinite(task_weight) and task_weight >= 0):
            raise invalid("task_weight", "be a finite number, at least 0", task_weight)
        self.losses = name_losses([SoftTarget()] if losses is None else losses)
        if not self.losses and task_weight == 0:
            raise invalid("losses", "name something to learn", losses, "`task_weight` is 0 too.")
        self.student = student
        self.adapters = Adapters()
        self.task_loss = nn.CrossEntropyLoss() if task_loss is None else task_loss
        self.task_weight = task_weight
        self.teacher_checkpoint = teacher_checkpoint
        features = [loss for loss in self.losses.values() if isinstance(loss, FeatureLoss)]
        self._student_taps = Taps([str(loss.student_layer) for loss in features], "student_layer")
        self._teacher_layers = [str(loss.teacher_layer) for loss in features]
        self._prepared = self._checked = False
        self.teacher = teacher

    # What a subclass may override -------------------------------------------------------------------------------

    def split_batch(self, batch: Any) -> tuple[Any, Any]:
        """Split a batch into the models' inputs and the targets of the task loss; ``(x, y)`` by default.

        Inputs: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments. Targets may be None
        where ``task_weight`` is 0, and in prediction.
        """
        if isinstance(batch, Tensor):
            return batch, None
        if isinstance(batch, tuple | list) and len(batch) in (1, 2):
            return batch[0], batch[1] if len(batch) == 2 else None
        received = list(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise invalid("batch", "be a pair (inputs, targets)", received, "Override `split_batch`.")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The student's outputs."""
        return self.student(*args, **kwargs)

    def teacher_inputs(self, inputs: Any) -> Any:
        """What the teacher gets in place of the student's ``inputs``: another normalisation or resolution."""
        return inputs

    def logits(self, outputs: Any) -> Tensor:
        """The logits within the outputs of student or teacher: see :func:`~.objective.find_logits`."""
        return find_logits(outputs)

    def valid_positions(self, batch: Any) -> Tensor | None:
        """Which positions of the logits the losses count, as a boolean tensor; None: all."""
        return None

    def compute_task_loss(self, outputs: Any, targets: Any) -> Tensor:
        """The student's own loss: ``task_loss(logits, targets)``."""
        loss: Tensor = self.task_loss(self.logits(outputs), targets)
        return loss

    # The teacher ------------------------------------------------------------------------------------------------

    def __setattr__(self, name: str, value: Any) -> None:
        # As a module's attribute it would be registered, saved, averaged and trained.
        if name != "teacher":
            super().__setattr__(name, value)
        else:
            object.__setattr__(self, name, value)

    @property
    def teacher(self) -> nn.Module | None:
        """The frozen teacher; it may be set until ``fit`` starts."""
        return self._teacher.module

    @teacher.setter
    def teacher(self, teacher: nn.Module | None) -> None:
        if teacher is not None and (error := shared_with(teacher, self.student)) is not None:
            raise error
        self._prepared = False
        self._teacher = Teacher(teacher, Taps(self._teacher_layers, "teacher_layer"))

    def teacher_outputs(self, inputs: Any) -> Any:
        """The teacher's outputs for the student's ``inputs``, without a graph."""
        return self._teacher(self.teacher_inputs(inputs), like=self.student)

    # The work ---------------------------------------------------------------------------------------------------

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What the optimizer trains: student, adapters and task loss, as far as they ask for gradients."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def prepare_(self, inputs: Any = None) -> None:
        """Check teacher, layers and shapes, and make the adapters. ``fit`` calls it; a hand-written loop does so first.

        Args:
            inputs: An example of the models' inputs; needed where a loss compares features.

        Raises:
            CompressionError: If something doesn't fit; the module is as it was.
        """
        self._teacher.require()
        planned: dict[str, nn.Module] = {}
        taps = (self._student_taps, self._teacher.taps)
        if inputs is not None:
            inputs = to_device_of(inputs, self.student)
            shapes = dry_run(
                lambda x: self.logits(call(self, x)),
                lambda x: self.logits(self.teacher_outputs(x)),
                self.student,
                taps,
                self._teacher,
                inputs,
            )
            planned = plan_adapters(self.losses, shapes, self.student)
        elif len(self._student_taps):
            raise invalid(
                "example_input_array",
                "be set on the module or the student, as the losses compare features",
                None,
                "A batch can only be borrowed from a DataLoader over a map-style dataset.",
            )
        if self.teacher_checkpoint is not None:
            self._teacher.load_once(self.teacher_checkpoint)
        merge_adapters_(self.adapters, planned)
        self._prepared, self._checked = True, inputs is not None

    def distill(self, batch: Any) -> tuple[Tensor, dict[str, Tensor], Any]:
        """One step on ``batch``: the total loss, each raw term by name, and the student's outputs."""
        inputs, targets = self.split_batch(batch)
        self._attach()
        # The first step may still find that something doesn't fit; BatchNorm must not have moved then.
        first = nullcontext() if self._checked else buffers_kept(self.student, on_error_only=True)
        with self._student_taps.listen(), self._teacher.taps.listen(), first:
            outputs, theirs = call(self, inputs), self.teacher_outputs(inputs)
            logits = (self.logits(outputs), self.logits(theirs))
            check_logits(*logits)
            taps = (self._student_taps, self._teacher.taps)
            terms = distillation_terms(self.losses, logits, taps, self.adapters, self.valid_positions(batch), targets)
            weighted = [self.losses[name].weight * value for name, value in terms.items()]
            if self.task_weight > 0:
                terms = {"task": self._task(outputs, targets), **terms}
                weighted.insert(0, self.task_weight * terms["task"])
        self._checked = True
        return sum(weighted[1:], weighted[0]), terms, outputs

    def close(self) -> None:
        """Take the taps off and send the teacher home; safe to call at any time."""
        self._student_taps.detach(self.student)
        if self._teacher.module is not None:
            self._teacher.taps.detach(self._teacher.module)
            self._teacher.return_home()
        self._prepared = self._checked = False

    def _attach(self) -> None:
        teacher = self._teacher.require()
        if not self._student_taps.attached:
            self._teacher.taps.find(teacher)  # both are checked before either is touched
            self._student_taps.attach(self.student)
        if not self._teacher.taps.attached:
            self._teacher.taps.attach(teacher)

    def _task(self, outputs: Any, targets: Any) -> Tensor:
        if targets is None:
            raise invalid("batch", "hold targets for the task loss", None, "Override `split_batch`, or the step.")
        return self.compute_task_loss(outputs, targets)

    def _weight(self, name: str) -> float:
        return self.losses[name].weight if name in self.losses else self.task_weight
