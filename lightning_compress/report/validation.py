"""How good is a module before it is trained? A copy is validated in a Trainer of its own, so that no trace is left."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

from lightning_compress.modules.copying import copy_module
from lightning_compress.modules.isolation import isolated_random_state
from lightning_compress.report.evaluations import samples_of


def validate_copy(trainer: Any, pl_module: Any) -> tuple[dict[str, Any], tuple[int | None, ...]]:
    """Return the metrics of the validation loop that a fit of ``trainer`` would run now, and the samples that it sees.

    It runs on a copy that shares the parameters' memory, with loaders of its own: buffers, metrics, counters, loggers,
    callbacks, random states and the generators of loaders stay as they were.

    Args:
        trainer: whose fit has started.
        pl_module: its module, on its device.
    """
    device = trainer.strategy.root_device
    aliases = {
        id(parameter): nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
        for parameter in pl_module.parameters()
    }
    kind = next(kind for kind in type(trainer).__mro__ if kind.__module__.endswith("trainer.trainer"))
    with isolated_random_state(), _in_silence():
        loaders = trainer.fit_loop.epoch_loop.val_loop._data_source.dataloader()
        own = kind(
            accelerator=device.type,
            devices=1 if device.index is None else [device.index],
            precision=trainer.precision,
            limit_val_batches=trainer.limit_val_batches,
            inference_mode=trainer.validate_loop.inference_mode,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        with isolated_random_state(loaders=loaders):
            own.validate(copy_module(pl_module, aliases), dataloaders=tree_map(_own_iterator, loaders), verbose=False)
        return own.callback_metrics, samples_of(own.val_dataloaders, own.num_val_batches)


def _own_iterator(loader: Any) -> Any:
    if not isinstance(loader, DataLoader):
        return loader
    # Persistent workers would stay for the fit, which then draws fewer numbers.
    twin = copy.copy(loader)
    twin._iterator = None
    return twin


@contextmanager
def _in_silence() -> Iterator[None]:
    # What a Trainer says of itself was said by the one that trains.
    with ExitStack() as stack, warnings.catch_warnings(action="ignore"):
        for logger in map(logging.getLogger, ("lightning.pytorch", "pytorch_lightning", "lightning.fabric")):
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        yield
