"""What ``lightning-compress advise``, ``sensitivity`` and ``search`` do, once module, data and checkpoint are there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_compress.calibration import chosen_batches
from lightning_compress.choosing.advice import Advice
from lightning_compress.choosing.advise import HELD_OUT, MOST_BATCHES, advise_by
from lightning_compress.choosing.evaluations import Mode
from lightning_compress.choosing.result import SearchResult
from lightning_compress.choosing.resume import digest
from lightning_compress.choosing.search import check_search, search_by
from lightning_compress.choosing.searcher import CostKind
from lightning_compress.choosing.sensitivity import Kind, Level, Method, make_forms, measure_forms
from lightning_compress.choosing.table import SensitivityTable
from lightning_compress.choosing.validation import ValidationMetric
from lightning_compress.errors import invalid
from lightning_compress.silent_copy import make_probe, silence_, unsilence_


def run_advise(
    trainer: pl.Trainer, module: pl.LightningModule, monitor: str | None, mode: Mode, seconds: float
) -> Advice:
    """Advise by batches that go through the module's own steps, and by its own validation if a metric is named."""
    run, batches = step_batches(trainer, module, MOST_BATCHES + HELD_OUT)
    return advise_by(run, module, batches, _metric(trainer, monitor) if monitor else None, mode, seconds)


def run_sensitivity(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    monitor: str,
    of: Kind,
    levels: Sequence[Level] | None,
    method: Method,
    mode: Mode,
    top: int,
    calibration_batches: int,
    resume: str | None,
) -> SensitivityTable:
    """Make a table by the module's own validation; batches go through its own steps."""
    run, batches = step_batches(trainer, module, calibration_batches)
    evaluate = _metric(trainer, monitor)
    forms, _ = make_forms(module, batches, of, levels, run)
    return measure_forms(forms, evaluate, batches, of, run, method, mode, top, resume, 0, digest(module))


def run_search(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    monitor: str,
    over: Kind,
    budget: float | None,
    max_drop: float | None,
    cost: CostKind | None,
    levels: Sequence[Level] | None,
    mode: Mode,
    calibration_batches: int,
    resume: str | None,
) -> SearchResult:
    """Search by the module's own validation; batches go through its own steps."""
    check_search(over, budget, max_drop, cost, mode)
    run, batches = step_batches(trainer, module, calibration_batches)
    options = (over, budget, max_drop, cost, levels, mode, resume)
    return search_by(run, module, _metric(trainer, monitor), batches, *options)


def _metric(trainer: pl.Trainer, monitor: str) -> ValidationMetric:
    return ValidationMetric(trainer, getattr(trainer, "datamodule", None), monitor)


def step_batches(
    trainer: pl.Trainer, pl_module: pl.LightningModule, count: int
) -> tuple[Callable[[Any, Any], Any], list[Any]]:
    """Return a way of batches through a module or a copy of it, as its own steps take them, and some to calibrate on.

    Raises:
        CompressionError: there is no calibration data, or no step takes it.
    """
    feed, batches = chosen_batches(trainer, pl_module, make_probe(trainer, pl_module), count, seed=0)

    def run(module: Any, batch: Any) -> Any:
        silence_(module, trainer)
        try:
            return feed(module, batch)
        finally:
            unsilence_(module)

    return run, batches


def check_output(output: str | None, endings: Sequence[str]) -> None:
    """Raise `CompressionError` if a result can't be written so."""
    if output is not None and Path(output).suffix not in endings:
        raise invalid("output", f"end in {', '.join(endings)}", output)


def write(result: Any, output: str | None) -> None:
    """Write a result as its file's ending says."""
    if output is not None:
        path = Path(output)
        path.parent.mkdir(parents=True, exist_ok=True)
        (result.save if path.suffix in (".json", ".csv") else result.plot)(path)
