"""`AccuracyGuard`: decides when compression has cost as much of a metric as it may."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_compress.callback import Candidate, CompressionCallback, compression_callbacks
from lightning_compress.choosing.baseline import Baseline
from lightning_compress.choosing.stepping_back import SteppingBack
from lightning_compress.choosing.validation import Validation, validation_loaders
from lightning_compress.errors import NoEffectWarning, invalid, is_number, nearest
from lightning_compress.messages import in_short
from lightning_compress.quantization.schemes import resolve
from lightning_compress.report.evaluations import samples_of, validate_copy
from lightning_compress.saved_state import STATE_VERSION, SavedState
from lightning_compress.schedules import OneShot
from lightning_compress.windowed_callback import WindowedCallback


class GuardState(SavedState):
    """What a checkpoint holds of `AccuracyGuard`."""

    value: float | None
    last: float | None
    begun: bool
    held: bool
    notes: list[str]


class AccuracyGuard(CompressionCallback):
    """Keeps a metric from falling by more than ``max_drop``, whatever compresses the model.

    Beside `PostTrainingQuantization` and `QuantizationAwareTraining` the float and the quantized model are validated on
    the same batches when the model is converted, by its own ``validation_step``. Unless the fall is below ``max_drop``
    with 95 % confidence (see `Fall`), the layers that change the outputs most, each alone, go back to float: one, two,
    four, ..., until it is, and then as few of them as suffice. The log says what each trial cost in bytes and time. If
    nothing suffices, that is an error, and the module stays float. Test data are never looked at.

    Beside `ScheduledPruning` and `ChannelPruning` their schedules are held while the last validation was more than
    ``max_drop`` below where the metric was before; they go on when it has recovered, and what is left of them takes
    what is left of the window. If that isn't enough, the window ends with what was reached, and a warning says so.
    Channels that have left don't come back: after a round that cost too much the next ones are half as large. The more
    often the fit validates, the sooner it is seen (``Trainer(val_check_interval=0.25)``).

    Args:
        monitor: the name of a metric that validation logs. One that isn't a mean over samples is compared as the mean
            of its values on 32 groups of batches.
        max_drop: how far it may fall, in its own unit: 0.01 is a point of accuracy.
        mode: ``max`` where more is better, ``min`` where less is.
        min_samples: so many samples of validation are enough. By default they must be as many as prove ``max_drop``
            where not one of them changes, and the bound counts with a change that none of them showed.
        fallback: what layers go back to: ``float``, or first the name of a scheme that works layer by layer, such as
            ``int8_weight_only``, and ``float`` where that isn't enough.
        baseline: what to compare with while schedules run; by default where the metric was before the first of them
            began.
        smoothing: the weight of the past in the exponential average of the validations before; 0 takes the last. Where
            there was none, the model is validated when the first schedule begins.

    Raises:
        CompressionError: in the constructor for bad arguments; at fit start, or when a model is converted, if the
            validation data are too few; if validation doesn't log the metric; if no quantized form keeps it.

    Hooks: `on_validation_end` of a fit looks at the metric; quantization asks by `guard`, schedules ask by `hold`.

    Example:
        >>> guard = AccuracyGuard("val_acc", max_drop=0.01)
        >>> # Trainer(callbacks=[PostTrainingQuantization(), guard]).test(model, datamodule)
    """

    key = "guard"
    saved_form: ClassVar[Any] = GuardState
    guards = True

    def __init__(
        self,
        monitor: str,
        max_drop: float,
        mode: Literal["max", "min"] = "max",
        min_samples: int | None = None,
        fallback: str = "float",
        baseline: float | None = None,
        smoothing: float = 0.5,
    ) -> None:
        super().__init__()
        if not isinstance(monitor, str):
            raise invalid("monitor", "be the name of a metric", monitor)
        if not (is_number(max_drop) and max_drop > 0):
            raise invalid("max_drop", "be a finite number above 0, in the metric's own unit", max_drop)
        if mode not in ("max", "min"):
            raise invalid("mode", "be 'max' or 'min'", mode)
        if mode == "max" and "loss" in monitor.lower():
            raise invalid("mode", "be 'min' for a loss", mode)
        if min_samples is not None and (type(min_samples) is not int or min_samples < 1):
            raise invalid("min_samples", "be a whole number, at least 1", min_samples)
        if not (is_number(smoothing) and 0 <= smoothing < 1):
            raise invalid("smoothing", "lie in [0, 1)", smoothing)
        if fallback != "float" and resolve(fallback).whole:
            raise invalid("fallback", "be 'float' or a scheme that works layer by layer", fallback)
        self.monitor, self.max_drop, self.mode = monitor, max_drop, mode
        self.min_samples, self.fallback = min_samples, fallback
        self.baseline, self.smoothing = baseline, smoothing
        self._start()

    def _start(self) -> None:
        self._seen = Baseline(self.mode, self.max_drop, self.smoothing, self.baseline)
        self._notes: list[str] = []

    @property
    def _back(self) -> SteppingBack:
        return SteppingBack(self.monitor, self.max_drop, self.mode, self.min_samples, self.fallback)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._start()
        if not any(other.is_guarded for other in compression_callbacks(trainer)):
            rank_zero_warn(
                "AccuracyGuard: no callback of this Trainer can be guarded. Add PostTrainingQuantization, "
                "QuantizationAwareTraining, ScheduledPruning or ChannelPruning.",
                category=NoEffectWarning,
            )
        for other in self._schedules(trainer) if stage == "fit" else []:
            if isinstance(vars(other).get("schedule"), OneShot):
                rank_zero_warn(
                    f"AccuracyGuard: what {type(other).__name__} takes at once can't be held. Give it "
                    "schedule=Linear(), so that it goes in rounds.",
                    category=NoEffectWarning,
                )

    # When a model is converted.

    @override
    def guard(self, trainer: pl.Trainer, pl_module: pl.LightningModule, candidate: Candidate) -> Candidate:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return candidate
        loaders, back = validation_loaders(trainer, pl_module), self._back
        validation = Validation(trainer, loaders, self.monitor, trainer.datamodule)  # type: ignore[attr-defined]
        chosen = back.choose(candidate, validation)
        self._say(*back.lines, f"{validation.count} evaluations")
        return chosen

    # While a fit compresses.

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._schedules(trainer):
            self._check_data(trainer)

    def _schedules(self, trainer: pl.Trainer) -> list[WindowedCallback]:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return []
        found = (other for other in compression_callbacks(trainer) if isinstance(other, WindowedCallback))
        return [other for other in found if other.can_wait]

    def _check_data(self, trainer: pl.Trainer) -> None:
        """Raise if what validations of this fit see can't tell ``max_drop``."""
        loaders: Any = trainer.val_dataloaders
        if not loaders or not sum(trainer.num_val_batches):
            raise invalid("val_dataloaders", "be there, so that a fit's schedules can be guarded", loaders)
        samples = samples_of(loaders, trainer.num_val_batches)
        if samples and None not in samples:
            self._back.check_count(sum(count or 0 for count in samples) * trainer.world_size)

    @override
    def hold(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return False
        if self._seen.value is None:  # no validation came before
            self._check_data(trainer)
            metrics, _ = validate_copy(trainer, pl_module)
            self._seen.value = trainer.strategy.broadcast(self._read(metrics))
            self._say(
                f"{self.monitor} is {self._seen.value:.4g} before compression begins, by an evaluation of its own"
            )
        return self._seen.held

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != "fit" or not (schedules := self._schedules(trainer)):
            return
        value, seen = self._read(trainer.callback_metrics), self._seen
        if trainer.sanity_checking:
            return
        mean = trainer.strategy.reduce(torch.tensor(value, device=trainer.strategy.root_device), reduce_op="mean")
        seen.begun = seen.begun or any(other.has_begun() for other in schedules)
        if not seen.see(trainer.strategy.broadcast(float(mean))) or all(other.is_over for other in schedules):
            return
        goes = "schedules are held" if seen.held else "schedules go on"
        self._say(f"{self.monitor} is {seen.last:.4g}, and was {seen.value:.4g} before compression: {goes}")
        if seen.held:
            for other in schedules:
                other.on_fall()

    def _read(self, metrics: Any) -> float:
        if self.monitor not in metrics:
            known = nearest(self.monitor, sorted(metrics))
            raise invalid("monitor", "be a metric that validation logs", self.monitor, known)
        return float(metrics[self.monitor])

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        seen = self._seen
        if seen.begun and not seen.fall <= self.max_drop and self._schedules(trainer):
            rank_zero_warn(
                f"AccuracyGuard: {self.monitor} ends at {seen.last:.4g}, and was {seen.value:.4g} before compression: "
                f"more than max_drop={self.max_drop} below. Train longer after the window, or compress less."
            )

    def _say(self, *lines: str) -> None:
        self._notes += lines
        rank_zero_info("\n  ".join(in_short(["AccuracyGuard:", *lines])))

    @override
    def report_notes(self) -> list[str]:
        return [f"AccuracyGuard: {note}" for note in self._notes]

    @property
    def state_key(self) -> str:
        return self._generate_state_key(monitor=self.monitor, mode=self.mode)

    @override
    def state_dict(self) -> dict[str, Any]:
        seen = self._seen
        state = {"value": seen.value, "last": seen.last, "begun": seen.begun, "held": seen.held}
        return {"version": STATE_VERSION, **state, "notes": list(self._notes)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.check_state(state_dict)
        for name in ("value", "last", "begun", "held"):
            setattr(self._seen, name, state_dict[name])
        self._notes = list(state_dict["notes"])
