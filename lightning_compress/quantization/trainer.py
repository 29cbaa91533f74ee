"""What the callbacks take from a Trainer: the time of a batch, the right device."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from lightning_compress.callback import compression_callbacks
from lightning_compress.errors import CompressionError
from lightning_compress.modules.agreement import Agreement, outputs_of
from lightning_compress.modules.calls import run_step
from lightning_compress.probe import shape_feed
from lightning_compress.quantization.quantize import dry_run, passed_over, slower_than_float
from lightning_compress.structure.listener import averaged_copies


def compare_with_float(
    trainer: pl.Trainer, floats: pl.LightningModule, quantized: pl.LightningModule, batch: Any, stage: str
) -> tuple[Agreement | None, str]:
    """Return how well outputs agree on a batch, and a line if the quantized copy takes longer or passes over layers.

    Both are probes, see `make_probe`; the step of ``stage`` (``test``, ``validation`` or ``predict``) comes first.
    """
    feed = shape_feed(trainer, floats, stage, train=True)
    try:
        feed.choose(floats, iter([batch]))
    except CompressionError:  # nothing runs, and nothing can be timed
        return None, ""
    called = set(dry_run(floats, batch, feed, keep_inputs=False).inputs)
    if missed := passed_over(quantized, batch, feed, called):
        return None, f"quantized layers aren't called as the float ones were. {missed.rstrip('.')}"
    agreement = Agreement.of(*(outputs_of(model, [batch], feed) for model in (floats, quantized)))
    return agreement, slower_than_float(floats, quantized, feed, batch, fixed_rounds=trainer.world_size > 1)


def refuse_accelerator(trainer: pl.Trainer) -> None:
    """Raise where int8 is to run on a device that has no kernels for it."""
    device = trainer.strategy.root_device
    if device.type != "cpu":
        raise CompressionError(
            f"`accelerator` must be 'cpu' to run int8. Received: a Trainer on {device}. "
            "Training may run on it; test and predict with Trainer(accelerator='cpu')."
        )


def may_rescale(trainer: pl.Trainer) -> bool:
    """Tell whether there are neither momenta nor averages yet: they would be those of weights of another scale."""
    averages = next(averaged_copies(trainer), None) is not None or any(
        callback.averages_weights for callback in compression_callbacks(trainer)
    )
    return not averages and not any(optimizer.state for optimizer in trainer.optimizers)


def run_training_step(model: Any, item: tuple[Any, int]) -> Any:
    """Run a batch, given with its index, as it was trained; where the step itself optimizes, as without a Trainer."""
    batch, batch_idx = item
    return model.training_step(batch, batch_idx) if model.automatic_optimization else run_step(model, batch)
