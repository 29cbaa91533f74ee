"""A Trainer's validation as a function on a module; and batches that go through its steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from torch import nn

from lightning_compress.calibration import chosen_batches
from lightning_compress.callback import compression_callbacks
from lightning_compress.errors import invalid, nearest
from lightning_compress.silent_copy import make_probe, silence_, unsilence_


class ValidationMetric:
    """Evaluates a LightningModule by its own validation: the ``evaluate`` of `sensitivity` and `search`.

    The Trainer's callbacks of this package stay out of it, so that the module is evaluated as it is; so do its loggers
    and progress bar. Evaluations are many.

    Args:
        trainer: whose ``validate`` runs.
        datamodule: of the validation data; a validation loader serves too, or None where the module has its own.
        monitor: the name of the metric that the module logs.

    Raises:
        CompressionError: when it is called, for a metric that the validation doesn't log; the nearest are named.

    Example:
        >>> from lightning_compress import sensitivity
        >>> # sensitivity(model, ValidationMetric(trainer, datamodule, "val_acc"), datamodule.train_dataloader())
    """

    def __init__(self, trainer: pl.Trainer, datamodule: Any, monitor: str) -> None:
        self.trainer, self.datamodule, self.monitor = trainer, datamodule, monitor

    def __call__(self, module: pl.LightningModule) -> float:
        """Return the metric of a module, or of a changed copy of it."""
        if not isinstance(module, nn.Module) or not hasattr(module, "validation_step"):
            raise invalid("model", "be a LightningModule for a ValidationMetric", type(module).__name__)
        trainer: Any = self.trainer
        before, loggers, ours = trainer.callbacks, trainer.loggers, compression_callbacks(trainer)
        trainer.callbacks = [part for part in before if part not in ours and not isinstance(part, ProgressBar)]
        trainer.loggers = []
        try:
            key = "datamodule" if hasattr(self.datamodule, "val_dataloader") else "dataloaders"
            trainer.validate(module, **{key: self.datamodule}, verbose=False)
        finally:
            trainer.callbacks, trainer.loggers = before, loggers
        if self.monitor not in (logged := trainer.callback_metrics):
            raise invalid("monitor", "be logged by the validation", self.monitor, nearest(self.monitor, logged))
        return float(logged[self.monitor])


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
