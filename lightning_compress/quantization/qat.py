"""`QuantizationAwareTraining`: decides when a model is prepared, frozen and converted."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_compress.callback import compression_callbacks, rebuild_ddp, warn_of_other_settings
from lightning_compress.errors import invalid, is_number
from lightning_compress.messages import in_short, named
from lightning_compress.modules.call_log import CallLog, record_calls
from lightning_compress.modules.copying import copy_tensors
from lightning_compress.modules.isolation import evaluation_mode, isolated_random_state, restore_modes_, training_modes
from lightning_compress.modules.paths import module_at
from lightning_compress.modules.routing import form_of
from lightning_compress.probe import observe_steps
from lightning_compress.quantization import convert
from lightning_compress.quantization.change import CHANGE
from lightning_compress.quantization.guarded import guarded_conversion, guards_of
from lightning_compress.quantization.numerics.int8 import StaticInt8
from lightning_compress.quantization.numerics.scheme import Scheme
from lightning_compress.quantization.plan import explain, make_plan, summary
from lightning_compress.quantization.recipe import Recipe, check_flow, check_overrides
from lightning_compress.quantization.schemes import describe, resolve
from lightning_compress.quantization.static.calibrate import adjusted, calibrate
from lightning_compress.quantization.static.rounding import AVERAGING_CONSTANT
from lightning_compress.quantization.static.traced import reduce_ranges_, traced_units
from lightning_compress.quantization.trainer import (
    compare_with_float,
    may_rescale,
    refuse_accelerator,
    run_training_step,
)
from lightning_compress.silent_copy import make_probe
from lightning_compress.structure.listener import averaged_copies
from lightning_compress.targets import Targets
from lightning_compress.window import Bounds, Window, fit_length
from lightning_compress.windowed_callback import WindowedCallback

_WINDOW = Window()
_FEW = round(1 / AVERAGING_CONSTANT)
"""Ranges that have followed for fewer batches than this are hardly averages."""
_CALIBRATION = 32
"""On so many batches ranges are found where a guard asks for a model with less in int8."""


class QuantizationAwareTraining(WindowedCallback):
    """Trains with fake-quantized weights (and activations), and converts the model to int8 or less when `fit` ends.

    At the window's start the largest sub-modules whose traced form computes what they computed are given
    fake-quantizers (BatchNorm folded); the rest stays float and is listed with its reason. Parameters stay the same
    objects with their values, so optimizers, penalties and averages go on. (Only ``StaticInt8(equalize=True)`` or
    ``smooth=True`` changes values first, as before calibration, where the window starts with the fit and nothing
    averages weights; the float function stays.) After the fit the model computes in int8 on the CPU:
    ``trainer.test(model)`` measures just that. The next `fit` trains the float weights on.

    Args:
        scheme: ``int8_static`` or a `StaticInt8`; or ``int4_weight_only`` or a symmetric `WeightOnly`, of which
            linear and embedding layers are fake-quantized by torchao, and others rounded when the fit ends.
        flow: the way to static int8; there is one, ``pt2e``, through `torch.export`.
        window: prepared at its start; by default before training, or when the last channels have left where
            `ChannelPruning` removes some: fractions of the window count from there.
        targets: which layers; by default all that int8 has kernels for.
        overrides: pattern of layers' paths to the scheme that they get instead, one that works layer by layer; the
            last match wins. They train in float, and are quantized when the fit ends, but for linear and embedding
            layers in a symmetric `WeightOnly` outside of traced modules, which are fake-quantized.
        freeze_observers: fraction of the window after which activation ranges no longer move; 1 is never.
        freeze_batchnorm: fraction of the window after which BatchNorm statistics no longer move; 1 is never. Freeze
            them only where the learning rate is close to zero by then: weights that go on at their full rate leave the
            statistics behind, which costs an MLP on digits 2.5 points (``benchmarks/defaults.md``).
        convert: convert when the fit ends; False leaves the model fake-quantized.

    Raises:
        CompressionError: in the constructor for bad arguments; beside `PostTrainingQuantization`; at the window's
            start when no layer can be quantized. Nothing is changed then.

    Hooks: `on_train_batch_start` prepares (the batch is its example, nothing is taken from a loader) and freezes,
    `on_fit_end` converts (where no step was left after the last cut it prepares too, and takes the ranges of
    activations from the last batches of the fit), as do `on_test_start` and `on_predict_start` for a prepared
    checkpoint; `validate` stays fake-quantized.

    Example:
        >>> qat = QuantizationAwareTraining(window=Window(start=0.5))
        >>> # Trainer(callbacks=[qat]).fit(model, datamodule)

    References:
        Jacob et al., 2018 (arXiv:1712.05877), section 3; Krishnamoorthi, 2018 (arXiv:1806.08342), for freezing
        BatchNorm, which isn't done by default.
    """

    key = "quantization-aware training"
    conflicts = ("post-training quantization",)
    is_guarded = True
    leads_to = "quantized"

    def __init__(
        self,
        scheme: str | Scheme = "int8_static",
        flow: Literal["auto", "pt2e"] = "auto",
        window: Window = _WINDOW,
        targets: Targets | None = None,
        overrides: dict[str, str | Scheme] | None = None,
        freeze_observers: float = 1.0,
        freeze_batchnorm: float = 1.0,
        convert: bool = True,
    ) -> None:
        super().__init__(window)
        self.scheme = resolve(scheme)
        self.scheme.check_trains()
        check_flow(flow, self.scheme)
        for name, value in {"freeze_observers": freeze_observers, "freeze_batchnorm": freeze_batchnorm}.items():
            if not (is_number(value) and 0 < value <= 1):
                raise invalid(name, "lie in (0, 1]", value, "It is a fraction of the window; 1 never freezes.")
        self.flow, self.targets, self.overrides, self.convert = flow, targets, overrides, convert
        self._overrides = check_overrides(overrides)
        if calibrating := [other.name for other in self._overrides.values() if other.calibrates]:
            must, remedy = f"name no {calibrating[0]} in training", "Use PostTrainingQuantization for that."
            raise invalid("overrides", must, overrides, remedy)
        self.freeze_observers, self.freeze_batchnorm = freeze_observers, freeze_batchnorm
        self._notes: list[str] = []
        self._modes: dict[Any, bool] = {}
        self._batch: Any = None
        self._recent: deque[Any] = deque(maxlen=_FEW)

    @property
    def waits(self) -> bool:
        """Whether quantization begins when the last channels have left, as no window says when."""
        return self.window == _WINDOW

    @override
    def phase(self, trainer: pl.Trainer) -> str | None:
        return None if convert.form_name(trainer.lightning_module) == "float" else self.leads_to

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage in ("test", "predict"):
            refuse_accelerator(trainer)
        if stage == "fit" and str(trainer.precision).endswith(("16-true", "64-true")):
            raise invalid("precision", "keep weights in float32", trainer.precision, "Use 'bf16-mixed' or '32-true'.")
        self._modes = training_modes(pl_module)
        self._recent.clear()
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            if convert.form_name(pl_module) == "converted":
                convert.revert_(pl_module)
            if self._other_scheme(pl_module):
                convert.revert_(pl_module, "float")

    def _other_scheme(self, pl_module: pl.LightningModule) -> str:
        """Return the scheme that a prepared module has, if it isn't the one that was asked for."""
        record = convert.record_of(pl_module)
        return "" if record is None or record["scheme"] == describe(self.scheme) else str(record["scheme"])

    @override
    def begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if other := self._other_scheme(pl_module):  # of the checkpoint that this fit resumes from
            now = str(describe(self.scheme))
            warn_of_other_settings(type(self).__name__, {"scheme": other}, {"scheme": now}, "codes")
        if self.targets is not None:
            self.targets.check_patterns(pl_module)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._bounds is None and self.waits:
            bounds = self.window.bounds(*fit_length(trainer))
            last = max(other.final_step(trainer) for other in compression_callbacks(trainer))
            self._bounds = Bounds(max(bounds.start, last), max(bounds.end, last + 1))
        super().on_train_start(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._step >= self.bounds.start and convert.form_name(pl_module) == "float":
            others = compression_callbacks(trainer)
            for other in others:
                other.apply_pending_(trainer, pl_module, batch, batch_idx)
            if all(other.is_final() for other in others):
                self._prepare(trainer, pl_module, batch, batch_idx)
        self._freeze(pl_module)
        self._batch = batch
        if convert.form_name(pl_module) == "float" and self._trained > -_FEW:
            self._recent.append((copy_tensors(batch), batch_idx))  # should the fit end before it is prepared

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *args)
        if trainer.world_size > 1 and convert.form_name(pl_module) == "prepared":
            reduce_ranges_(pl_module, partial(trainer.strategy.reduce, reduce_op="max"))

    @property
    def _trained(self) -> int:
        """Optimizer steps since the window's start; negative before it."""
        return self._step - self.bounds.start

    def _prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        log = CallLog()
        for seen in observe_steps(trainer, pl_module, batch, batch_idx, record_calls):
            log.merge(seen)
        plan = make_plan(pl_module, log, self.scheme, self.targets, self._overrides, training=True)
        if plan.units and may_rescale(trainer):
            with evaluation_mode(pl_module):
                plan.units = [
                    adjusted(pl_module, unit, plan.traces[unit.path], log, self.scheme, training=True)
                    for unit in plan.units
                ]
        described = plan.describe()
        convert.prepare_(pl_module, described, plan.traces)
        self.sync_(trainer, pl_module)
        if trainer.training:
            rebuild_ddp(trainer, pl_module)
        self._notes = explain(described)
        if floats := sorted(path for path in plan.layers if form_of(module_at(pl_module, path)) is None):
            self._notes.append(f"{named(floats)}: trained in float, rounded when the fit ends")
        head = f"{type(self).__name__}: quantizes {summary(described)}."
        rank_zero_info("\n  ".join(in_short([head, *self._notes])))

    def _freeze(self, pl_module: pl.LightningModule) -> None:
        progress = self.bounds.progress(self._step)
        if progress is None:
            return
        for form in traced_units(pl_module):
            form.observers_frozen = progress >= self.freeze_observers < 1.0
            form.batchnorm_frozen = progress >= self.freeze_batchnorm < 1.0

    @override
    def sync_(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for averaged in averaged_copies(trainer):
            CHANGE.sync_(averaged, pl_module)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        late = self._recent and convert.form_name(pl_module) == "float" and self._trained >= 0
        if late and all(other.is_final() for other in compression_callbacks(trainer)):
            self._prepare_late(trainer, pl_module)
        has_trained = self._bounds is not None  # not where all epochs were over
        if has_trained and convert.form_name(pl_module) == "prepared" and self._trained < _FEW:
            self._notes.append(f"only {self._trained} optimizer steps were trained with fake-quantizers")
            rank_zero_info(f"{type(self).__name__}: {self._notes[-1]}. Train longer, or let channels leave earlier.")
        self._recent.clear()
        if self.convert and convert.form_name(pl_module) == "prepared":
            floats = make_probe(trainer, pl_module, list(pl_module.parameters()))
            convert.revert_(floats, "float")
            self._convert_(trainer, pl_module)
            self._compare(trainer, pl_module, floats)
        if convert.form_name(pl_module) == "float":
            rank_zero_warn(f"{type(self).__name__}: the fit ended before the window began; the model is still float.")

    def _convert_(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Convert the module as it was trained; where a guard is against it, its float weights with less in int8."""
        other = None
        if guards_of(trainer):
            scheme = self.scheme
            if isinstance(scheme, StaticInt8):  # weights were trained where they are
                scheme = replace(scheme, equalize=False, smooth=False)
            recipe = Recipe(scheme, _CALIBRATION, self.targets, self.overrides, "auto")
            with torch.inference_mode(False), isolated_random_state(seed=0):
                other = guarded_conversion(trainer, pl_module, recipe)
        if other is None:
            convert.convert_prepared_(pl_module)
            return
        convert.revert_(pl_module, "float")
        convert.transplant_(pl_module, other)
        record = convert.record_of(pl_module)
        assert record is not None
        self._notes = explain(record)

    def _prepare_late(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prepare when a fit has ended in which no step was left, with ranges of activations from its last batches."""
        # The same on all ranks; and the model has left its device by now.
        recent = move_data_to_device(trainer.strategy.broadcast(list(self._recent)), pl_module.device)
        self._prepare(trainer, pl_module, *recent[-1])
        probe = make_probe(trainer, pl_module)
        with trainer.precision_plugin.train_step_context():
            calibrate(probe, recent, len(recent), run_training_step)
        CHANGE.load_extra_(pl_module, CHANGE.extra_state(probe))

    def _compare(self, trainer: pl.Trainer, pl_module: pl.LightningModule, floats: pl.LightningModule) -> None:
        """Say how well int8 and float agree on the last batch of the training, and if it takes longer; on copies."""
        batch, self._batch = self._batch, None
        int8 = any(scheme.needs_cpu for scheme in (self.scheme, *self._overrides.values()))
        if batch is None or (int8 and pl_module.device.type != "cpu"):
            return
        with torch.no_grad(), isolated_random_state():
            agreement, line = compare_with_float(trainer, floats, make_probe(trainer, pl_module), batch, "validation")
        record = convert.record_of(pl_module)
        if agreement is not None and record is not None:
            record["agreement"] = asdict(agreement)
        for said in filter(None, ("" if agreement is None else f"agreement with float: {agreement}", line)):
            self._notes.append(said)
            rank_zero_info(f"{type(self).__name__}: {said}.")

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if convert.form_name(pl_module) == "float":
            rank_zero_warn(
                "QuantizationAwareTraining: these weights were saved before quantization began; they run as float."
            )
        elif self.convert:
            convert.convert_prepared_(pl_module)
            inside = set(pl_module.modules())
            restore_modes_({module: mode for module, mode in self._modes.items() if module not in inside})

    on_predict_start = on_test_start

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if trainer.state.fn == "fit" and convert.form_name(pl_module) != "adapted":
            convert.revert_(pl_module, "float")
        super().on_exception(trainer, pl_module, exception)

    @override
    def close(self, pl_module: pl.LightningModule) -> None:
        super().close(pl_module)
        self._modes, self._batch = {}, None
        self._recent.clear()

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_modes": {}, "_batch": None, "_recent": deque(maxlen=_FEW)}

    @override
    def unfinished(self) -> str:
        if self._trained == 0:
            return "no step was left for it. Let channels leave earlier, or train longer."
        return "what was to be frozen may not have been. Shorten the window, or train longer."

    @override
    def report_notes(self) -> list[str]:
        return [*super().report_notes(), *self._notes]
