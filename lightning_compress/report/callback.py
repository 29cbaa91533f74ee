"""`CompressionReport`: measures the model before and after `fit` and as it is tested, and writes the report."""

from __future__ import annotations

import copy
import importlib.util
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from weakref import ReferenceType, ref

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_compress.errors import CompressionError
from lightning_compress.probe import example_calls
from lightning_compress.report.compare import Comparison, compare
from lightning_compress.report.inputs import batch_size_of, called_in_turn, resize_batch, to_device
from lightning_compress.report.measure import BATCH_SIZES, MAX_SECONDS, Measurement, check_settings, measure
from lightning_compress.report.render import legend

Model = TypeVar("Model", bound=nn.Module)

_BEFORE, _AFTER, _TESTED = "before", "after", "tested"
_OF_A_LAYER = re.compile(r"sparsity(_\d+)?/")


class CompressionReport(Callback):
    """Measures what compression brought and writes ``report.json``, ``report.md``, ``report.png`` and ``sparsity.png``.

    The row *before* is the model when ``fit`` starts (or ``test``, where no ``fit`` came first), *after* is the model
    when ``fit`` has ended and other callbacks have converted it, with the metrics that were logged. A later ``test`` of
    the same module adds its metrics to the row that was tested, or a row *tested* where it ran another form, such as
    the one that ``PostTrainingQuantization`` makes.

    All latencies are measured on the CPU, where every form runs, on a structural copy that shares its tensors with the
    model: training is bit-identical with and without this callback. Inputs are what reaches ``forward`` when a step of
    the module's own takes the first batch of the run; what reaches its children, which then run one after the other,
    where the step doesn't call ``forward``; else ``example_input_array``, else the batch, bound to the signature of
    ``forward``. A model that can't be run so is still counted and weighed, and a note gives the reason.

    Other callbacks add sentences to the notes with a method ``report_notes() -> list[str]``.

    Args:
        directory: Where to write; ``trainer.log_dir``, else ``trainer.default_root_dir``, by default.
        picture: Draw ``report.png`` too, and ``sparsity.png`` where weights were pruned, if matplotlib is installed
            (``lightning_compress[plots]``).
        batch_sizes: Batch sizes at which latency is measured.
        max_seconds: Time budget for each batch size and row.
        threads: Threads of torch while latency is measured; those that are set by default.

    Raises:
        CompressionError: a batch size, the budget or the number of threads isn't positive.

    Example:
        >>> report = CompressionReport(batch_sizes=[1, 8], max_seconds=0.5)
        >>> report.comparison is None
        True

    Hooks: ``setup``, ``on_fit_start``, the first ``on_train_batch_start`` or ``on_test_batch_start``, ``on_test_end``,
    ``teardown``, ``on_exception``.
    """

    def __init__(
        self,
        directory: str | None = None,
        *,
        picture: bool = True,
        batch_sizes: Sequence[int] = BATCH_SIZES,
        max_seconds: float = MAX_SECONDS,
        threads: int | None = None,
    ) -> None:
        super().__init__()
        check_settings(batch_sizes, max_seconds, threads)
        self.directory = directory
        self.picture = picture
        self.batch_sizes = tuple(batch_sizes)
        self.max_seconds = max_seconds
        self.threads = threads
        self.comparison: Comparison | None = None
        self._rows: dict[str, Measurement] = {}
        self._metrics: dict[str, dict[str, float]] = {}
        self._notes: dict[str, str] = {}
        self._folder = ""
        self._inputs: Any = None
        self._called: tuple[str, ...] = ()
        self._no_inputs = ""
        self._waiting: LightningModule | None = None
        self._measured: ReferenceType[nn.Module] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the callback is a callback, not a copy of the model and the batch that it holds for a moment.
        return {**self.__dict__, "_inputs": None, "_waiting": None, "_measured": None}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # On all ranks: `log_dir` is broadcast.
        self._folder = str(self.directory or trainer.log_dir or trainer.default_root_dir)
        if stage != "test" or not trainer.is_global_zero:
            return
        if self._measured is None or self._measured() is not pl_module:
            self._start(pl_module)
            # Taken here because a callback that quantizes for the test may run its `on_test_start` before ours.
            self._waiting = _structural_copy(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        self._start(pl_module)
        # Kept until inputs are there: by the first batch a callback may have prepared the model for quantization.
        self._waiting = _structural_copy(pl_module)
        self._rows[_BEFORE] = measure(self._waiting)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._measure_waiting(trainer, batch, "validation")

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._measure_waiting(trainer, batch, "test")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        # Measured here, not in `teardown`: there the tested form may already have been taken out.
        name = self._row_of_tested(pl_module)
        self._metrics.setdefault(name, {}).update(_logged(trainer))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.is_global_zero and stage in ("fit", "test") and self._measured is not None:
            self._measure_waiting(trainer, None, "test")  # not a single batch came
            if stage == "fit":
                # After every callback's `on_fit_end`, in which models are converted.
                self._rows[_AFTER] = self._measure(_AFTER, pl_module)
                self._metrics[_AFTER] = _logged(trainer)
            if self._rows:
                self._report(trainer)
        self._waiting = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._start(None)

    def _start(self, pl_module: LightningModule | None) -> None:
        self._rows, self._metrics, self._notes = {}, {}, {}
        self._inputs = self._waiting = None
        self._no_inputs = "no batch was seen."
        self._measured = None if pl_module is None else ref(pl_module)

    def _measure_waiting(self, trainer: Trainer, batch: Any, stage: str) -> None:
        if self._waiting is None:
            return
        waiting, self._waiting = self._waiting, None
        try:
            vars(waiting)["_device"] = torch.device("cpu")
            calls = example_calls(trainer, waiting, move_data_to_device(batch, torch.device("cpu")), stage)
            self._inputs = _first_samples(tuple(calls.values()), max(self.batch_sizes))
            self._called = tuple(calls)
        except CompressionError as error:
            self._no_inputs = str(error)
        run = self._measure(_BEFORE, waiting)
        counted = self._rows.get(_BEFORE)
        if counted is not None:
            # Zeros and bytes were counted when fit started; since then a callback may have pruned what both share.
            held = ("parameters", "nonzeros", "size_bytes", "compressed_bytes", "layers")
            run = replace(run, **{field: getattr(counted, field) for field in held})
        if run.parameters:
            self._rows[_BEFORE] = run

    def _row_of_tested(self, pl_module: LightningModule) -> str:
        layers = measure(_structural_copy(pl_module)).layers
        for name in reversed(self._rows):
            if self._rows[name].layers == layers:
                return name
        name = _TESTED if _AFTER in self._rows else _AFTER
        self._rows[name] = self._measure(name, pl_module)
        return name

    def _measure(self, name: str, model: nn.Module) -> Measurement:
        settings: dict[str, Any] = {
            "batch_sizes": self.batch_sizes,
            "max_seconds": self.max_seconds,
            "threads": self.threads,
        }
        still = _structural_copy(model)
        if self._inputs is None:
            self._notes[name] = f"{name}: no MACs and no latency, there are no example inputs: {self._no_inputs}"
            return measure(still)
        try:
            with called_in_turn(still, self._called):
                return measure(still, self._inputs, **settings)
        except Exception as error:
            # `forward` is the user's and may need what only the steps provide; a report must not end a training.
            reason = str(error).strip().partition("\n")[0]
            self._notes[name] = (
                f"{name}: no MACs and no latency, `forward` couldn't be run alone ({type(error).__name__}: {reason}). "
                "Set `example_input_array`."
            )
            return measure(still)

    def _report(self, trainer: Trainer) -> None:
        others = [note for callback in _callbacks(trainer) for note in _notes_of(callback)]
        notes = [*others, *(note for name, note in self._notes.items() if name in self._rows)]
        comparison = compare(self._rows, metrics=self._metrics, notes=notes)
        self.comparison, written = _write(comparison, Path(self._folder), self.picture, _histories(trainer))
        _show(self.comparison, Path(self._folder), written)


def _structural_copy(model: Model) -> Model:
    """Copy modules and their attributes, but share the tensors on the CPU and bring the others there."""
    shared = {id(tensor): _on_cpu(tensor) for tensor in (*model.parameters(), *model.buffers())}
    try:
        return _without_helpers(copy.deepcopy(model, shared))
    except Exception:
        # Not every module can be copied; measuring it as it stands restores it too, only a later change would show.
        return model


def _without_helpers(model: Model) -> Model:
    """Take out what helps in training alone, such as the adapters of a distillation: no user ships it."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if getattr(child, "training_only", False):
                parent._modules[name] = nn.Module()
    return model


def _on_cpu(tensor: Tensor) -> Tensor:
    # Another object that shares its memory: the original may lose channels before the copy is measured.
    moved = tensor.detach().cpu()
    return nn.Parameter(moved, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved


def _first_samples(inputs: Any, most: int) -> Any:
    # A copy, as `resize_batch` makes one: a step may change its batch in place.
    return resize_batch(to_device(inputs, torch.device("cpu")), min(most, batch_size_of(inputs)))


def _logged(trainer: Trainer) -> dict[str, float]:
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if not name.endswith("_step")}
    # The sparsity of single layers is no metric of the model; there is a picture of it.
    return {name: value for name, value in metrics.items() if not (math.isnan(value) or _OF_A_LAYER.match(name))}


def _callbacks(trainer: Trainer) -> list[Callback]:
    # Lightning's connector sets the attribute, so its type is nowhere declared.
    return list(trainer.callbacks)  # type: ignore[attr-defined]


def _notes_of(callback: Callback) -> list[str]:
    offered = getattr(callback, "report_notes", None)
    return [str(note) for note in offered()] if callable(offered) else []


def _histories(trainer: Trainer) -> list[Any]:
    """How sparsity grew, of every callback that knows it."""
    found = (getattr(callback, "sparsity_history", None) for callback in _callbacks(trainer))
    return [history for history in found if history]


def _write(comparison: Comparison, folder: Path, picture: bool, histories: list[Any]) -> tuple[Comparison, list[str]]:
    folder.mkdir(parents=True, exist_ok=True)
    written = ["report.json", "report.md"]
    if picture and importlib.util.find_spec("matplotlib") is None:
        missing = 'No picture: matplotlib isn\'t installed. Install it: pip install "lightning_compress[plots]"'
        comparison = replace(comparison, notes=(*comparison.notes, missing))
    elif picture:
        from lightning_compress.report.plots import plot_report
        from lightning_compress.report.sparsity_plot import plot_sparsity

        plot_report(comparison, folder / "report.png")
        names = ["sparsity.png" if len(histories) == 1 else f"sparsity_{index}.png" for index in range(len(histories))]
        for name, history in zip(names, histories, strict=True):
            plot_sparsity(history, folder / name)
        written += ["report.png", *names]
    (folder / "report.json").write_text(comparison.to_json(), encoding="utf-8")
    (folder / "report.md").write_text(comparison.to_markdown(), encoding="utf-8")
    return comparison, written


def _show(comparison: Comparison, folder: Path, written: list[str]) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console()
    if not console.is_terminal:
        # A file or a pipe has no width; rich would take 80 and cut columns off.
        console = Console(width=140)
    console.print(comparison.to_table())
    for note in comparison.notes:
        console.print(f"- {escape(note)}", highlight=False)
    console.print(f"[dim]{escape(legend(comparison))}[/dim]", highlight=False)
    console.print(f"Report: {escape(str(folder))} ({', '.join(written)})", soft_wrap=True, highlight=False)
