"""What `Distillation` and `DistillationModule` share of a fit: what happens to the teacher, and what is logged of it.

The order of a fit::

    setup                    refuse what can't work, take a `Snapshot`
    (checkpoint is loaded)
    on_fit_start             the teacher moves to the student's device, its fingerprint is taken; taps are attached
    on_train_start           the bounds of ramps are fixed
      on_train_batch_start   (`Distillation`) the first time: the dry run, adapters join the optimizer
      training_step          the terms are added to the loss
      on_train_batch_end     count the optimizer step, `EMATeacher` follows
    teardown, on_exception   the teacher gets its own tensors back and must be bit-identical; no hook stays
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NotRequired

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_compress.callback import CompressionCallback
from lightning_compress.distillation.dry_run import DistillationPlan
from lightning_compress.distillation.learner import Learner
from lightning_compress.distillation.losses.base import FeatureLoss
from lightning_compress.distillation.objective import Objective
from lightning_compress.distillation.ramps import ClockState
from lightning_compress.distillation.taps import drop_taps_, find_layer, make_taps
from lightning_compress.distillation.teacher import TeacherState
from lightning_compress.errors import CompressionError, NoEffectWarning, in_a_line
from lightning_compress.messages import in_short
from lightning_compress.modules.resizing import Cut
from lightning_compress.modules.training_mode import restore_given_
from lightning_compress.saved_state import STATE_VERSION, SavedState, check_bounds, damaged
from lightning_compress.window import fit_length


class DistillationState(SavedState):
    """What a checkpoint holds of a fit with a teacher."""

    clock: ClockState
    teacher: TeacherState
    average: NotRequired[dict[str, Tensor]]


class DistillationCallback(CompressionCallback):
    """Brings teacher and ramps through a fit, keeps their state, and tells what the first batch says of the teacher.

    Attributes:
        student_path: Of the student within the LightningModule; empty if that is the student.
    """

    key = "distillation"
    saved_form: ClassVar[Any] = DistillationState
    student_path = ""

    def __init__(self) -> None:
        self._objective: Objective | None = None
        self._restored: dict[str, Any] | None = None
        self._last_step = 0
        self._told = self._told_of_masks = False

    def student_of(self, pl_module: nn.Module) -> nn.Module:
        """Find the student within the LightningModule or a copy of it."""
        return find_layer(pl_module, self.student_path, "student") if self.student_path else pl_module

    def begin(self, objective: Objective, student: nn.Module) -> None:
        """Start a fit: restore what a checkpoint holds, move the teacher and take its fingerprint."""
        self._objective = objective if objective.losses else None
        self._told = self._told_of_masks = False
        if self._objective is None:
            return  # a student alone
        teacher, restored = objective.teacher, self._restored
        if restored is not None:
            objective.clock.load_state_dict(restored["clock"])
            if "average" in restored and teacher.ema is not None:
                teacher.ema.take_structure_(student)
                self.restore(teacher.ema.restore_, "average")
        teacher.place(student)
        teacher.take_fingerprint()
        known, now = {} if restored is None else restored["teacher"], teacher.reference()
        comparable = known.get("dtype") == now["dtype"] and teacher.ema is None
        if comparable and known["fingerprint"] != now["fingerprint"]:
            rank_zero_warn(
                f"The teacher isn't the one that this checkpoint was trained with: {known['class']}, file "
                f"{known['checkpoint']}. The student goes on with another one."
            )

    def restore(self, load: Callable[[dict[str, Any]], object], name: str) -> None:
        """Let ``load`` take the tensors that stand as ``name`` in the restored state, if there are any."""
        tensors = self._restored.get(name) if self._restored else None
        try:
            if tensors:
                load(tensors)
        except (RuntimeError, KeyError) as error:
            raise damaged(type(self).__name__, f"have tensors of this model as `{name}`", in_a_line(error)) from error

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._objective is not None:
            if self._objective.clock.ramps:
                self._objective.clock.start(*fit_length(trainer))
            self._last_step = trainer.global_step

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.keep_training_mode_(trainer, pl_module, batch_idx)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._objective is not None and trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            self._objective.clock.step += 1
            if self._objective.teacher.ema is not None:
                self._objective.teacher.ema.follow_(self.student_of(pl_module))
        self.tell(self.name_of(pl_module))

    @property
    @override
    def averages_weights(self) -> bool:
        return self._objective is not None and self._objective.teacher.ema is not None

    @override
    def on_channels_removed(self, trainer: pl.Trainer, pl_module: pl.LightningModule, cut: Cut) -> None:
        if self._objective is not None and self._objective.teacher.ema is not None:
            self._objective.teacher.ema.on_channels_removed(cut.below(self.student_path))

    @override
    def compared(self, module: nn.Module, layers: nn.Module, step: Callable[[nn.Module], Any]) -> list[Tensor]:
        if self._objective is None:
            return []
        losses = {
            name: loss
            for name, loss in self._objective.losses.items()
            if isinstance(loss, FeatureLoss)
            and loss.adapts
            and not loss.pairs
            # An `EMATeacher` loses in the same layer the very channels that the student loses.
            and not (self.averages_weights and loss.student_layer == loss.teacher_layer)
        }
        student, (taps, _) = self.student_of(module), make_taps(losses)
        drop_taps_(module)
        taps.attach(student)
        with taps.listen():
            step(module)
            features = {name: taps[str(loss.student_layer)] for name, loss in losses.items()}
        taps.detach(student)
        adapters = dict(layers.named_children())
        return [adapters[name](tensor) if name in adapters else tensor for name, tensor in features.items()]

    def tell(self, name: str) -> None:
        """Tell once what the first batch says of the masks and of the teacher."""
        objective = self._objective
        if objective is None:
            return
        if objective.notes and not self._told_of_masks:
            self._told_of_masks = True
            rank_zero_info("\n  ".join([f"{name}:", *objective.notes.values()]))
        if objective.check is not None and not self._told:
            self._told = True
            rank_zero_info(f"{name}: {objective.check}.")
            # An average is as good as the student, with which it begins.
            for warning in [] if self.averages_weights else objective.check.warnings():
                rank_zero_warn(f"{name}: {warning}")

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        changed = [] if self._objective is None else self._objective.teacher.changed()
        self.close(pl_module)
        if changed:
            raise CompressionError(
                f"The teacher must not change while it teaches. Changed: {', '.join(changed[:5])}"
                f"{' ...' if len(changed) > 5 else ''}. The student learnt from a moving teacher."
            )

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._objective is None:
            return {}
        teacher = self._objective.teacher
        clock, ema = self._objective.clock.state_dict(), teacher.ema
        state = {"version": STATE_VERSION, "clock": clock, "teacher": teacher.reference()}
        return state if ema is None else {**state, "average": ema.average()}

    @override
    def check_state(self, state: Any) -> None:
        super().check_state(state)
        check_bounds(state["clock"]["bounds"] or (), type(self).__name__)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.check_state(state_dict)
        self._restored = state_dict

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_restored": None}


class ModuleCallback(DistillationCallback):
    """The hooks of a :class:`DistillationModule`, apart from those that a subclass of it writes."""

    student_path = "student"

    @property
    @override
    def state_key(self) -> str:
        return "_ModuleTeaching"  # as in the checkpoints that there are

    @override
    def name_of(self, pl_module: pl.LightningModule) -> str:
        return type(pl_module).__name__

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == TrainerFn.FITTING:
            self._objective = self._restored = None
            if isinstance(pl_module, Learner):
                pl_module.objective.clock.reset()

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(pl_module, Learner):
            self.begin_training_mode_(trainer, pl_module)
            self.begin(pl_module.objective, pl_module.student)
            join_optimizer_(pl_module.adapters, trainer)  # a `configure_optimizers` of the user's may not know them

    @override
    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any, **__: Any) -> None:
        self.tell(self.name_of(pl_module))

    @override
    def close(self, pl_module: pl.LightningModule) -> None:
        if isinstance(pl_module, Learner):
            restore_given_(pl_module)
            pl_module.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_objective": None}


def join_optimizer_(adapters: nn.Module, trainer: pl.Trainer) -> None:
    """Let the first optimizer train those adapters that no optimizer trains."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    held = {id(parameter) for group in groups for parameter in group["params"]}
    # Into the first group: a scheduler holds one base rate for each group and would not know of another one.
    for group in groups[:1]:
        group["params"].extend(parameter for parameter in adapters.parameters() if id(parameter) not in held)


def join_fit_(adapters: nn.Module, trainer: pl.Trainer, student: nn.Module) -> None:
    """Bring adapters that no module holds to the student's device, equal on all ranks, and into the optimizer."""
    adapters.to(next(student.parameters()).device)
    if trainer.world_size > 1:
        adapters.load_state_dict(trainer.strategy.broadcast(adapters.state_dict()))
    join_optimizer_(adapters, trainer)


def announce(plan: DistillationPlan, name: str, teacher: nn.Module | None) -> None:
    """Tell what was planned, and warn of what has no effect."""
    head = f"{name}: the student learns from {type(teacher).__name__}."
    rank_zero_info("\n".join(in_short([head, *f"  {plan}".splitlines()])))
    for warning in plan.warnings():
        rank_zero_warn(f"{name}: {warning}", category=NoEffectWarning)


def logs_now(trainer: pl.Trainer) -> bool:
    """Whether the Trainer logs after this step."""
    return (trainer.global_step + 1) % max(trainer.log_every_n_steps, 1) == 0  # type: ignore[attr-defined, no-any-return]
