"""`ExportModel`: decides when a trained model becomes a file, and lets a test measure that file."""

from __future__ import annotations

import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_compress.calibration import calibration_batches, calibration_loader
from lightning_compress.callback import CompressionCallback, ReportFile, refuse_strategy
from lightning_compress.errors import CompressionError, invalid, is_count
from lightning_compress.export.dry_run import refuse_early
from lightning_compress.export.export import export_call
from lightning_compress.export.facts import ExportedModel
from lightning_compress.export.file_twin import FileTwin
from lightning_compress.export.formats import FORMATS, refuse_unready, resolve_target
from lightning_compress.export.runtime_module import RuntimeModule
from lightning_compress.export.sidecar import weights_sha256
from lightning_compress.export.step_calls import (
    calls_alike,
    feed_of_steps,
    float_part,
    loader_of_calls,
    part_path,
    served_part,
    step_calls,
)
from lightning_compress.modules.isolation import isolated_random_state
from lightning_compress.quantization.ptq import PostTrainingQuantization
from lightning_compress.silent_copy import make_probe

_CALLS = 8


class ExportModel(CompressionCallback):
    """Writes the trained model as a file for another runtime, and lets the next test measure the file too.

    When a fit ends, what serves is written: converted where it was prepared for int8, with adapters merged, the average
    where a callback averages weights, of a module that distils the student alone. It is the one module that
    ``test_step`` calls (else ``validation_step``, ``predict_step`` or ``forward``), or the one that ``module`` names.
    With ``PostTrainingQuantization`` in the same Trainer the int8 model is written when a test begins. The file is
    proven as `export` does it, on calls that the module's own steps make of batches that calibrate
    (``calibration_dataloader``), else of training batches.

    With ``test=True`` a ``trainer.test`` logs the metrics of the file beside the model's: ``onnxruntime/test_acc``
    beside ``test_acc``. Each batch runs through ``test_step`` and the hooks of batches of a silent copy too, with
    metrics of its own, in which ``forward`` of the exported module runs the file; all other attributes are the
    module's. That holds for the file of the last fit or test, or for one that stands at ``path`` already, where its
    weights are those that are tested; where they aren't, a message says so.

    Args:
        path: of the file; its suffix is that of the target. Its facts are written beside it, as ``<path>.json``.
        target: ``onnxruntime``, ``openvino`` or ``tensorrt`` (``.onnx``), ``torch`` (``.pt2``) or ``executorch``
            (``.pte``); by default what the suffix says.
        test: let tests measure the file.
        module: dotted path of the module to write.
        dynamic: further dimensions that may vary, by the names of arguments: ``{"ids": [1]}``; those that differ
            between the batches are found.
        dynamic_batch: whether the file takes batches of any size.
        verify: whether the file is compared with the model, and not written where it computes something else.
        calibration_batches: how many batches are run for calls to compare, at most.

    Attributes:
        exported: what was written last, None before.

    Raises:
        CompressionError: in the constructor for bad arguments; before a fit, if the runtime isn't installed, the path
            can't be written, two callbacks would write or log the same, or there is no such module; at its first batch,
            if the module can't be traced, or ``test_step`` doesn't run it as a whole; when it ends, as `export`. No
            file is left then.

    Hooks: `setup`, the first `on_train_batch_start` refuse what can't work; `on_fit_end`, or with
    `PostTrainingQuantization` the first `on_test_batch_start`, write; the hooks of test batches and `on_test_epoch_end`
    run the file.

    Example:
        >>> export = ExportModel("model.onnx", target="openvino")
        >>> # Trainer(callbacks=[QuantizationAwareTraining(), export]).fit(model, datamodule)
    """

    key = "export"

    def __init__(
        self,
        path: str,
        target: str | None = None,
        test: bool = True,
        module: str = "",
        dynamic: dict[str, list[int]] | None = None,
        dynamic_batch: bool = True,
        verify: bool = True,
        calibration_batches: int = _CALLS,
    ) -> None:
        super().__init__()
        self.target = resolve_target(path, target)
        self.path = os.fspath(path)
        if not is_count(calibration_batches):
            raise invalid("calibration_batches", "be at least 1", calibration_batches)
        self.test = test
        self.module = module
        self.dynamic = dynamic
        self.dynamic_batch = dynamic_batch
        self.verify = verify
        self.calibration_batches = calibration_batches
        self.exported: ExportedModel | None = None
        self._part = ""
        self._start()

    def _start(self) -> None:
        self._twin: FileTwin | None = None
        self._begun = False
        self._notes: list[str] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_twin": None}

    @property
    def runtime(self) -> str:
        """The name of the runtime in which the file is proven and tested."""
        return FORMATS[self.target].runtime

    @override
    def why_conflicts(self, trainer: pl.Trainer, other: CompressionCallback) -> str:
        if isinstance(other, ExportModel):
            if Path(other.path).absolute() == Path(self.path).absolute():
                return f"`path` must differ from that of another ExportModel. Received: path={self.path!r} twice."
            if self.test and other.test and self.runtime == other.runtime:
                return (
                    "`test` must be False for all but one ExportModel of a runtime, since metrics are logged under its "
                    f"name. Received: {self.path} and {other.path}, both for {self.runtime}."
                )
        return super().why_conflicts(trainer, other)

    # Before anything is trained.

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._start()
        if stage == "fit" or (stage == "test" and quantizes_tests(trainer)):
            refuse_unready(self.path, self.target)
        refuse_strategy(trainer, type(self).__name__)
        self.refuse_others(trainer)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.exported = None
        part_path(pl_module, self.module)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self._begun and trainer.world_size == 1:
            self._begun = True
            dynamic = self.dynamic or {}
            refuse_early(trainer, pl_module, batch, self.module, self.test, self.dynamic_batch, dynamic)

    # When it is trained.

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if quantizes_tests(trainer):
            return  # when a test begins
        self._export_together(trainer, pl_module, None)

    def _export_together(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        """Write in one process, and let the others wait for it, and fail as it fails."""
        failure: Exception | None = None
        if trainer.is_global_zero:
            try:
                self.write(trainer, pl_module, batch)
            except Exception as error:
                if trainer.world_size == 1:
                    raise
                failure = error
        if trainer.world_size > 1:
            said = trainer.strategy.broadcast("" if failure is None else str(failure) or repr(failure))
            if said:
                raise CompressionError(said) from failure
            self.exported, self._part = trainer.strategy.broadcast((self.exported, self._part))

    def write(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any = None) -> None:
        """Write the module as it is now.

        Args:
            trainer: of the module.
            pl_module: the module.
            batch: as steps get it, for where no loader is known; it is an example and calibrates nothing.
        """
        with torch.inference_mode(False), isolated_random_state(seed=0):
            self._export(trainer, pl_module, batch)

    def _export(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        loader, probe = loader_of_calls(trainer, pl_module), make_probe(trainer, pl_module)
        if loader is None and batch is None:
            calibration_loader(trainer, pl_module)  # raises
        most = self.calibration_batches
        with isolated_random_state(loaders=loader):
            found = iter([batch]) if loader is None else calibration_batches(loader, trainer, probe, most)
            self._part, calls = step_calls(probe, *feed_of_steps(trainer, probe, found), self.module, most)
        part, floats = served_part(trainer, pl_module, self._part), float_part(pl_module, self._part)
        if getattr(trainer, "fast_dev_run", False):  # what has learned nothing mustn't take the place of what has
            with tempfile.TemporaryDirectory() as folder:
                self._write(part, floats, calls, Path(folder, Path(self.path).name))
            rank_zero_info(f"{type(self).__name__}: {self.path} can be written; with fast_dev_run it isn't.")
            return
        self.exported = self._write(part, floats, calls, Path(self.path))
        rank_zero_info(f"{type(self).__name__}: {self.exported}")

    def _write(
        self, part: torch.nn.Module, floats: torch.nn.Module | None, calls: list[Any], path: Path
    ) -> ExportedModel:
        calls, dynamic = calls_alike(part, calls, self.dynamic_batch)
        for name, places in (self.dynamic or {}).items():
            dynamic[name] = dynamic.get(name, set()) | {*places}
        return export_call(
            part,
            calls,
            path,
            self.target,
            dynamic_batch=self.dynamic_batch,
            dynamic=dynamic,
            verify=self.verify,
            float_model=floats,
        )

    # In a test.

    @override
    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if not self._begun:
            self._begun = True
            if quantizes_tests(trainer):
                self._export_together(trainer, pl_module, batch)
            with torch.inference_mode(False):
                self._twin = self._make_twin(trainer, pl_module, batch)
        if self._twin is not None:
            self._twin.step(trainer, batch, batch_idx, dataloader_idx)

    def _make_twin(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> FileTwin | None:
        """Return what runs the file beside the module; None where there is no file of this module."""
        if not self.test:
            return None
        part, reason = self._part if self.exported else self._part_in(trainer, pl_module, batch), "isn't there"
        if Path(self.path).is_file():
            file, served = RuntimeModule(self.path), served_part(trainer, pl_module, part).cpu().eval()
            if weights_sha256(served) == file.facts["weights_sha256"]:
                return FileTwin(trainer, pl_module, part, file, batch)
            reason = "holds other weights than those that are tested"
        self._notes = [
            f"{self.path} {reason}: its metrics aren't measured. Write it: fit the model with this callback, or run "
            "lightning-compress export for a checkpoint."
        ]
        rank_zero_info(f"{type(self).__name__}: {self._notes[0]}")
        return None

    def _part_in(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> str:
        with isolated_random_state():
            probe = make_probe(trainer, pl_module)
            return step_calls(probe, *feed_of_steps(trainer, probe, iter([batch])), self.module, 1)[0]

    @override
    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._twin is not None:
            self._twin.call("epoch_end")

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._twin is not None:
            self._twin.call("end")

    @override
    def close(self, pl_module: pl.LightningModule) -> None:
        self._twin = None

    @override
    def report_notes(self) -> list[str]:
        return self._notes

    @override
    def report_files(self) -> list[ReportFile]:
        if self.exported is None:
            return []
        name, size = Path(self.path).name, int(self.exported.facts["bytes"])
        opened = partial(RuntimeModule, self.path, None)
        return [ReportFile(name, size, self._part, f"{self.runtime}/", opened, self.exported.facts)]


def quantizes_tests(trainer: pl.Trainer) -> bool:
    """Tell whether a model of int8 is there in tests alone."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return any(isinstance(callback, PostTrainingQuantization) for callback in callbacks)
