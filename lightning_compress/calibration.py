"""Which batches may a callback measure on, and how do they run through the module?"""

from __future__ import annotations

import copy
import math
from collections.abc import Generator, Iterable
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils import _pytree as pytree
from torch.utils.data import IterableDataset
from tqdm.auto import tqdm

from lightning_compress.errors import CompressionError, invalid
from lightning_compress.modules.calls import first_batches
from lightning_compress.modules.isolation import evaluation_mode, isolated_random_state
from lightning_compress.probe import Feed, data_feed, is_own, to_module


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
        return loader_of(source, "calibration_dataloader")
    for source in (getattr(trainer, "datamodule", None), pl_module):
        if source is not None and is_own(source, "train_dataloader"):
            return loader_of(source, "train_dataloader")
    raise CompressionError(
        "`calibration_dataloader` must be there to calibrate on. Received: bare loaders. Test and validation data "
        "calibrate nothing. Pass a datamodule (its train loader serves), or define `calibration_dataloader()` on the "
        "module or datamodule, such as: model.calibration_dataloader = lambda: train_loader"
    )


def loader_of(source: Any, name: str, stage: str = "fit") -> Any:
    """Return a loader of a module or of a datamodule, which may have been set up for another stage."""
    if isinstance(source, torch.nn.Module):
        return getattr(source, name)()
    # Under `test` only setup("test") has run. Where that made the training data too, a second setup could split anew.
    try:
        loader = getattr(source, name)()
        if getattr(loader, "dataset", loader) is not None:
            return loader
    except Exception:  # there is no training data yet
        pass
    source.setup(stage)
    return getattr(source, name)()


def fit_loader(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
    """Return ``calibration_dataloader`` of the datamodule or the module, else the fit's own train loaders.

    These are copies, so that reading them moves neither the fit's iteration on nor takes its workers.
    """
    source = calibration_source(trainer, pl_module)
    if source is not None:
        return loader_of(source, "calibration_dataloader")
    return pytree.tree_map(_unstarted, getattr(trainer.train_dataloader, "iterables", trainer.train_dataloader))


def reads_again(trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
    """Whether reading `fit_loader` takes nothing from the fit: a stream may give each of its samples only once."""
    loaders = pytree.tree_leaves(getattr(trainer.train_dataloader, "iterables", trainer.train_dataloader))
    sources = [getattr(loader, "dataset", loader) for loader in loaders]
    indexed = all(hasattr(source, "__getitem__") and not isinstance(source, IterableDataset) for source in sources)
    return calibration_source(trainer, pl_module) is not None or indexed


def chosen_batches(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    probe: pl.LightningModule,
    limit: int,
    seed: int,
    samples: float = math.inf,
) -> tuple[Feed, list[Any]]:
    """Read batches from the beginning, the same ones whenever; in a fit those of `fit_loader`.

    Args:
        trainer: gives the batches.
        pl_module: has, or its datamodule has, the loader.
        probe: a silent copy of it in float, with which the batches are to run.
        limit: how many, at most.
        seed: of shuffling.
        samples: batches that hold so many are enough.

    Returns:
        How they run through the probe, and those that do.
    """
    runs = trainer.state.fn
    loader = (fit_loader if runs == "fit" else calibration_loader)(trainer, pl_module)
    feed = data_feed(trainer, probe, "validation" if runs in ("fit", None) else stage_of(trainer))
    with isolated_random_state(seed, loader), evaluation_mode(probe):
        found = list(first_batches(calibration_batches(loader, trainer, probe, limit), samples))
        if not found:
            raise invalid("calibration_dataloader", "give at least one batch", "an empty loader")
        return feed, list(feed.choose(probe, iter(found)))


def _unstarted(loader: Any) -> Any:
    if not isinstance(loader, torch.utils.data.DataLoader):
        return loader
    unstarted = _with_own_samplers(loader)
    vars(unstarted)["_iterator"] = None
    return unstarted


def _with_own_samplers(holder: Any) -> Any:
    """Copy a loader or sampler with the samplers in it: they may count epochs, or shuffle a list of their own."""
    twin = copy.copy(holder)
    for name, value in vars(holder).items():
        if name in ("sampler", "batch_sampler") and hasattr(value, "__dict__"):
            vars(twin)[name] = _with_own_samplers(value)
        elif type(value) in (list, dict, set):
            vars(twin)[name] = copy.copy(value)
    return twin
