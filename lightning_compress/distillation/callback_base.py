"""What `Distillation` and `DistillationModule` share of a fit: when the teacher comes and goes, and what is said.

The order of a fit::

    setup                    refuse what can't work, take a `Snapshot`
    (checkpoint is loaded)
    on_fit_start             the teacher moves to the student and is sealed; taps are on
    on_train_start           the bounds of ramps are fixed
      on_train_batch_start   (`Distillation`) the first time: the dry run, adapters join the optimizer
      training_step          the terms are added to the loss
      on_train_batch_end     count the optimizer step, `EMATeacher` follows
    teardown, on_exception   the teacher goes home and must be bit-identical; no hook stays
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from typing_extensions import override

from lightning_compress.callback import CompressionCallback, check_version
from lightning_compress.distillation.dry_run import DistillationPlan
from lightning_compress.distillation.objective import Objective
from lightning_compress.distillation.student_teachers import EMATeacher
from lightning_compress.errors import CompressionError, NoEffectWarning
from lightning_compress.messages import in_short
from lightning_compress.modules.resizing import Cut
from lightning_compress.window import fit_length

STATE_VERSION = 1


class Teaching(CompressionCallback):
    """When the teacher comes and goes, ramps move, and what is said and kept; the same for module and callback.

    A subclass says whose objective it is, and who the student is.
    """

    key = "distillation"

    def __init__(self) -> None:
        self._objective: Objective | None = None
        self._restored: dict[str, Any] | None = None
        self._last_step = 0
        self._said = self._said_of_masks = False

    def begin(self, objective: Objective, student: nn.Module) -> None:
        """At fit start: bring back what a checkpoint said, place and seal the teacher."""
        self._objective = objective if objective.losses else None
        self._said = self._said_of_masks = False
        if self._objective is None:
            return  # a student alone
        teacher, restored = objective.teacher, self._restored
        if restored is not None:
            objective.clock.load_state_dict(restored["clock"])
            if "average" in restored and isinstance(teacher.given, EMATeacher):
                teacher.given.take_widths_(student)
                teacher.given.restore_(restored["average"])
        teacher.place(student)
        teacher.take_fingerprint()
        known, now = {} if restored is None else restored["teacher"], teacher.reference()
        comparable = known.get("dtype") == now["dtype"] and not isinstance(teacher.given, EMATeacher)
        if comparable and known["fingerprint"] != now["fingerprint"]:
            rank_zero_warn(
                f"The teacher isn't the one that this checkpoint was trained with: {known['class']}, file "
                f"{known['checkpoint']}. The student goes on with another one."
            )

    def start_clock(self, trainer: pl.Trainer) -> None:
        """At the start of training: fix the bounds of ramps."""
        if self._objective is not None:
            if self._objective.clock.ramps:
                self._objective.clock.start(*fit_length(trainer))
            self._last_step = trainer.global_step

    def count_step(self, trainer: pl.Trainer, student: nn.Module) -> None:
        """After a batch: count it if it made an optimizer step, and let the teacher follow."""
        if self._objective is not None and trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            self._objective.clock.step += 1
            self._objective.teacher.follow_(student)

    student_path = ""
    """Of the student within the LightningModule."""

    @property
    @override
    def averages_weights(self) -> bool:
        return self._objective is not None and isinstance(self._objective.teacher.given, EMATeacher)

    @override
    def on_channels_removed(self, trainer: pl.Trainer, pl_module: pl.LightningModule, cut: Cut) -> None:
        if self._objective is not None and isinstance(self._objective.teacher.given, EMATeacher):
            self._objective.teacher.given.on_channels_removed(cut.below(self.student_path))

    def say(self, name: str) -> None:
        """Tell once what the first batch said of the teacher."""
        if self._objective is not None and self._objective.notes and not self._said_of_masks:
            self._said_of_masks = True
            rank_zero_info("\n  ".join([f"{name}:", *self._objective.notes.values()]))
        if self._objective is not None and self._objective.check is not None and not self._said:
            self._said = True
            check, follows = self._objective.check, isinstance(self._objective.teacher.given, EMATeacher)
            rank_zero_info(f"{name}: {check}.")
            for warning in [] if follows else check.warnings():  # an average begins where the student does
                rank_zero_warn(f"{name}: {warning}")

    def finish(self, objective: Objective, close: Callable[[], None]) -> None:
        """At the end: close, then raise if the teacher has moved."""
        moved = objective.teacher.changed()
        close()
        if moved:
            raise CompressionError(
                f"The teacher must not change while it teaches. Changed: {', '.join(moved[:5])}"
                f"{' ...' if len(moved) > 5 else ''}. The student learnt from a moving teacher."
            )

    def state_dict(self) -> dict[str, Any]:
        if self._objective is None:
            return {}
        teacher = self._objective.teacher
        state = {
            "version": STATE_VERSION,
            "clock": self._objective.clock.state_dict(),
            "teacher": teacher.reference(),
        }
        if isinstance(teacher.given, EMATeacher):
            state["average"] = teacher.given.average()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_version(state_dict, type(self).__name__)
        self._restored = state_dict

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_restored": None}


def join_optimizer_(adapters: nn.Module, trainer: pl.Trainer) -> None:
    """Let the first optimizer train those adapters that no optimizer has."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    held = {id(parameter) for group in groups for parameter in group["params"]}
    # Into the first group: a scheduler holds one base rate for each group and would not know of another one.
    for group in groups[:1]:
        group["params"].extend(each for each in adapters.parameters() if id(each) not in held)


def announce(plan: DistillationPlan, name: str, teacher: nn.Module | None) -> None:
    """Tell what was planned, and warn of what has no effect."""
    head = f"{name}: the student learns from {type(teacher).__name__}."
    rank_zero_info("\n".join(in_short([head, *f"  {plan}".splitlines()])))
    for warning in plan.warnings():
        rank_zero_warn(f"{name}: {warning}", category=NoEffectWarning)


def logs_now(trainer: pl.Trainer) -> bool:
    """Whether the Trainer logs after this step."""
    return (trainer.global_step + 1) % max(trainer.log_every_n_steps, 1) == 0  # type: ignore[attr-defined, no-any-return]
