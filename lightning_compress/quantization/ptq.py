"""`PostTrainingQuantization`: decides when a trained model is calibrated, converted, and float again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import CombinedLoader, rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from tqdm.auto import tqdm

from lightning_compress import structure
from lightning_compress.callback import make_probe, refuse_strategy, restore_modes_, training_modes, without_logging
from lightning_compress.errors import CompressionError
from lightning_compress.inputs import run_step
from lightning_compress.messages import in_short
from lightning_compress.quantization import forms
from lightning_compress.quantization.calibrate import evaluating
from lightning_compress.quantization.plan import explain, summary
from lightning_compress.quantization.qat import convert_prepared_, refuse_accelerator
from lightning_compress.quantization.quantize import Recipe, dry_run, own_parameters_, quantize_
from lightning_compress.quantization.schemes import Scheme
from lightning_compress.quantization.side_by_side import FloatTwin
from lightning_compress.targets import Targets


class PostTrainingQuantization(Callback):
    """Quantizes a trained model when `test` (or `predict`) starts, so that the test metric is that of the int8 model.

    Afterwards the float model is back. Static int8 is calibrated on ``datamodule.calibration_dataloader()`` if there
    is one, else on its train loader, in evaluation mode; never on test data. Without a datamodule, the module's own
    ``calibration_dataloader`` or ``train_dataloader`` is asked. Shuffling is the same in every run and on every rank.

    Args:
        scheme: ``int8_static``, ``int8_dynamic``, ``int8_weight_only`` or a scheme object.
        flow: what makes static int8, ``fx`` or ``pt2e`` (see `quantize`); ``auto`` is ``fx``, and ``pt2e`` where that
            can quantize nothing.
        calibration_batches: how many batches calibrate at most.
        targets: which layers; by default all that the scheme has kernels for.
        overrides: pattern of layers' paths to the scheme that they get instead, ``int8_dynamic`` or
            ``int8_weight_only``; the last match wins.
        keep: leave the module int8 after the test, to save it; the next fit with this callback trains its float form.
        compare: log the float model's metrics too, as ``float/...``. Its test step then runs beside the int8 model's,
            with every batch.

    Attributes:
        quantized_model: the int8 module of the last test or predict, None before.

    Raises:
        CompressionError: in the constructor for bad arguments; on test start if there is nothing to calibrate on, or
            no layer can be quantized. The model is unchanged then.

    Hooks: `on_test_start` and `on_predict_start` quantize, `teardown` and `on_exception` put the float model back; with
    ``compare``, the hooks of test batches run the float model.

    Example:
        >>> ptq = PostTrainingQuantization("int8_static", calibration_batches=32, compare=True)
        >>> # Trainer(callbacks=[ptq]).test(model, datamodule)
    """

    def __init__(
        self,
        scheme: str | Scheme = "int8_static",
        flow: Literal["auto", "fx", "pt2e"] = "auto",
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
        self._twin: FloatTwin | None = None
        self._ours = False
        self._modes: dict[Any, bool] = {}
        self._notes: list[str] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        refuse_strategy(trainer, type(self).__name__)
        if stage in ("test", "predict"):
            if self.recipe.needs_cpu:
                refuse_accelerator(trainer)
            self._modes = training_modes(pl_module)
        if stage == "fit" and forms.form_of(pl_module) == "converted":
            forms.revert_(pl_module, "float")
        structure.attach(pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.compare:
            self._twin = self._make_twin(trainer, pl_module)
        self._quantize(trainer, pl_module)
        self._beside("on_test_start")

    def _make_twin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> FloatTwin | None:
        with torch.inference_mode(False):
            probe = make_probe(trainer, pl_module)
            try:
                forms.revert_(probe, "float")
            except CompressionError:  # it came from a file, and its float weights are gone
                rank_zero_warn(f"{type(self).__name__}: the model has no float weights to compare with.")
                return None
        return FloatTwin(probe.eval(), pl_module.log, isolate_rng)

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._beside("on_test_epoch_start")

    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._twin is not None:
            in_turn = getattr(trainer.test_loop, "_is_sequential", True)
            several = in_turn and len(trainer.num_test_batches) > 1
            self._twin.step(batch, batch_idx, *[dataloader_idx] * several)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._beside("on_test_epoch_end")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._beside("on_test_end")

    def _beside(self, hook: str) -> None:
        if self._twin is not None:
            self._twin.call(hook)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._quantize(trainer, pl_module)

    def _quantize(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        forms.refuse_adapted(pl_module)
        if forms.form_of(pl_module) == "converted":
            return
        if forms.form_of(pl_module) == "prepared":
            convert_prepared_(pl_module)
            return
        with torch.inference_mode(False), isolate_rng():
            torch.manual_seed(0)  # every rank shuffles alike
            batches: Iterator[Any] = iter(())
            if self.recipe.calibrates:
                batches = _calibration_batches(trainer, pl_module, self.recipe.calibration_batches)
            # All is done on a copy, so that an error leaves the module as it was.
            shared = self.recipe.only_read(pl_module)
            probe = make_probe(trainer, pl_module, shared)
            first = next(batches, None)
            with evaluating(probe):
                quantize_(probe, self.recipe, first, batches, _way_to_run(probe, first))
            forms.transplant_(pl_module, probe)
            own_parameters_(probe, shared)
        self._ours = True
        record = forms.record_of(pl_module)
        assert record is not None
        self._notes = explain(record)
        for name in ("log", "log_dict"):
            del probe.__dict__[name]
        probe._trainer = None
        forms.forget_(probe)
        self.quantized_model = probe
        head = f"{type(self).__name__}: quantized {summary(record)}."
        rank_zero_info("\n  ".join(in_short([head, *self._notes])))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._restore(pl_module, self.keep)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore(pl_module)

    def _restore(self, pl_module: pl.LightningModule, keep: bool = False) -> None:
        self._twin = None
        if self._ours:
            if not keep:
                forms.revert_(pl_module, "float")
            restore_modes_(self._modes)  # also those of what is kept aside
        self._ours = False
        self._modes = {}
        structure.detach(pl_module)

    def __getstate__(self) -> dict[str, Any]:
        return {**without_logging(self), "_modes": {}, "_twin": None, "quantized_model": None}

    def report_notes(self) -> list[str]:
        """Lines for the report: which layers stay float and why, and what makes nothing faster."""
        return self._notes


def _way_to_run(probe: pl.LightningModule, batch: Any) -> Callable[[Any, Any], Any]:
    """How a batch goes through: ``calibration_step`` or ``forward``; a step of the module's own where that fails."""
    ways: list[Callable[[Any, Any], Any]] = [run_step]
    for step in ("validation_step", "test_step"):
        if is_overridden(step, probe):
            ways.append(partial(_call_step, step))
    errors = []
    for run in ways if batch is not None else ():
        try:
            dry_run(probe, batch, run)
            return run
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
    if errors:
        raise CompressionError(
            f"The module must run a calibration batch. Received: {errors[0]}. "
            "Set `example_input_array`, or define `calibration_step(batch)` on the module."
        )
    return run_step


def _call_step(step: str, module: pl.LightningModule, batch: Any) -> Any:
    return getattr(module, step)(batch, 0)


def _calibration_batches(trainer: pl.Trainer, pl_module: pl.LightningModule, limit: int) -> Iterator[Any]:
    """Batches on the module's device from the loader that may be calibrated on, with a progress bar."""
    loader = _calibration_loader(trainer, pl_module)
    if isinstance(loader, (dict, list, tuple)):
        loader = CombinedLoader(loader, "max_size_cycle")  # as a fit reads several loaders
    if isinstance(loader, CombinedLoader):
        loader = (batch for batch, *_ in loader)
    bar = trainer.progress_bar_callback
    try:
        count = min(limit, len(loader))
    except TypeError:  # an iterable dataset has no length, nor have combined loaders
        count = limit
    hidden = bar is None or getattr(bar, "is_disabled", False) or not trainer.is_global_zero
    for batch in tqdm(islice(loader, limit), "Calibrating", count, leave=False, disable=hidden):
        batch = trainer.strategy.batch_to_device(batch, pl_module.device, dataloader_idx=0)
        yield trainer.precision_plugin.convert_input(batch)


def _calibration_loader(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
    source: Any = getattr(trainer, "datamodule", None) or pl_module
    if not isinstance(source, pl.LightningDataModule):
        return _own_loader(source)
    # Under `test` only setup("test") has run. Where that made the training data too, a second setup could split anew.
    try:
        loader = _own_loader(source)
        if getattr(loader, "dataset", loader) is not None:
            return loader
    except CompressionError:
        raise
    except Exception:  # there is no training data yet
        pass
    source.setup("fit")
    return _own_loader(source)


def _own_loader(source: Any) -> Any:
    own = getattr(source, "calibration_dataloader", None)
    if own is not None:
        return own()
    loader = source.train_dataloader
    if getattr(type(source), "train_dataloader", None) not in (
        pl.LightningDataModule.train_dataloader,
        pl.LightningModule.train_dataloader,
    ) or not inspect.ismethod(loader):
        return loader()
    raise CompressionError(
        "`calibration_dataloader` must be there to calibrate on. Received: bare test loaders. "
        "Test data calibrates nothing. Pass a datamodule (its train loader serves), or define "
        "`calibration_dataloader()` on the module or datamodule."
    )
