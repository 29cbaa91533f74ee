"""What the callbacks take from a Trainer: batches that calibrate, the time of a batch, the right device."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils import _pytree as pytree
from tqdm.auto import tqdm

from lightning_compress.callback import compression_callbacks
from lightning_compress.errors import CompressionError
from lightning_compress.modules.calls import run_step
from lightning_compress.probe import is_own, shape_feed, to_module
from lightning_compress.quantization.agreement import Agreement, outputs_of
from lightning_compress.quantization.quantize import dry_run, passed_over, slower_than_float
from lightning_compress.structure.listener import averaged_copies


def stage_of(trainer: pl.Trainer) -> str:
    """Return the stage that is running, as feeds call it."""
    return "test" if trainer.testing else "validation" if trainer.validating else "predict"


def calibration_source(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
    """Return the datamodule or module, the first that has a ``calibration_dataloader``; None if neither has."""
    sources = (getattr(trainer, "datamodule", None), pl_module)
    return next((source for source in sources if getattr(source, "calibration_dataloader", None) is not None), None)


def calibration_batches(
    loader: Any, trainer: pl.Trainer, probe: pl.LightningModule, limit: int
) -> Generator[Any, None, None]:
    """Yield batches as steps get them, with a progress bar."""
    if isinstance(loader, dict | list | tuple) and all(
        isinstance(leaf, Iterable) and not isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(loader)
    ):  # and no list of batches
        loader = CombinedLoader(loader, "max_size_cycle")  # as a fit reads several loaders
    if type(loader).__name__ == "CombinedLoader":  # of either package
        loader = (batch for batch, *_ in loader)
    bar = trainer.progress_bar_callback
    try:
        count = min(limit, len(loader))
    except TypeError:  # an iterable dataset has no length, nor have combined loaders
        count = limit
    hidden = bar is None or getattr(bar, "is_disabled", False) or not trainer.is_global_zero
    for batch in tqdm(islice(loader, limit), "Calibrating", count, leave=False, disable=hidden):
        yield to_module(trainer, probe, batch)


def calibration_loader(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
    """Return ``calibration_dataloader`` of the datamodule or the module, else the train loader of either."""
    if (source := calibration_source(trainer, pl_module)) is not None:
        return _loader(source, "calibration_dataloader")
    for source in (getattr(trainer, "datamodule", None), pl_module):
        if source is not None and is_own(source, "train_dataloader"):
            return _loader(source, "train_dataloader")
    raise CompressionError(
        "`calibration_dataloader` must be there to calibrate on. Received: bare loaders. Test and validation data "
        "calibrate nothing. Pass a datamodule (its train loader serves), or define `calibration_dataloader()` on the "
        "module or datamodule, such as: model.calibration_dataloader = lambda: train_loader"
    )


def _loader(source: Any, name: str) -> Any:
    if isinstance(source, torch.nn.Module):
        return getattr(source, name)()
    # Under `test` only setup("test") has run. Where that made the training data too, a second setup could split anew.
    try:
        loader = getattr(source, name)()
        if getattr(loader, "dataset", loader) is not None:
            return loader
    except Exception:  # there is no training data yet
        pass
    source.setup("fit")
    return getattr(source, name)()


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
