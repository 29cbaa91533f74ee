"""`Distillation`, a callback that teaches a LightningModule as it is; `callback_base` has the order of a fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
from torch import Tensor, nn
from typing_extensions import override

from lightning_compress.distillation.callback_base import (
    DistillationCallback,
    DistillationState,
    announce,
    join_fit_,
    logs_now,
)
from lightning_compress.distillation.calling import find_logits, mask_of, positions_of
from lightning_compress.distillation.losses.base import DistillationLoss
from lightning_compress.distillation.objective import Objective, step_values, sum_terms
from lightning_compress.distillation.ramps import TASK, Ramp
from lightning_compress.distillation.student_teachers import Snapshot
from lightning_compress.distillation.taps import drop_taps_
from lightning_compress.distillation.teacher import TeacherDtype, refuse_shared
from lightning_compress.distillation.teacher_check import closeness
from lightning_compress.distillation.wrapped_step import StudentCall, run_own_step, unwrap_step_, wrap_step_
from lightning_compress.errors import CompressionError, invalid
from lightning_compress.quantization import convert
from lightning_compress.silent_copy import make_probe
from lightning_compress.structure.change import is_float, to_float_


class TaughtState(DistillationState):
    """What a checkpoint holds of `Distillation`, whose adapters no module holds."""

    adapters: dict[str, Tensor]


class Distillation(DistillationCallback):
    """Adds distillation to a LightningModule that exists: its own ``training_step`` stays, and so does its class.

    ``loss = task_weight · (the module's own loss) + Σ weight · distillation loss``

    The teacher is called with what the student was called with in that step, after all augmentation. The student is the
    LightningModule's own ``forward`` where ``training_step`` calls that, or else the one child that it calls. Where it
    is called several times, the last call with gradients counts. The module's parameters, keys, hooks and checkpoints
    stay as they are; adapters live in the callback, and in the optimizer from the first step. Lightning's tuner takes
    callbacks off while it looks for a learning rate or a batch size, and sees the module's own loss alone.

    Args:
        teacher: Any module, also a LightningModule, :class:`Snapshot` or :class:`EMATeacher`.
        losses: Distillation losses; None: soft targets.
        task_weight: Factor of the module's own loss.
        student: Path of the student within the LightningModule, to which the losses' ``student_layer`` is relative;
            None is the LightningModule itself.
        teacher_checkpoint: File with the teacher's weights: see :func:`~.weights.load_weights_`.
        teacher_adapter: Called with what the student was called with; gives the teacher's inputs: another normalisation
            or resolution.
        teacher_dtype: The teacher's floating dtype; None: the student's. 16 bits are for devices that compute in them:
            a CPU without such instructions takes many times as long.
        teacher_compile: Call the teacher through `torch.compile`.
        ramps: Weights and temperatures that change: see :class:`Ramp`.
        log_gradient_share: Log each term's share of the gradient whenever the Trainer logs; a backward pass for each
            term, then.

    Raises:
        CompressionError: If a value is out of range; in ``setup``, with manual optimization, without a teacher, or with
            a strategy that shards; at the first batch, if shapes or logits don't fit. Nothing has changed then.

    Logs ``train_<term>`` and ``train_<term>_weighted`` with ``task`` for the module's own loss; in validation, where a
    loss compares classes, ``val_agreement`` (same first choice as the teacher) and ``val_kl``.

    Example:
        >>> from lightning_compress import SoftTarget
        >>> callback = Distillation(nn.Linear(4, 3), [SoftTarget(temperature=4.0)], task_weight=0.25)
        >>> # L.Trainer(callbacks=[callback]).fit(model, data)

    References:
        Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015).

    Hooks: ``setup``, ``on_fit_start``, ``on_train_start``, ``on_train_batch_start`` (first batch),
    ``on_after_backward`` (adapters under DDP), ``on_train_batch_end``, ``on_validation_batch_start`` and ``_end``,
    ``teardown``, ``on_exception``. Override ``logits``, ``targets`` and ``valid_positions`` where outputs or batches
    differ.
    """

    saved_form: ClassVar[Any] = TaughtState

    def __init__(
        self,
        teacher: nn.Module | None = None,
        losses: list[DistillationLoss] | None = None,
        task_weight: float = 1.0,
        student: str | None = None,
        teacher_checkpoint: str | None = None,
        teacher_adapter: nn.Module | None = None,
        teacher_dtype: TeacherDtype | None = None,
        teacher_compile: bool = False,
        ramps: Sequence[Ramp] = (),
        log_gradient_share: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(student, str | None):
            raise invalid("student", "be the path of a module", student)
        if losses == []:
            raise invalid("losses", "name something to learn", losses)
        self.objective = Objective(
            losses, task_weight, ramps, teacher_checkpoint, teacher_adapter, teacher_dtype, teacher_compile
        )
        self.objective.set_teacher(teacher)
        self.student = student
        self.student_path = student or ""
        self.log_gradient_share = log_gradient_share
        self._call = StudentCall()
        self._entry: str | None = None
        self._serves: int | None = None

    # What a subclass may override.

    def logits(self, outputs: Any) -> Tensor:
        """Find the logits within the outputs of student or teacher: see :func:`~.calling.find_logits`."""
        return find_logits(outputs)

    def targets(self, batch: Any) -> Any:
        """Return the true classes of a batch, for losses that look at them; by default the second of a pair."""
        return batch[1] if isinstance(batch, tuple | list) and len(batch) == 2 else None

    def valid_positions(self, batch: Any) -> Tensor | None:
        """Return which positions of the logits the losses count, as a boolean tensor; None: all."""
        return None

    # Lightning's hooks.

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise CompressionError(
                "`automatic_optimization` must be True for Distillation, which adds to the loss that training_step "
                "returns. Received: automatic_optimization=False. Use DistillationModule's `compute_terms` in the step."
            )
        super().setup(trainer, pl_module, stage)  # also for hyperparameters, which may hold what is tapped
        self.objective.reset()
        self.objective.adapters.clear()
        self._restored, self._entry = None, None
        twin = pl_module
        if not is_float(pl_module):  # what makes it float again may come after this
            twin = make_probe(trainer, pl_module)
            to_float_(twin)
        student = self.student_of(twin)
        self.objective.teacher.take_(student)
        teacher = self.objective.teacher.require()
        refuse_shared(teacher, self.student_of(pl_module))
        self.objective.taps.find(student)
        self.objective.teacher.taps.find(teacher)
        self.objective.teacher.load_once()

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.begin_training_mode_(trainer, pl_module)
        student = self.student_of(pl_module)
        self.begin(self.objective, student)
        self.objective.attach(student)
        if self._restored is not None and self._restored["adapters"]:
            self.restore(self.objective.adapters.load_state_dict, "adapters")
            join_fit_(self.objective.adapters, trainer, student)
        wrap_step_(pl_module)
        self._serves = id(pl_module)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._entry is None:
            self._dry_run(trainer, pl_module, batch, batch_idx)

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.world_size > 1:  # the DDP wrapper doesn't know the adapters
            for parameter in self.objective.adapters.parameters():
                if parameter.grad is not None:
                    parameter.grad = trainer.strategy.reduce(parameter.grad, reduce_op="mean")

    @override
    def on_validation_batch_start(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        if self._entry is not None:
            self._call.switch(listening=True)

    @override
    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *_: Any, **__: Any
    ) -> None:
        if not (self._call.fired and self.objective.compares_logits):
            return
        student_logits, teacher_logits = self._answers(self._call, self.student_of(pl_module))
        self._call.switch(listening=False)
        if student_logits is None or teacher_logits is None or not self.objective.compares_classes:
            return
        class_dim = self.objective.class_dim(student_logits, self.targets(batch))
        if class_dim is not None:
            valid = mask_of(self.valid_positions(batch), positions_of(student_logits, class_dim))
            values, count = closeness(student_logits, teacher_logits, class_dim, valid)
            logged = {f"val_{name}": value for name, value in values.items()}
            pl_module.log_dict(logged, on_step=False, on_epoch=True, sync_dist=True, batch_size=max(count, 1))

    @override
    def close(self, pl_module: pl.LightningModule) -> None:
        super().close(pl_module)
        unwrap_step_(pl_module)
        self._call.detach()
        self.objective.detach(pl_module)
        self._serves = None

    @override
    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return {**state, "adapters": self.objective.adapters.state_dict()} if state else state

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_serves": None}

    # What other callbacks ask, and the work.

    @property
    @override
    def trained_layers(self) -> nn.ModuleDict:
        return self.objective.adapters

    @override
    def serves(self, module: nn.Module) -> bool:
        return self._serves == id(module) and self._entry is not None

    @override
    def teach(self, step: Callable[..., Any], module: pl.LightningModule, args: tuple[Any, ...]) -> Any:
        student, batch = self.student_of(module), args[0]
        valid, targets = self.valid_positions(batch), self.targets(batch)  # before the step may change the batch
        with self.objective.listening(), self._call.listen():
            result = step(*args)
            if result is None:  # the module skips this batch
                return None
            terms = {TASK: result["loss"] if isinstance(result, Mapping) else result}
            student_logits, teacher_logits = self._answers(self._call, student)
            terms |= self.objective.terms(student_logits, teacher_logits, valid, targets)
        weights = self.objective.weights()
        loss = sum_terms(terms, weights)
        self.objective.check_once(student_logits, teacher_logits, targets, valid, self.objective.compares_classes)
        shares = self.log_gradient_share and logs_now(module.trainer)
        values = step_values(terms, weights, student if shares else None)
        module.log_dict(values, batch_size=None if student_logits is None else len(student_logits))
        return {**result, "loss": loss} if isinstance(result, Mapping) else loss

    def _dry_run(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Run a copy of the module on the first batch; then adapters, taps and hooks on the student are in place."""
        probe = make_probe(trainer, pl_module)
        to_float_(probe)
        drop_taps_(probe)
        student, call = self.student_of(probe), StudentCall()

        def run() -> tuple[Any, Tensor | None, Tensor | None]:
            with call.listen(), trainer.precision_plugin.train_step_context():
                loss = run_own_step(probe, batch, batch_idx)
                if loss is None and not call.fired:
                    raise _Skipped
                self._entry = call.seen()[0]
                self.objective.teacher.enter(self._entry if isinstance(self.objective.teacher.given, Snapshot) else "")
                return loss, *self._answers(call, student)

        call.attach(student)
        try:
            plan = self.objective.plan(student, run)
        except _Skipped:
            return  # the next batch may do
        except BaseException:
            self._entry = None
            raise
        finally:
            call.detach()
        live = self.student_of(pl_module)
        before = set(self.objective.taps)
        self.objective.apply_(plan, live)
        if set(self.objective.taps) - before and self._restored is None and convert.form_name(pl_module) == "prepared":
            raise invalid(
                "callbacks",
                "list Distillation before QuantizationAwareTraining where pairs='auto'",
                [type(callback).__name__ for callback in trainer.callbacks],  # type: ignore[attr-defined]
            )
        self._call.attach(live, self._entry)
        join_fit_(self.objective.adapters, trainer, live)
        announce(plan, type(self).__name__, self.objective.teacher.given)

    def _answers(self, call: StudentCall, student: nn.Module) -> tuple[Tensor | None, Tensor | None]:
        """Call the teacher as the student was called, and return the logits of both, if a loss looks at them."""
        _, inputs, outputs = call.seen()
        teacher_outputs = self.objective.teacher(inputs, like=student)
        if not self.objective.compares_logits:
            return None, None
        return self.logits(outputs), self.logits(teacher_outputs)


class _Skipped(Exception):
    """The module's step returned None before it called the student."""
