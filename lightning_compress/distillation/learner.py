"""`Learner`: an `nn.Module` of student and adapters that computes the loss against a teacher, without a Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from lightning_compress.distillation.calling import call, find_logits
from lightning_compress.distillation.dry_run import DistillationPlan
from lightning_compress.distillation.losses.base import DistillationLoss
from lightning_compress.distillation.objective import Objective, sum_terms
from lightning_compress.distillation.ramps import TASK
from lightning_compress.distillation.taps import drop_taps_
from lightning_compress.distillation.teacher import check_is_module, refuse_shared
from lightning_compress.errors import CompressionError, invalid
from lightning_compress.modules.calls import to_device_of
from lightning_compress.modules.copying import copy_module, copy_tensors
from lightning_compress.modules.isolation import restored_on_error
from lightning_compress.quantization import convert
from lightning_compress.structure.change import to_float_


class Learner(nn.Module):
    """What :class:`DistillationModule` is without Lightning; that class explains the arguments."""

    def __init__(
        self, student: nn.Module, teacher: nn.Module | None, objective: Objective, task_loss: nn.Module | None = None
    ) -> None:
        super().__init__()
        if not isinstance(student, nn.Module):
            raise invalid("student", "be a module", student, "Make one: student=Small(...).")
        self.objective = objective
        self.student = student
        self.adapters = objective.adapters
        self.task_loss = nn.CrossEntropyLoss() if task_loss is None else task_loss
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
        """Return the student's outputs."""
        return self.student(*args, **kwargs)

    def student_inputs(self, inputs: Any) -> Any:
        """Return what the student gets of the ``inputs``, where the two models get different ones."""
        return inputs

    def teacher_inputs(self, inputs: Any) -> Any:
        """Return what the teacher gets of the ``inputs``, before its ``teacher_adapter``."""
        return inputs

    def logits(self, outputs: Any) -> Tensor:
        """Find the logits within the outputs of student or teacher: see :func:`~.calling.find_logits`."""
        return find_logits(outputs)

    def valid_positions(self, batch: Any) -> Tensor | None:
        """Return which positions of the logits the losses count, as a boolean tensor; None: all."""
        return None

    def compute_task_loss(self, outputs: Any, targets: Any) -> Tensor:
        """Compute the student's own loss: ``task_loss(logits, targets)``."""
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
        return self.objective.teacher.given

    @teacher.setter
    def teacher(self, teacher: nn.Module | None) -> None:
        check_is_module(teacher)
        if teacher is not None:
            refuse_shared(teacher, self.student)
        self._prepared = False
        self.objective.detach(self.student)
        self.objective.set_teacher(teacher)
        self.objective.teacher.freeze_()  # before DDP wraps the student, and before anyone counts parameters

    @property
    def losses(self) -> Mapping[str, DistillationLoss]:
        """The losses by their names in the log."""
        return self.objective.losses

    @property
    def task_weight(self) -> float:
        """Factor of the task loss, at the end of its ramp."""
        return self.objective.task_weight

    def teacher_outputs(self, inputs: Any) -> Any:
        """Return the teacher's outputs for ``inputs``, without a graph."""
        return self.objective.teacher(self.teacher_inputs(inputs), like=self.student)

    @property
    def compares_classes(self) -> bool:
        """Whether the logits are those of classes: a loss says so, or the task whose targets look like classes."""
        if self.objective.compares_logits and not self.objective.compares_classes:
            # A loss for regressions; only a task loss that is given the targets makes classes of them.
            return self.task_weight > 0 and type(self).compute_task_loss is Learner.compute_task_loss
        return True

    # The work ---------------------------------------------------------------------------------------------------

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the optimizer trains: those of student, adapters and task loss with gradients."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def prepare_(self, inputs: Any = None) -> DistillationPlan | None:
        """Check teacher, layers and shapes, and make the adapters. ``fit`` calls it; a hand-written loop does so first.

        Args:
            inputs: An example of the models' inputs; needed where a loss compares features.

        Returns:
            The plan, which can be printed; None without an example.

        Raises:
            CompressionError: If something doesn't fit; the module is as it was.
        """
        objective, plan = self.objective, None
        if inputs is None and objective.needs_example:
            raise invalid(
                "example_input_array",
                "be set on the module or the student, as the losses compare features",
                None,
                "A batch can only be borrowed from a DataLoader over a map-style dataset, or a list.",
            )
        if objective.losses:
            # The student may keep what it saw, its forward may differ in training, and it may be int8: all on a copy.
            twin = copy_module(self)
            to_float_(twin)
            drop_taps_(twin.student)
            objective.teacher.take_(twin.student)
            objective.teacher.require()
            if inputs is not None:
                plan = objective.plan(twin.student, lambda: twin._try(to_device_of(inputs, self.student)))
            objective.teacher.load_once()
        if plan is not None:
            objective.apply_(plan, self.student)
        self._prepared, self._checked = True, plan is not None
        return plan

    def distill(self, batch: Any) -> tuple[Tensor, dict[str, Tensor], Any]:
        """Run one step on ``batch``.

        Returns:
            The total loss, each raw term by name, and the student's outputs.
        """
        terms, outputs = self.compute_terms(batch)
        return sum_terms(terms, self.objective.weights()), terms, outputs

    def compute_terms(self, batch: Any) -> tuple[dict[str, Tensor], Any]:
        """Compute the raw terms by name, the task's first, and the student's outputs."""
        inputs, targets = self.split_batch(batch)
        self.objective.attach(self.student)
        # The first step may still find that something doesn't fit; BatchNorm must not have moved then.
        first = nullcontext() if self._checked else restored_on_error(self.student)
        with self.objective.listening(), first:
            outputs, student, teacher = self._ask(inputs)
            valid = self.valid_positions(batch)
            terms = self.objective.terms(student, teacher, valid, targets)
            if self.objective.task_weight > 0 or self.objective.clock.weight(TASK, 0.0) > 0:
                terms = {TASK: self._task(outputs, targets), **terms}
            self.objective.check_once(student, teacher, targets, valid, self.compares_classes)
        self._checked = True
        return terms, outputs

    def export_student(self) -> nn.Module:
        """Copy the plain student, without hooks of ours, adapters or teacher, in the form that it has now.

        A student in int8 stays in int8; :func:`save_compressed` saves it as it is.

        Example:
            >>> Learner(nn.Linear(4, 3), nn.Linear(4, 3), Objective(None, 0.25, None)).export_student()
            Linear(in_features=4, out_features=3, bias=True)
        """
        student = copy_module(self.student)
        drop_taps_(student)
        convert.keep_record_(student, self, "student")
        return student

    def close(self) -> None:
        """Take the taps off and give the teacher its own tensors back; safe to call at any time."""
        self.objective.detach(self.student)
        self._prepared = self._checked = False

    def _ask(self, inputs: Any) -> tuple[Any, Tensor | None, Tensor | None]:
        """Return the student's outputs, and the logits of both if a loss looks at them."""
        teacher_inputs = copy_tensors(inputs)  # a student may change its inputs in place
        outputs = call(self, self.student_inputs(inputs))
        teacher_outputs = self.teacher_outputs(teacher_inputs) if self.objective.losses else None
        if not self.objective.compares_logits:
            return outputs, None, None
        return outputs, self.logits(outputs), self.logits(teacher_outputs)

    def _task(self, outputs: Any, targets: Any) -> Tensor:
        if targets is None:
            raise invalid("batch", "hold targets for the task loss", None, "Override `split_batch`, or the step.")
        return self.compute_task_loss(outputs, targets)

    def _try(self, inputs: Any) -> tuple[Any, Tensor | None, Tensor | None]:
        """Do as :meth:`_ask`; in evaluation mode, if a batch so small fails in training (BatchNorm of one value)."""
        try:
            return self._ask(inputs)
        except ValueError as error:
            if isinstance(error, CompressionError) or not any(child.training for child in self.student.modules()):
                raise
            self.student.eval()
            return self._ask(inputs)
