"""`PostTrainingQuantization`: decides when a trained model is calibrated, converted, and float again."""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_compress.calibration import stage_of
from lightning_compress.callback import CompressionCallback
from lightning_compress.errors import CompressionError
from lightning_compress.messages import in_short
from lightning_compress.modules.isolation import isolated_random_state, restore_modes_, training_modes
from lightning_compress.quantization import convert
from lightning_compress.quantization.guarded import guarded_copy
from lightning_compress.quantization.numerics.scheme import Scheme
from lightning_compress.quantization.plan import explain, summary
from lightning_compress.quantization.quantize import own_parameters_
from lightning_compress.quantization.recipe import Recipe
from lightning_compress.quantization.trainer import compare_with_float, refuse_accelerator
from lightning_compress.silent_copy import make_probe, unsilence_
from lightning_compress.structure.change import require_float
from lightning_compress.targets import Targets
from lightning_compress.twin import FLOAT, Twin


class PostTrainingQuantization(CompressionCallback):
    """Quantizes a trained model when `test`, `validate` or `predict` starts: its metrics are those of that model.

    Afterwards the float model is back. The validation within a fit sees the float model.

    Static int8 and GPTQ are calibrated on ``calibration_dataloader()`` of the datamodule, or of the module, if there is
    one, else on the train loader; never on test data. ``trainer.test(model, test_loader)`` takes the module's:
    ``model.calibration_dataloader = lambda: train_loader``. Shuffling is the same in every run and on every rank.

    Batches go through ``calibration_step(batch)`` of the module, if it has one, else as its own evaluation feeds them:
    through ``test_step``, ``validation_step`` or ``predict_step`` (that of the running stage first), on a copy that
    logs nothing, after the hooks of batches of module and datamodule. If a step fails on these batches the next is
    tried, ``forward`` at last. The log says which way was taken.

    Args:
        scheme: ``int8_static``, ``int8_dynamic``, ``int8_weight_only``, ``int4_weight_only``, ``nf4`` or ``gptq`` (see
            `quantize`), a scheme object, or the import path of a class of yours. Int8 runs on the CPU alone.
        flow: the way to static int8; there is one, ``pt2e``, through `torch.export`.
        calibration_batches: how many batches calibrate at most.
        targets: which layers; by default all that the scheme has kernels for.
        overrides: pattern of layers' paths to the scheme that they get instead, any but ``int8_static``; the last
            match wins.
        keep: leave the module quantized after the test, to save it; the next fit with this callback trains its float
            form.
        compare: log the float model's metrics too, as ``float/...``. Its test step then runs beside the quantized
            model's, with every batch.

    Attributes:
        quantized_model: the quantized module of the last test, validate or predict, None before.

    Raises:
        CompressionError: in the constructor for bad arguments; on test start if there is nothing to calibrate on, or
            no layer can be quantized. The model is unchanged then.

    Hooks: `on_test_start`, `on_validation_start` (of `validate`) and `on_predict_start` quantize, `teardown` and
    `on_exception` put the float model back; with ``compare``, the hooks of batches run the float model.

    Example:
        >>> ptq = PostTrainingQuantization("int8_static", calibration_batches=32, compare=True)
        >>> # Trainer(callbacks=[ptq]).test(model, datamodule)
    """

    key = "post-training quantization"
    is_guarded = True

    def __init__(
        self,
        scheme: str | Scheme = "int8_static",
        flow: Literal["auto", "pt2e"] = "auto",
        calibration_batches: int = 32,
        targets: Targets | None = None,
        overrides: dict[str, str | Scheme] | None = None,
        keep: bool = False,
        compare: bool = False,
    ) -> None:
        self.recipe = Recipe(scheme, calibration_batches, targets, overrides, flow)
        self.keep = keep
        self.compare = compare
        self.quantized_model: pl.LightningModule | None = None
        self._twin: Twin | None = None
        self._floats: pl.LightningModule | None = None
        self._changed = False
        self._modes: dict[Any, bool] = {}
        self._notes: list[str] = []

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            if self.recipe.needs_cpu:
                refuse_accelerator(trainer)
            self._modes = training_modes(pl_module)
        if stage == "fit" and convert.form_name(pl_module) == "converted":
            convert.revert_(pl_module, "float")
        super().setup(trainer, pl_module, stage)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.compare:
            self._twin = self._make_twin(trainer, pl_module)
        self._quantize(trainer, pl_module)
        self._beside("start")

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "validate":  # and not in a fit
            self.on_test_start(trainer, pl_module)

    def _make_twin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Twin | None:
        with torch.inference_mode(False):
            probe = make_probe(trainer, pl_module)
            try:
                convert.revert_(probe, "float")
            except CompressionError:  # it came from a file, and its float weights are gone
                rank_zero_warn(f"{type(self).__name__}: the model has no float weights to compare with.")
                return None
        return Twin(probe.eval(), "test" if trainer.testing else "validation", FLOAT, pl_module.log)

    @override
    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._beside("epoch_start")

    on_validation_epoch_start = on_test_epoch_start

    @override
    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._time(trainer, batch)
        if self._twin is not None:
            self._twin.step(trainer, batch, batch_idx, dataloader_idx)

    on_validation_batch_start = on_predict_batch_start = on_test_batch_start

    @override
    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._beside("epoch_end")

    on_validation_epoch_end = on_test_epoch_end

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._beside("end")

    on_validation_end = on_test_end

    def _beside(self, hook: str) -> None:
        if self._twin is not None:
            self._twin.call(hook)

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._quantize(trainer, pl_module)

    def _quantize(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        require_float(pl_module, "train")
        if convert.form_name(pl_module) == "converted":
            return
        if convert.form_name(pl_module) == "prepared":
            convert.convert_prepared_(pl_module)
            return
        with torch.inference_mode(False), isolated_random_state(seed=0):  # every rank shuffles alike
            # All is done on a copy, so that an error leaves the module as it was.
            shared = list(pl_module.parameters())
            probe, way = guarded_copy(trainer, pl_module, self.recipe)
            self._floats = make_probe(trainer, pl_module, list(pl_module.parameters()))
            convert.transplant_(pl_module, probe)
            own_parameters_(probe, shared)
        self._changed = True
        record = convert.record_of(pl_module)
        assert record is not None
        self._notes = explain(record)
        unsilence_(probe)
        convert.forget_(probe)
        self.quantized_model = probe
        said = f"{type(self).__name__}: quantized {summary(record)}{way}."
        rank_zero_info("\n  ".join(in_short([said, *self._notes])))

    def _time(self, trainer: pl.Trainer, batch: Any) -> None:
        """Say if the first batch takes longer than in float; both forms are copies."""
        floats, self._floats = self._floats, None
        if floats is None or self.quantized_model is None:
            return
        with torch.inference_mode(False), isolated_random_state():
            quantized = make_probe(trainer, self.quantized_model)
            _, line = compare_with_float(trainer, floats, quantized, batch, stage_of(trainer))
        if line:
            self._notes.append(line)
            rank_zero_info(f"{type(self).__name__}: {line}.")

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._restore(pl_module, self.keep)

    @override
    def close(self, pl_module: pl.LightningModule) -> None:
        self._restore(pl_module)

    def _restore(self, pl_module: pl.LightningModule, keep: bool = False) -> None:
        self._twin = self._floats = None
        if self._changed:
            if not keep:
                convert.revert_(pl_module, "float")
            restore_modes_(self._modes)  # also those of what is kept aside
        self._changed = False
        self._modes = {}
        super().close(pl_module)

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_modes": {}, "_twin": None, "_floats": None, "quantized_model": None}

    @override
    def report_notes(self) -> list[str]:
        return self._notes
