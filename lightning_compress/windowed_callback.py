"""The base of the callbacks that change a model on a schedule: it counts optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NotRequired

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_compress.callback import CompressionCallback, compression_callbacks
from lightning_compress.errors import CompressionError
from lightning_compress.modules.resizing import with_inner
from lightning_compress.saved_state import STATE_VERSION, SavedState, check_bounds
from lightning_compress.structure.change import in_entry, require_float
from lightning_compress.structure.listener import averaged_copies
from lightning_compress.window import Bounds, Pace, Window, fit_length


class WindowedState(SavedState):
    """What a checkpoint holds of a callback with a window."""

    step: int
    bounds: tuple[int, int] | None
    pace: NotRequired[tuple[float, float]]


class WindowedCallback(CompressionCallback):
    """Base of the callbacks that change a model on a schedule while it trains.

    A subclass overrides `begin` (find targets, check), `act` (a step of the window), `after_optimizer_step` and
    `close`; the base counts steps and keeps the state that a checkpoint needs.

    Args:
        window: when to act.
    """

    kept_with_weights = True
    saved_form: ClassVar[Any] = WindowedState
    can_wait: ClassVar[bool] = False
    """Whether a guard may hold the schedule."""

    def __init__(self, window: Window) -> None:
        self.window = window
        self._step = 0
        self._bounds: Bounds | None = None
        self._pace = Pace()
        self._stepped = False
        self._handles: list[RemovableHandle] = []

    # What a subclass decides.

    def begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find what to work on and check it; nothing is changed yet."""

    def act(self, trainer: pl.Trainer, pl_module: pl.LightningModule, progress: float) -> None:
        """Do a step of the window, at ``progress`` in [0, 1]."""

    def after_optimizer_step(self, optimizer: Optimizer) -> None:
        """Run after each step of each optimizer, with that optimizer."""

    @property
    def waits(self) -> bool:
        """Tells whether the window, without a start of its own, begins once `is_final` holds for the others."""
        return False

    @override
    def phase(self, trainer: pl.Trainer) -> str | None:
        if not self.leads_to:
            return None
        if not self.has_begun():
            return "dense"
        return self.leads_to if self.is_over else ""

    def has_begun(self) -> bool:
        """Tell whether it has changed the module already."""
        return self._bounds is not None and self._step >= self._bounds.start

    # Lightning's hooks.

    @override
    def check_entry(self, entry: Mapping[str, Any], stage: str) -> None:
        for change, record in in_entry(entry):
            if stage == "fit":
                change.check(record, "train")

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            require_float(pl_module, "train")
            self._step, self._bounds, self._pace = 0, None, Pace()
        super().setup(trainer, pl_module, stage)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.begin_training_mode_(trainer, pl_module)
        self.begin(trainer, pl_module)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._bounds is None:
            self._bounds = self.window.bounds(*fit_length(trainer))
        self._stepped = False
        self._handles = [
            optimizer.register_step_post_hook(self._on_optimizer_step)
            for optimizer in with_inner(trainer.optimizers)  # SAM steps only the one that it wraps
        ]
        if self._step == 0 and self._bounds.start == 0:
            self._act(trainer, pl_module)
        self.sync_(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.keep_training_mode_(trainer, pl_module, batch_idx)

    def _on_optimizer_step(self, optimizer: Optimizer, *_: Any) -> None:
        self._stepped = True
        self.after_optimizer_step(optimizer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._stepped:
            self._stepped = False
            self._step += 1
            if self.bounds.is_due(self._step, self.window.every_n_steps):
                self._act(trainer, pl_module)
        if any(True for _ in averaged_copies(trainer)):
            self.sync_(trainer, pl_module)

    def _act(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do what is due, unless a guard holds it."""
        guards = [other for other in compression_callbacks(trainer) if other.guards] if self.can_wait else []
        if any(guard.hold(trainer, pl_module) for guard in guards):
            before = self.bounds.last_due(self._step - 1, self.window.every_n_steps)
            done = 0.0 if before is None else self.progress_at(before) or 0.0
            self._pace = Pace(self.bounds.progress(self._step) or 0.0, done)
            if self._step == self.bounds.end:
                self.give_up(trainer, pl_module)
            return
        self.act(trainer, pl_module, self.progress_at(self._step) or 0.0)

    def progress_at(self, step: int) -> float | None:
        """Return the progress in [0, 1] after ``step`` optimizer steps, less what was held; None before the window."""
        progress = self.bounds.progress(step)
        return None if progress is None else self._pace.progress(progress)

    def give_up(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the window with what was reached, since a guard is against the rest."""
        rank_zero_warn(
            f"{type(self).__name__}: its window has ended at optimizer step {self._step}, and a guard was against "
            f"more: {self.reached()} Train longer, with a longer window, or allow a larger fall."
        )

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.sync_(trainer, pl_module)

    on_validation_start = on_train_epoch_end = on_train_epoch_start

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.sync_(trainer, pl_module)
        if self._step < self.bounds.end:
            rank_zero_warn(
                f"{type(self).__name__}: training stopped at optimizer step {self._step}, before its window's end at "
                f"{self.bounds.end}: {self.unfinished()}"
            )

    @override
    def close(self, pl_module: pl.LightningModule) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        super().close(pl_module)

    @property
    def bounds(self) -> Bounds:
        """Holds the window in optimizer steps, which is known from the start of training on."""
        if self._bounds is None:
            raise CompressionError(f"{type(self).__name__}'s window has no bounds before training starts.")
        return self._bounds

    def reached(self) -> str:
        """Say what is missing."""
        return "its work isn't complete."

    def unfinished(self) -> str:
        """Say what is missing if training stops before the window's end, and what helps."""
        return f"{self.reached()} Shorten the window, or train longer."

    @property
    def is_over(self) -> bool:
        """Tells whether the window of this fit has ended."""
        return self._bounds is not None and self._step >= self._bounds.end

    @override
    def report_notes(self) -> list[str]:
        if self._bounds is not None and self._step < self._bounds.end:
            return [f"{type(self).__name__} stopped at step {self._step} of {self._bounds.end}: {self.unfinished()}"]
        return super().report_notes()

    @override
    def state_dict(self) -> dict[str, Any]:
        bounds = None if self._bounds is None else [self._bounds.start, self._bounds.end]
        pace = {} if self._pace == Pace() else {"pace": [self._pace.at, self._pace.done]}
        return {"version": STATE_VERSION, "step": self._step, "bounds": bounds, **pace}

    @override
    def check_state(self, state: Any) -> None:
        super().check_state(state)
        check_bounds([state["bounds"]] if state["bounds"] else [], type(self).__name__)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.check_state(state_dict)
        self._step, self._pace = state_dict["step"], Pace(*state_dict.get("pace", ()))
        self._bounds = None if state_dict["bounds"] is None else Bounds(*state_dict["bounds"])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_handles": []}
