"""WHEN: `Distillation`, a callback for a LightningModule that exists. `teaching` draws the order of a fit."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn
from typing_extensions import override

from lightning_compress.callback import begin_training_mode_, keep_training_mode_
from lightning_compress.distillation.callback_base import (
    Teaching,
    announce,
    join_optimizer_,
    logs_now,
)
from lightning_compress.distillation.calling import find_logits, mask_of, positions_of
from lightning_compress.distillation.losses.base import DistillationLoss, FeatureLoss
from lightning_compress.distillation.losses.soft_target import SoftTarget
from lightning_compress.distillation.objective import Objective, step_values, sum_terms
from lightning_compress.distillation.ramps import TASK, Ramp
from lightning_compress.distillation.student_teachers import EMATeacher
from lightning_compress.distillation.taps import drop_taps_, find_layer, make_taps
from lightning_compress.distillation.teacher import TeacherDtype, shared_with
from lightning_compress.distillation.teacher_check import closeness
from lightning_compress.distillation.wrapped_step import StudentCall, unwrap_step_, wrap_step_
from lightning_compress.errors import CompressionError, invalid
from lightning_compress.modules.copying import copy_tensors
from lightning_compress.probe import make_probe
from lightning_compress.quantization import convert
from lightning_compress.structure.change import is_float, to_float_


class Distillation(Teaching):
    """Adds distillation to a LightningModule that exists: its own ``training_step`` stays, and so does its class.

    ``loss = task_weight · (the module's own loss) + Σ weight · distillation loss``

    The teacher is asked with what the student was called with in that step, after all augmentation. The student is the
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
        teacher_compile: Ask the teacher through `torch.compile`.
        ramps: Weights and temperatures that change: see :class:`Ramp`.
        log_gradient_share: Log each term's share of the gradient whenever the Trainer logs; a backward pass for each
            term, then.

    Raises:
        CompressionError: If a value is out of range; in ``setup``, with manual optimization, without a teacher, or with
            a strategy that shards; at the first batch, if shapes or logits don't fit. Nothing has changed then.

    Logs ``train_<term>`` and ``train_<term>_weighted`` with ``task`` for the module's own loss; in validation, where a
    loss compares classes, ``val_agreement`` (same first choice as the teacher) and ``val_kl``.

    Example:
        >>> from lightning_compress import FeatureMSE
        >>> callback = Distillation(nn.Linear(4, 3), [SoftTarget(temperature=4.0)], task_weight=0.25)
        >>> # L.Trainer(callbacks=[callback]).fit(model, data)

    References:
        Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015).

    Hooks: ``setup``, ``on_fit_start``, ``on_train_start``, ``on_train_batch_start`` (first batch),
    ``on_after_backward`` (adapters under DDP), ``on_train_batch_end``, ``on_validation_batch_start`` and ``_end``,
    ``teardown``, ``on_exception``. Override ``logits``, ``targets`` and ``valid_positions`` where outputs or batches
    differ.
    """

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
        if losses == []:
            raise invalid("losses", "name something to learn", losses)
        self.objective = Objective(
            [SoftTarget()] if losses is None else losses,
            task_weight,
            ramps,
            checkpoint=teacher_checkpoint,
            adapter=teacher_adapter,
            dtype=teacher_dtype,
            compile=teacher_compile,
        )
        self.objective.set_teacher(teacher)
        self.student = student
        self.log_gradient_share = log_gradient_share
        self._call = StudentCall()
        self._entry: str | None = None
        self._serves: int | None = None

    # What a subclass may override.

    def logits(self, outputs: Any) -> Tensor:
        """The logits within the outputs of student or teacher: see :func:`~.calling.find_logits`."""
        return find_logits(outputs)

    def targets(self, batch: Any) -> Any:
        """The true classes of a batch, for losses that look at them; by default the second of a pair."""
        return batch[1] if isinstance(batch, tuple | list) and len(batch) == 2 else None

    def valid_positions(self, batch: Any) -> Tensor | None:
        """Which positions of the logits the losses count, as a boolean tensor; None: all."""
        return None

    # Lightning's hooks.

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
        if self.objective.teacher.given is None:
            self.objective.teacher.require()
        twin = pl_module
        if not is_float(pl_module):  # what makes it float again may come after this
            twin = make_probe(trainer, pl_module)
            to_float_(twin)
        student = self._scope(twin)
        self.objective.teacher.take_(student)
        teacher = self.objective.teacher.require()
        if (error := shared_with(teacher, self._scope(pl_module))) is not None:
            raise error
        self.objective.taps.find(student)
        self.objective.teacher.taps.find(teacher)
        self.objective.teacher.load_once()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        begin_training_mode_(trainer, pl_module, type(self).__name__)
        student = self._scope(pl_module)
        self.begin(self.objective, student)
        self.objective.attach(student)
        if self._restored is not None and self._restored["adapters"]:
            self.objective.adapters.load_state_dict(self._restored["adapters"])
            self._join(trainer, student)
        wrap_step_(pl_module)
        self._serves = id(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.start_clock(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        keep_training_mode_(trainer, pl_module, type(self).__name__, batch_idx)
        if self._entry is None:
            self._rehearse(trainer, pl_module, batch, batch_idx)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.world_size > 1:  # the DDP wrapper doesn't know the adapters
            for parameter in self.objective.adapters.parameters():
                if parameter.grad is not None:
                    parameter.grad = trainer.strategy.reduce(parameter.grad, reduce_op="mean")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.count_step(trainer, self._scope(pl_module))
        self.say(type(self).__name__)

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        if self._entry is not None:
            self._call.switch(listening=True)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not (self._call.fired and self.objective.compares_logits):
            return
        ours, theirs = self._answers(self._call, self._scope(pl_module))
        self._call.switch(listening=False)
        if ours is None or theirs is None or not self.objective.compares_classes:
            return
        class_dim = self.objective.class_dim(ours, self.targets(batch))
        if class_dim is not None:
            valid = mask_of(self.valid_positions(batch), positions_of(ours, class_dim))
            values, count = closeness(ours, theirs, class_dim, valid)
            logged = {f"val_{name}": value for name, value in values.items()}
            pl_module.log_dict(logged, on_step=False, on_epoch=True, sync_dist=True, batch_size=max(count, 1))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.finish(self.objective, partial(self.close, pl_module))

    @override
    def close(self, pl_module: pl.LightningModule) -> None:
        super().close(pl_module)
        unwrap_step_(pl_module)
        self._call.detach()
        self.objective.detach(pl_module)
        self._serves = None

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return {**state, "adapters": self.objective.adapters.state_dict()} if state else state

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_serves": None}

    # Channels that leave: see `ChannelPruning`.

    @property
    def student_path(self) -> str:  # type: ignore[override]
        return self.student or ""

    @property
    @override
    def trained_layers(self) -> nn.ModuleDict:
        return self.objective.adapters

    @override
    def compared(self, module: nn.Module, layers: nn.Module, step: Callable[[nn.Module], Any]) -> list[Tensor]:
        student = self._scope(module)
        drop_taps_(module)
        taps, _ = make_taps(self.objective.losses)
        taps.attach(student)
        with taps.listen():
            step(module)
            features = {
                name: taps[str(loss.student_layer)]
                for name, loss in self.objective.losses.items()
                if isinstance(loss, FeatureLoss) and loss.adapts and not loss.pairs and not self._shrinks_with(loss)
            }
        taps.detach(student)
        known = dict(layers.named_children())
        return [known[name](one) if name in known else one for name, one in features.items()]

    def _shrinks_with(self, loss: FeatureLoss) -> bool:
        """Whether the teacher loses the very channels that the student loses."""
        return isinstance(self.objective.teacher.given, EMATeacher) and loss.student_layer == loss.teacher_layer

    # The work.

    @override
    def serves(self, module: nn.Module) -> bool:
        return self._serves == id(module) and self._entry is not None

    @override
    def teach(self, step: Callable[..., Any], module: pl.LightningModule, args: tuple[Any, ...]) -> Any:
        """Run the module's own step, and add the terms to its loss."""
        student, batch = self._scope(module), args[0]
        valid, targets = self.valid_positions(batch), self.targets(batch)  # before the step may change the batch
        with self.objective.listening(), self._call.listen():
            result = step(*args)
            if result is None:  # the module skips this batch
                return None
            terms = {TASK: result["loss"] if isinstance(result, Mapping) else result}
            ours, theirs = self._answers(self._call, student)
            terms |= self.objective.terms(ours, theirs, valid, targets)
        weights = self.objective.weights()
        loss = sum_terms(terms, weights)
        self.objective.check_once(ours, theirs, targets, valid, self.objective.compares_classes)
        shares = self.log_gradient_share and logs_now(module.trainer)
        values = step_values(terms, weights, student if shares else None)
        module.log_dict(values, batch_size=None if ours is None else len(ours))
        return {**result, "loss": loss} if isinstance(result, Mapping) else loss

    def _rehearse(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """The dry run on a copy of the module with the first batch; then adapters, taps and witness are in place."""
        probe = make_probe(trainer, pl_module)
        to_float_(probe)
        drop_taps_(probe)
        student, call = self._scope(probe), StudentCall()
        step = type(probe).training_step
        names = list(inspect.signature(step).parameters.values())[1:]
        takes_index = len(names) > 1 or any(name.kind is name.VAR_POSITIONAL for name in names)

        def run() -> tuple[Any, Tensor | None, Tensor | None]:
            with call.listen(), trainer.precision_plugin.train_step_context():
                own = copy_tensors(batch)  # the step may change or empty what it is given
                loss = step(probe, own, batch_idx) if takes_index else step(probe, own)
                if loss is None and not call.fired:
                    raise _Skipped
                self._entry = call.seen()[0]
                self.objective.teacher.enter(self._entry if self._made() else "")
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
        live = self._scope(pl_module)
        before = set(self.objective.taps)
        self.objective.apply_(plan, live)
        if set(self.objective.taps) - before and self._restored is None and convert.form_of(pl_module) == "prepared":
            raise invalid(
                "callbacks",
                "list Distillation before QuantizationAwareTraining where pairs='auto'",
                [type(callback).__name__ for callback in trainer.callbacks],  # type: ignore[attr-defined]
            )
        self._call.attach(live, self._entry)
        self._join(trainer, live)
        announce(plan, type(self).__name__, self.objective.teacher.given)

    def _join(self, trainer: pl.Trainer, student: nn.Module) -> None:
        """Bring the adapters where the student is, equal on all ranks, and into the optimizer."""
        adapters = self.objective.adapters
        adapters.to(next(student.parameters()).device)
        if trainer.world_size > 1:
            adapters.load_state_dict(trainer.strategy.broadcast(adapters.state_dict()))
        join_optimizer_(adapters, trainer)

    def _answers(self, call: StudentCall, student: nn.Module) -> tuple[Tensor | None, Tensor | None]:
        """Ask the teacher what the student was asked; the logits of both, if a loss looks at them."""
        _, inputs, outputs = call.seen()
        answers = self.objective.teacher(inputs, like=student)
        if not self.objective.compares_logits:
            return None, None
        return self.logits(outputs), self.logits(answers)

    def _scope(self, pl_module: nn.Module) -> nn.Module:
        return pl_module if self.student is None else find_layer(pl_module, self.student, "student")

    def _made(self) -> bool:
        return self.objective.teacher.given is not self.objective.teacher.module


class _Skipped(Exception):
    """The module's step returned None before it called the student."""
