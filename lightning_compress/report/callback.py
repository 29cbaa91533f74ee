"""`CompressionReport`: measures the model before and after `fit` and as it is tested, and writes the report."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import ReferenceType, ref

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.nn.parameter import is_lazy
from typing_extensions import override

from lightning_compress.callback import CompressionCallback, ReportFile, compression_callbacks
from lightning_compress.errors import CompressionError, in_a_line, invalid
from lightning_compress.probe import example_calls
from lightning_compress.quantization.convert import form_name
from lightning_compress.report.compare import Comparison, compare
from lightning_compress.report.evaluations import (
    Evaluation,
    LastValidation,
    before_fit,
    fingerprint,
    merged,
    of_same_weights,
    plain_metrics,
    samples_of,
    validate_copy,
)
from lightning_compress.report.facts import Sensitivity
from lightning_compress.report.files import show, write
from lightning_compress.report.loggers import log_report
from lightning_compress.report.measure import BATCH_SIZES, MAX_SECONDS, check_settings, count
from lightning_compress.report.ratios import AFTER, BEFORE
from lightning_compress.report.rows import Rows, structural_copy
from lightning_compress.report.run_settings import run_settings
from lightning_compress.twin import FLOAT


class CompressionReport(CompressionCallback):
    """Measures what compression brought, and writes ``report.html``, with the same as JSON, Markdown, CSV and pictures.

    The row *before* is the model when ``fit`` starts (or ``test`` or ``validate``, if no ``fit`` came first); *after*
    is the model when ``fit`` has ended and other callbacks have converted it. A later ``test`` or ``validate`` of the
    same module adds its metrics to the row that was evaluated, or a row *tested* where it ran another form, such as the
    one that ``PostTrainingQuantization`` makes.

    Metrics stand beside how they were measured. Those of *after* are of a test, else of the last validation of ``fit``.
    Those of *before* are of a test or validation of the same weights before ``fit`` with this callback, of the float
    model that ``PostTrainingQuantization(compare=True)`` runs beside the quantized one, or of ``validate_before``.
    A metric that was measured on another number of samples than the last of its name is left out, with a note.

    All latencies are measured on the CPU, where every form runs, when a run has ended; rows take turns. For that the
    original's structure is kept, which shares its tensors with the model: it costs the memory of what no longer is in
    the model, such as the float weights of one that was converted, and of a copy of the weights where the model is on
    an accelerator. Training is bit-identical with and without this callback. Inputs are what reaches ``forward`` when a
    step of the module's own takes the first batch of the run; what reaches its children, which then run one after the
    other, where the step doesn't call ``forward``; else ``example_input_array``, else the batch, bound to the signature
    of ``forward``. A model that can't be run so is still counted and weighed, and a note gives the reason. Whatever
    fails in here becomes a note and a warning: no run ends because of its report.

    Other callbacks add sentences to the notes with a method ``report_notes() -> list[str]``. Loggers of the Trainer get
    the figures as ``compression/<row>/<figure>``, and the pictures where they take some.

    Args:
        directory: Where to write; ``trainer.log_dir``, else ``trainer.default_root_dir``, by default.
        picture: Draw ``report.png`` too, and ``sparsity.png`` where weights were pruned, if matplotlib is installed
            (``lightning_compress[plots]``).
        batch_sizes: Batch sizes at which latency is measured.
        max_seconds: Time budget for each batch size and row.
        threads: Threads of torch while latency is measured; those that are set by default.
        validate_before: Run the validation loop on the model before ``fit`` trains it, so that *before* has metrics. It
            runs on a copy, with neither loggers nor callbacks, and in one process only.
        sensitivity: Path of a table that ``sensitivity`` saved as JSON: what each layer costs, beside what it saves.

    Raises:
        CompressionError: ``directory`` is no path, ``sensitivity`` is no table, or a batch size, the budget or the
            number of threads isn't positive.

    Example:
        >>> report = CompressionReport(batch_sizes=[1, 8], max_seconds=0.5)
        >>> report.comparison is None
        True

    Hooks: ``setup``, ``on_fit_start``, the first ``on_train_batch_start`` or ``on_test_batch_start``, ``on_test_end``,
    ``on_validation_start``, ``on_validation_end``, ``teardown``, ``on_exception``.
    """

    key = "report"

    def __init__(
        self,
        directory: str | None = None,
        *,
        picture: bool = True,
        batch_sizes: Sequence[int] = BATCH_SIZES,
        max_seconds: float = MAX_SECONDS,
        threads: int | None = None,
        validate_before: bool = False,
        sensitivity: str | None = None,
    ) -> None:
        super().__init__()
        check_settings(batch_sizes, max_seconds, threads)
        if directory is not None and not isinstance(directory, str | os.PathLike):
            raise invalid("directory", "be a path or None", directory)
        self.directory = directory
        self.picture = picture
        self.batch_sizes = tuple(batch_sizes)
        self.max_seconds = max_seconds
        self.threads = threads
        self.validate_before = validate_before
        self.sensitivity = sensitivity
        self._sensitivity = None if sensitivity is None else Sensitivity.load(sensitivity)
        self.comparison: Comparison | None = None
        self._folder = ""
        self._measured: ReferenceType[nn.Module] | None = None
        self._start(None)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the callback is a callback, not a copy of the models and the batch that it holds.
        rows = replace(self._rows, models={}, files={}, inputs=None)
        return {**super().__getstate__(), "_rows": rows, "_waiting": None, "_tested": None, "_measured": None}

    def _start(self, pl_module: pl.LightningModule | None) -> None:
        self._rows = Rows(self.batch_sizes, self.max_seconds, self.threads)
        self._evaluations: list[Evaluation] = []
        self._validated = LastValidation()
        self._failures: list[str] = []
        self._waiting: pl.LightningModule | None = None
        self._tested: nn.Module | None = None
        self._measured = None if pl_module is None else ref(pl_module)

    @contextmanager
    def _not_ending_the_run(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._failed(f"{what}: {in_a_line(error)}")

    def _failed(self, note: str) -> None:
        self._failures.append(note)
        _warn(note)

    # Before a run.

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # On all ranks: `log_dir` is broadcast.
        self._folder = str(self.directory or trainer.default_root_dir)
        with self._not_ending_the_run("The Trainer's log_dir couldn't be had"):
            self._folder = str(self.directory or trainer.log_dir or trainer.default_root_dir)
        if stage not in ("test", "validate") or not trainer.is_global_zero:
            return
        with self._not_ending_the_run("The model couldn't be looked at"):
            first = self._measured is None or self._measured() is not pl_module
            if first:
                self._start(pl_module)
            # Taken here because a callback that quantizes for the test may run its `on_test_start` before ours.
            self._tested = structural_copy(pl_module)
            self._waiting = self._tested if first else None

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        earlier = self._evaluations if self._measured is not None and self._measured() is pl_module else []
        self._start(pl_module)
        with self._not_ending_the_run("before: it couldn't be measured"):
            # Kept until inputs are there: by the first batch a callback may have prepared the model for quantization.
            self._waiting = structural_copy(pl_module)
            if not any(map(is_lazy, pl_module.parameters())):  # which have a shape after the first batch
                self._rows.measurements[BEFORE] = count(self._waiting)
        with self._not_ending_the_run("before: no metrics"):
            self._evaluations += of_same_weights(earlier, pl_module, BEFORE)
            if self.validate_before:
                self._validate(trainer, pl_module)

    def _validate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.world_size > 1:
            raise invalid(
                "validate_before", "be for one process", trainer.world_size, "Call trainer.validate before fit."
            )
        metrics, samples = validate_copy(trainer, pl_module)
        if not metrics:
            raise CompressionError("the validation before fit logged nothing.")
        self._evaluations.append(
            Evaluation(BEFORE, plain_metrics(metrics), before_fit("validation", pl_module), samples)
        )

    # In a run.

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._measure_waiting(trainer, batch, "validation")

    @override
    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._measure_waiting(trainer, batch, "test")

    @override
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._measure_waiting(trainer, batch, "validation")

    def _measure_waiting(self, trainer: pl.Trainer, batch: Any, stage: str) -> None:
        if self._waiting is None:
            return
        waiting, self._waiting = self._waiting, None
        with self._not_ending_the_run("before: it couldn't be run"):
            try:
                vars(waiting)["_device"] = torch.device("cpu")
                calls = example_calls(trainer, waiting, move_data_to_device(batch, torch.device("cpu")), stage)
                self._rows.take_inputs(calls)
            except CompressionError as error:
                self._rows.no_inputs = str(error)
            self._rows.run_before(waiting)

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._evaluated(trainer, pl_module, "test", trainer.test_dataloaders, trainer.num_test_batches)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._validated.begin(trainer)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._evaluated(trainer, pl_module, "validation", trainer.val_dataloaders, trainer.num_val_batches)
        elif not trainer.sanity_checking:  # which sees a few batches only
            with self._not_ending_the_run("The metrics of the validation couldn't be taken"):
                self._validated.remember(trainer, form_name(pl_module))

    def _evaluated(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str, loaders: Any, batches: Sequence[float]
    ) -> None:
        if not trainer.is_global_zero:
            return
        # Here, not in `teardown`: there the form that was evaluated may already have been taken out.
        with self._not_ending_the_run(f"The metrics of the {stage} couldn't be taken"):
            name, samples = self._rows.of(pl_module) or self._rows.add(pl_module), samples_of(loaders, batches)
            metrics = plain_metrics(trainer.callback_metrics)
            for file in _files(trainer):
                origin = f"{stage} of the file"
                self._evaluations.append(Evaluation(file.name, _taken(metrics, file.prefix), origin, samples))
            float_row = None if self._tested is None else self._rows.of(self._tested)
            if self._tested is not None and float_row is not None and float_row != name:
                beside = _taken(metrics, FLOAT)
                weights, origin = fingerprint(self._tested), f"float beside quantized in {stage}"
                self._evaluations.append(Evaluation(float_row, beside, origin, samples, weights))
            self._evaluations.append(Evaluation(name, metrics, stage, samples, fingerprint(pl_module)))

    # After a run.

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.is_global_zero and stage in ("fit", "test", "validate") and self._measured is not None:
            self._measure_waiting(trainer, None, "test")  # not a single batch came
            if stage == "fit":
                with self._not_ending_the_run("after: it couldn't be measured"):
                    # After every callback's `on_fit_end`, in which models are converted.
                    self._rows.measure(AFTER, pl_module)
                    self._evaluations += self._validated.evaluations(AFTER, trainer, form_name(pl_module))
            if self._rows.measurements:
                with self._not_ending_the_run("The report failed"):
                    self._report(trainer)
        self._waiting = self._tested = None

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._start(None)

    def _report(self, trainer: pl.Trainer) -> None:
        for file in _files(trainer):
            with self._not_ending_the_run(f"{file.name}: no row"):
                self._rows.add_file(file)
        with self._not_ending_the_run("No latency"):
            self._rows.time()
        measured = self._rows.measurements
        metrics, origins, left_out = merged([found for found in self._evaluations if found.row in measured])
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        others = [note for callback in callbacks for note in self._notes_of(callback)]
        settings = ""
        with self._not_ending_the_run("The settings couldn't be taken"):
            settings = run_settings(trainer, compression_callbacks(trainer))
        notes = [*left_out, *self._rows.notes.values(), *self._failures, *others]
        histories = [history for callback in compression_callbacks(trainer) if (history := callback.report_history())]
        folder = Path(self._folder)
        compared = compare(measured, metrics=metrics, notes=notes, origins=origins, settings=settings)
        compared = replace(compared, sensitivity=self._sensitivity)
        self.comparison, written = write(compared, folder, self.picture, histories, _warn)
        with self._not_ending_the_run("The loggers couldn't take the report"):
            pictures = [folder / name for name in written if name.endswith(".png")]
            log_report(trainer.loggers, self.comparison.rows, pictures, trainer.global_step)
        show(self.comparison, folder, written)

    def _notes_of(self, callback: pl.Callback) -> list[str]:
        offered = getattr(callback, "report_notes", None)  # a callback of the user's may have notes too
        notes: list[str] = []
        if callable(offered):
            with self._not_ending_the_run(f"The notes of {type(callback).__name__} couldn't be taken"):
                notes += map(str, offered())
        return notes


def _files(trainer: pl.Trainer) -> list[ReportFile]:
    return [file for callback in compression_callbacks(trainer) for file in callback.report_files()]


def _taken(metrics: dict[str, float], prefix: str) -> dict[str, float]:
    """Take the metrics with a prefix out; they are returned without it."""
    return {name.removeprefix(prefix): metrics.pop(name) for name in list(metrics) if name.startswith(prefix)}


def _warn(note: str) -> None:
    rank_zero_warn(f"CompressionReport: {note}")
