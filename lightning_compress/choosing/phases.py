"""`PhaseCheckpoint`: decides which checkpoint is the best of a phase of compression."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightning_compress.callback import compression_callbacks
from lightning_compress.errors import invalid

Phase = Literal["dense", "pruned", "quantized"]
_BROUGHT_BY = {"pruned": "ScheduledPruning or ChannelPruning", "quantized": "QuantizationAwareTraining"}


def phase_of(trainer: pl.Trainer) -> str:
    """Return the phase that a Trainer's callbacks have brought the model to; empty where it is on its way."""
    phases = {callback.phase(trainer) for callback in compression_callbacks(trainer)} - {None}
    if phases - {"quantized"} and "quantized" in phases:
        return "quantized" if phases == {"pruned", "quantized"} else ""
    return str(phases.pop()) if len(phases) == 1 else "" if phases else "dense"


class PhaseCheckpoint(ModelCheckpoint):
    """Saves the best model of one phase, as ``best-dense.ckpt``, ``best-pruned.ckpt`` or ``best-quantized.ckpt``.

    It is Lightning's `ModelCheckpoint`, which looks only at validations in its phase. A model is ``dense`` until the
    first schedule has begun, ``pruned`` when all windows of `ScheduledPruning` and `ChannelPruning` have ended, and
    ``quantized`` when `QuantizationAwareTraining` has prepared it, and nothing is being pruned. In between it is in no
    phase: scores of models that are less sparse than they will be are no scores of the one that is wanted.

    ``test(ckpt_path="best")`` takes the best of the first checkpoint callback in the list.

    Args:
        phase: ``dense``, ``pruned`` or ``quantized``.
        monitor: the name of a metric that validation logs.
        mode: ``max`` where more is better, ``min`` where less is.
        dirpath: the folder; by default that of `ModelCheckpoint`.
        filename: by default ``best-<phase>``.
        save_top_k: how many of the best are kept; -1 is all of them.
        save_weights_only: whether files are without optimizers and callbacks.

    Raises:
        CompressionError: in the constructor for a phase that there isn't; before a fit, where no callback of the
            Trainer brings the model there.

    Hooks: `on_validation_end` saves, `on_train_end` warns if no validation was in the phase.

    Example:
        >>> best = PhaseCheckpoint("pruned", monitor="val_acc", mode="max")
        >>> # Trainer(callbacks=[ScheduledPruning(sparsity=0.9), best]).fit(model, datamodule)
        >>> # Trainer().test(model, datamodule, ckpt_path=best.best_model_path)
    """

    def __init__(
        self,
        phase: Phase,
        monitor: str,
        mode: Literal["max", "min"],
        dirpath: str | Path | None = None,
        filename: str | None = None,
        save_top_k: int = 1,
        save_weights_only: bool = False,
    ) -> None:
        if phase not in ("dense", *_BROUGHT_BY):
            raise invalid("phase", "be 'dense', 'pruned' or 'quantized'", phase)
        if mode not in ("max", "min"):
            raise invalid("mode", "be 'max' or 'min'", mode)
        super().__init__(
            dirpath,
            filename or f"best-{phase}",
            monitor,
            mode=mode,
            save_top_k=save_top_k,
            save_weights_only=save_weights_only,
            save_on_train_epoch_end=False,  # but when it is validated
        )
        self.phase = phase
        self._seen = False

    @property
    def state_key(self) -> str:
        """Names the callback in a checkpoint: one for each phase."""
        return self._generate_state_key(phase=self.phase, monitor=self.monitor, mode=self.mode)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._seen = False
        brought = {callback.leads_to for callback in compression_callbacks(trainer)}
        if stage == "fit" and self.phase != "dense" and self.phase not in brought:
            remedy = f"Add {_BROUGHT_BY[self.phase]}."
            raise invalid("phase", "be one that a callback of this Trainer brings the model to", self.phase, remedy)
        super().setup(trainer, pl_module, stage)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if phase_of(trainer) == self.phase:
            self._seen = self._seen or not trainer.sanity_checking
            super().on_validation_end(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if not self._seen and not self.best_model_path and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(
                f"PhaseCheckpoint: no validation saw a {self.phase} model, so there is no best one. Let schedules "
                "begin or end between validations, or validate more often."
            )
