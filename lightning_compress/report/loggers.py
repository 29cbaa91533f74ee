"""The figures and pictures of a report go to the run's loggers, whatever these take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_compress.report.figures import figures_of
from lightning_compress.report.ratios import Row


def log_report(loggers: Sequence[Any], rows: Sequence[Row], pictures: Sequence[Path], step: int) -> None:
    """Log the figures of all rows as ``compression/<row>/<figure>``, and pictures where the logger takes them.

    Args:
        loggers: of the Trainer: any has ``log_metrics``; W&B's has ``log_image``, TensorBoard's experiment
            ``add_image``.
        rows: of the comparison.
        pictures: files that were written.
        step: the Trainer's global step.
    """
    figures = {f"compression/{row.name}/{name}": value for row in rows for name, value in figures_of(row).items()}
    for logger in loggers:
        logger.log_metrics(figures, step)
        experiment: Any = getattr(logger, "experiment", None)
        for path in pictures:
            name = f"compression/{path.stem}"
            if hasattr(logger, "log_image"):
                logger.log_image(name, [str(path)], step)
            elif hasattr(experiment, "add_image"):
                experiment.add_image(name, _pixels(path), step, dataformats="HWC")


def _pixels(path: Path) -> Any:
    from matplotlib.image import imread  # which drew the picture

    return (imread(path) * 255).astype("uint8")
