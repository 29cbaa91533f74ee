"""`ChannelPruning`: decides when channels leave a model that trains."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_compress.callback import CompressionCallback, warn_of_other_settings
from lightning_compress.channels.batchnorm_restart import BatchNormRestart, RestartState
from lightning_compress.channels.compensate import last_fit
from lightning_compress.channels.fit_calls import FitCalls
from lightning_compress.channels.planning.plan import RemovalPlan
from lightning_compress.channels.planning.recipe import IMPORTANCE, LEAST, SCOPE, make_recipe
from lightning_compress.channels.remove_in_fit import follow_statistics_, remove_in_fit_
from lightning_compress.channels.rounds import Rounds, RoundsState
from lightning_compress.errors import NoEffectWarning, invalid, is_number
from lightning_compress.messages import in_short
from lightning_compress.modules.copying import copy_tensors
from lightning_compress.schedules import OneShot, Schedule
from lightning_compress.structure.files import restored_state
from lightning_compress.targets import Scope, Targets
from lightning_compress.window import Window, fit_length
from lightning_compress.windowed_callback import WindowedCallback, WindowedState


class ChannelsState(WindowedState, RoundsState, RestartState):
    """What a checkpoint holds of `ChannelPruning`."""


class ChannelPruning(WindowedCallback):
    """Removes channels, neurons, heads and hidden widths while a model trains, until a budget is met.

    What leaves is really gone: parameters, multiply-accumulates, memory and time fall. Training goes on undisturbed:
    parameters stay the same objects, and optimizer moments, pruning masks, averaged copies and adapters are cut with
    the same indices; running statistics of norms start anew, frozen ones too where a cut has changed what reaches them:
    see `BatchNormRestart`. Checkpoints hold the smaller tensors; ``fit(ckpt_path=)``, ``test(ckpt_path=)`` (with this
    callback) and ``load_compressed(path, model)`` load them into the full-size module.

    Args:
        channels: budget: the fraction of the channels that remains; exactly one of the four is given.
        params: budget: the fraction of the parameters that remains.
        macs: budget: the fraction of the multiply-accumulates that remains, for the batches of this fit.
        latency: budget: the fraction of a forward pass' time that remains, measured on this machine when the window
            starts.
        importance: ``l1``, ``l2``, ``batchnorm``, ``taylor``, ``fpgm``, ``random``, ``outputs`` (measured on the
            calibration batches), or the import path of your own function: see `Importance`. By default ``outputs``;
            ``l1`` with ``regularization`` and where nothing calibrates.
        scope: ``global`` ranks the channels of all layers together, but leaves no layer less than 3/4 of what it would
            keep if all lost the same fraction, or less where that misses the budget. ``layer`` takes the same fraction.
        schedule: how much of the way to the budget is gone when. `OneShot` is one round, at the window's start. By
            others channels leave when they ask for a tenth more, in ten rounds at most; `Steps` says in how many.
        window: when. Leave a hundred optimizer steps or more after the last round.
        targets: which layers; by default all that can lose channels and are trained. A width that a norm spans
            (LayerNorm, GroupNorm) is cut only if ``include`` names one of its layers exactly, as that is approximate.
        overrides: pattern of layers' paths to the fraction of their channels that remains; the last match wins.
        min_layer_channels: no layer keeps a smaller fraction of its channels.
        round_to: keep a multiple of this in each layer; by default of 8 in layers of 32 channels and more, or of less
            where that misses the budget.
        regularization: strength of a penalty that draws the least important units of each group to zero until the last
            channels have left: see `regularize_`. Give it time with a schedule such as ``Steps([0.0, 1.0], [0.0,
            1.0])``, by which all leave when the window ends.
        seed: of ``importance="random"``; the global generators aren't touched.
        blocks: whether residual blocks may leave whole too, those without which the outputs for the round's batch
            change least. Their inputs, or zeros, take their places.
        calibration_batches: on so many batches of the fit's own data (``calibration_dataloader``, if the datamodule or
            module has one, else the train loader, read once more from its start) each round measures what channels are
            worth, and fits the layers that have lost inputs to what they put out before: see `compensate_`. By default
            as many as hold 256 samples, 32 at most; where the loader is a stream or no step of the module takes its
            batches, a warning says so, and weights decide. 0 does without.

    Raises:
        CompressionError: in the constructor for bad arguments; in ``setup`` for a strategy that can't follow, and where
            QuantizationAwareTraining begins before the last channels leave; at the first batch if nothing can be
            removed. Nothing has changed then.

    Logs ``remaining_<budget>`` (a fraction of the original; of the multiply-accumulates, where the budget is latency)
    whenever channels leave, and at the end of each epoch.

    Hooks: `on_train_batch_start` traces what the module does with the first batch, and removes what is due at the
    very start; `on_train_batch_end` removes later, after the optimizer step, before validation and saving.

    Example:
        >>> callback = ChannelPruning(macs=0.5)
        >>> # Trainer(callbacks=[callback]).fit(model, datamodule)

    References:
        Fang et al., "DepGraph: Towards Any Structural Pruning", 2023 (arXiv:2301.12900).
    """

    key = "channels"
    saved_form: ClassVar[Any] = ChannelsState
    leads_to = "pruned"
    is_guarded = can_wait = True
    conflicts = ("quantization-aware training",)

    def __init__(
        self,
        channels: float | None = None,
        params: float | None = None,
        macs: float | None = None,
        latency: float | None = None,
        importance: str | None = None,
        scope: Scope = SCOPE,
        schedule: Schedule = OneShot(),  # noqa: B008  frozen
        window: Window = Window(0.1, 0.3),  # noqa: B008  frozen
        targets: Targets = Targets(),  # noqa: B008  frozen
        overrides: Mapping[str, float] | None = None,
        min_layer_channels: float = LEAST,
        round_to: int | None = None,
        regularization: float = 0.0,
        seed: int = 0,
        blocks: bool = False,
        calibration_batches: int | None = None,
    ) -> None:
        super().__init__(window)
        if importance is None and regularization:
            importance = IMPORTANCE
        self.recipe = make_recipe(channels, params, macs, latency, importance, scope, targets, overrides,
                                  min_layer_channels, round_to, seed, blocks, calibration_batches != 0)  # fmt: skip
        if calibration_batches is not None and (type(calibration_batches) is not int or calibration_batches < 0):
            raise invalid("calibration_batches", "be a whole number, at least 0", calibration_batches)
        if regularization and self.recipe.importance.needs_batches:
            raise invalid("regularization", f"be 0 with importance={importance!r}", regularization)
        if not is_number(regularization) or regularization < 0:
            raise invalid("regularization", "be a number, at least 0", regularization, "Usual values: 1e-4 to 1e-2.")
        if regularization and isinstance(schedule, OneShot):
            remedy = "Such as Steps([0.0, 1.0], [0.0, 1.0]), by which all leave when the window ends."
            raise invalid("schedule", "take time with `regularization`", schedule, remedy)
        if self.recipe.importance.needs_gradients and window.start == 0 and schedule.value(0.0, 1.0) > 0:
            raise invalid("window", f"start later with importance={importance!r}, which needs gradients", window)
        self.schedule = schedule
        self.calibration_batches = calibration_batches
        self.regularization = regularization
        self._rounds = Rounds(self.recipe, schedule, window)
        self._statistics = BatchNormRestart()
        self._warned = set[str]()
        self._model: weakref.ref[nn.Module] | None = None

    @property
    def plans(self) -> list[RemovalPlan]:
        """What each round of this fit led to, as seen from the original."""
        return self._rounds.plans

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self._rounds.begin_fit()
        self._warned.clear()
        restored = restored_state(pl_module, self.state_key)
        if restored is not None or self._model is None or self._model() is not pl_module:
            self._model = weakref.ref(pl_module)
            self._rounds.reset()
            self._statistics.load_state_dict({"batches": None, "norms": []})
            if restored is not None:
                self.check_state(restored)
                self._take(restored)

    @override
    def why_conflicts(self, trainer: pl.Trainer, other: CompressionCallback) -> str:
        """Quantization must not begin before the last channels have left."""
        if trainer.state.fn != "fit" or other.key not in self.conflicts or not isinstance(other, WindowedCallback):
            return ""
        if other.waits or self.is_final():
            return ""
        other_bounds = other._bounds or (self._bounds and other.window.bounds(*fit_length(trainer)))
        start = self._rounds.overlap(other.window, self._bounds, other_bounds)
        return start and (
            f"`window` of {type(other).__name__} must start when all channels have left. Received: {other.window} "
            f"beside ChannelPruning's {self.window}. Leave it out, by which quantization waits, or start it later: "
            f"{type(other).__name__}(window=Window({start}))."
        )

    @override
    def is_final(self) -> bool:
        return self._rounds.is_final or self._rounds.given_up

    @override
    def has_begun(self) -> bool:
        return self._rounds.asked > 0.0

    @override
    def phase(self, trainer: pl.Trainer) -> str | None:
        phase = super().phase(trainer)
        return "" if phase == self.leads_to and not self.is_final() else phase

    @override
    def on_fall(self) -> None:
        self._rounds.shrink()

    @override
    def give_up(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().give_up(trainer, pl_module)
        self._rounds.given_up = True

    @override
    def final_step(self, trainer: pl.Trainer) -> int:
        step = self._rounds.last_step
        return 0 if self.is_final() else step(self._bounds or self.window.bounds(*fit_length(trainer)))

    @override
    def begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.recipe.targets.check_patterns(pl_module)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.refuse_others(trainer)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self.apply_pending_(trainer, pl_module, batch, batch_idx)
        follow_statistics_(trainer, pl_module, (batch, batch_idx), self._statistics)
        self._statistics.begin_(pl_module)
        if self._rounds.needs_groups(self._needs_each_step):
            self._rounds.trace(FitCalls(trainer, pl_module, batch, batch_idx).subject)
        self._rounds.checked = True
        # Only where it may be needed: a step may change or empty what it is given.
        step = self._step + 1
        if self.bounds.is_due(step, self.window.every_n_steps) and self._rounds.is_due(self.progress_at(step)):
            self._rounds.batch = copy_tensors(batch), batch_idx

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._statistics.end_(pl_module)  # before channels leave in this hook: the next batch is the first after that
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def apply_pending_(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if (progress := self._rounds.take_waiting()) is not None:
            self._remove(trainer, pl_module, (batch, batch_idx), progress)

    @property
    def _needs_each_step(self) -> bool:
        """Whether something is done with each gradient until the last channels have left."""
        needs_gradients = self.recipe.importance.needs_gradients or self.regularization > 0
        return needs_gradients and self._step < self._rounds.last_step(self.bounds)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self._needs_each_step:
            stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            strength = self.regularization if self._step >= self.bounds.start else 0.0
            self._rounds.use_gradients_(pl_module, stepped, strength)

    @override
    def act(self, trainer: pl.Trainer, pl_module: pl.LightningModule, progress: float) -> None:
        if self._rounds.is_due(progress) and (batch := self._rounds.start(progress, self._step)) is not None:
            self._remove(trainer, pl_module, batch, progress)

    def _remove(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: tuple[Any, int], progress: float
    ) -> None:
        rounds, count = self._rounds, self.calibration_batches
        outcome = remove_in_fit_(trainer, pl_module, batch, rounds, self._statistics, progress, self._step, count)
        if outcome.why_not and "calibration" not in self._warned:
            self._warned.add("calibration")
            rank_zero_warn(
                "ChannelPruning doesn't calibrate: weights alone say which channels leave, and no layer is fitted, "
                f"which costs a pretrained network much more. {outcome.why_not.rstrip('.')}. If that is meant, give "
                "calibration_batches=0."
            )
        if outcome.anew and "state" not in self._warned:
            self._warned.add("state")
            anew = ", ".join(outcome.anew)
            rank_zero_warn(f"ChannelPruning: {anew} keeps state of no known layout, and starts anew for what shrank.")
        if outcome.compensation is not None:
            rank_zero_info(f"ChannelPruning, after step {self._step}: {outcome.compensation}.")
        rank_zero_info("\n  ".join(in_short(rounds.outcome(self._step))))
        if outcome.slower:
            rounds.slower = f"ChannelPruning: {outcome.slower}."
            rank_zero_info(rounds.slower)
        if rounds.missed and rounds.is_final:
            rank_zero_warn(f"ChannelPruning: {rounds.missed}")
        elif rounds.is_final and rounds.remaining == 1.0 and self.recipe.budget.fraction < 1.0:
            rank_zero_warn("ChannelPruning: no channel has left.", category=NoEffectWarning)
        if self._step:
            pl_module.log(f"remaining_{rounds.logged}", rounds.remaining)
        if self.is_over and not rounds.is_final:  # a round may be smaller than what was left
            self.give_up(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        pl_module.log(f"remaining_{self._rounds.logged}", self._rounds.remaining)

    @override
    def close(self, pl_module: pl.LightningModule) -> None:
        super().close(pl_module)
        self._statistics.end_(pl_module)
        self._rounds.end_fit()

    @override
    def reached(self) -> str:
        kind, fraction, reached = self.recipe.budget.kind, self.recipe.budget.fraction, self._rounds.remaining
        return f"{kind}={fraction} was asked for, {reached:.3f} is reached."

    @override
    def report_notes(self) -> list[str]:
        model = None if self._model is None else self._model()
        fitted = None if model is None else last_fit(model)
        return [*super().report_notes(), *self._rounds.notes(), *([f"ChannelPruning: {fitted}."] if fitted else [])]

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(budget=self.recipe.budget.kind, targets=repr(self.recipe.targets))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), **self._rounds.state_dict(), **self._statistics.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._take(state_dict)
        warn_of_other_settings("ChannelPruning", state_dict["settings"], self._rounds.settings, "window and step")

    def _take(self, state: Mapping[str, Any]) -> None:
        self._rounds.load_state_dict(state)
        self._statistics.load_state_dict(state)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_model": None}
