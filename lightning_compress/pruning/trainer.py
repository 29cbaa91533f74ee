"""What pruning takes from a Trainer: batches to calibrate on, and the same weights on all ranks."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_compress.calibration import chosen_batches
from lightning_compress.compensation.runner import Runner
from lightning_compress.errors import CompressionError
from lightning_compress.pruning.calibrated import Outcome, prune_copy
from lightning_compress.pruning.pruner import Pruner
from lightning_compress.silent_copy import make_probe
from lightning_compress.structure.change import recorded, to_float_


def calibrated_outcome(
    trainer: pl.Trainer, pl_module: pl.LightningModule, pruner: Pruner, fraction: float, limit: int, seed: int
) -> Outcome:
    """Find out on copies what a method that calibrates makes of a module; all ranks get what the first one found.

    Args:
        trainer: gives batches, in a fit those of training.
        pl_module: isn't changed.
        pruner: its plan and its masks count.
        fraction: of the budget.
        limit: of batches.
        seed: of shuffling, and of what is looked at.

    Raises:
        CompressionError: there are no batches, none runs, or what layers are given isn't finite.
    """
    found: Any = None
    if trainer.is_global_zero:
        try:
            found = _outcome(trainer, pl_module, pruner, fraction, limit, seed)
        except CompressionError as error:  # the others wait
            found = error
    if trainer.world_size > 1:
        found = trainer.strategy.broadcast(found)
    if isinstance(found, CompressionError):
        raise found
    return found  # type: ignore[no-any-return]


def _outcome(
    trainer: pl.Trainer, pl_module: pl.LightningModule, pruner: Pruner, fraction: float, limit: int, seed: int
) -> Outcome:
    with torch.inference_mode(False):
        is_plain = not any(True for _ in recorded(pl_module))
        probe = make_probe(trainer, pl_module, list(pl_module.parameters()) if is_plain else ())
        to_float_(probe)
        probe.eval()
        feed, batches = chosen_batches(trainer, pl_module, probe, limit, seed)
        reference = Runner(probe, feed, partial(make_probe, trainer))
        return prune_copy(reference, pruner.plan, pruner.masks, batches, fraction, seed)
