"""How good is a model, as measured how, on how much data, and on which weights?"""

from __future__ import annotations

import copy
import logging
import re
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader

from lightning_compress.modules.copying import copy_module
from lightning_compress.modules.isolation import isolated_random_state
from lightning_compress.silent_copy import silent_loggers

_OF_A_LAYER = re.compile(r"sparsity(_\d+)?/")


@dataclass(frozen=True)
class Evaluation:
    """A run over data.

    Attributes:
        row: the row of the report that was evaluated.
        metrics: name to value.
        origin: how they were measured, in a few words.
        samples: of each loader, as `samples_of` counts them; empty if unknown.
        weights: fingerprint of what was evaluated; None if unknown.
    """

    row: str
    metrics: dict[str, float]
    origin: str
    samples: tuple[int | None, ...] = ()
    weights: int | None = None


def samples_of(loaders: Any, batches: Sequence[int | float]) -> tuple[int | None, ...]:
    """Return how many samples a run sees of each loader, by its number of batches; None where a loader doesn't say.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> samples_of(DataLoader(range(10), batch_size=4), [2]), samples_of(DataLoader(range(10), batch_size=4), [3])
        ((8,), (10,))
    """
    leaves = tree_leaves(loaders)
    if len(leaves) != len(batches):
        return ()
    return tuple(map(_samples_of, leaves, batches))


def _samples_of(loader: Any, batches: float) -> int | None:
    size = getattr(loader, "batch_size", None)
    try:
        return min(len(loader.dataset), int(batches) * size) if size else None
    except (AttributeError, TypeError, OverflowError):
        return None


def merged(
    evaluations: Sequence[Evaluation],
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, str]], list[str]]:
    """Return metrics and their origins by row; and a sentence for each metric that is left out.

    The last run counts. A row's metric that was measured on other data than the last one of that name isn't comparable
    with it, and is left out.
    """
    last = {name: evaluation for evaluation in evaluations for name in evaluation.metrics}
    latest = {(evaluation.row, name): evaluation for evaluation in evaluations for name in evaluation.metrics}
    metrics: dict[str, dict[str, float]] = {}
    origins: dict[str, dict[str, str]] = {}
    left_out: list[str] = []
    for (row, name), evaluation in latest.items():
        newest = last[name]
        if evaluation.samples and newest.samples and evaluation.samples != newest.samples:
            left_out.append(
                f"{row}: {name} ({evaluation.metrics[name]:.4g}) is of other data than that of {newest.row}, "
                f"{_counted(evaluation.samples)} samples and not {_counted(newest.samples)}: not compared."
            )
            continue
        metrics.setdefault(row, {})[name] = evaluation.metrics[name]
        if evaluation.origin:
            origins.setdefault(row, {})[name] = evaluation.origin
    return metrics, origins, left_out


def _counted(samples: tuple[int | None, ...]) -> str:
    return " + ".join("?" if count is None else f"{count:,}" for count in samples)


def plain_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of a whole run as numbers, without the sparsity of single layers, which has a picture.

    Example:
        >>> plain_metrics({"acc": torch.tensor(1.0), "loss_step": 0.1, "sparsity/conv": 0.5})
        {'acc': 1.0}
    """
    return {
        name: float(value)
        for name, value in metrics.items()
        if not name.endswith("_step") and not _OF_A_LAYER.match(name)
    }


@dataclass
class LastValidation:
    """The last validation within a fit.

    Attributes:
        known: names of metrics that were there before the first validation: those of training.
        names: names that validations have added.
    """

    known: set[str] | None = None
    names: set[str] = field(default_factory=set)
    step: int = 0
    form: str = ""
    samples: tuple[int | None, ...] = ()

    def begin(self, trainer: Any) -> None:
        """Note that a validation starts."""
        if self.known is None:
            self.known = set(trainer.callback_metrics)

    def remember(self, trainer: Any, form: str) -> None:
        """Note that a validation of a model in some ``form`` has ended."""
        self.names |= set(trainer.callback_metrics) - (self.known or set())
        self.step, self.form = trainer.global_step, form
        self.samples = samples_of(trainer.val_dataloaders, trainer.num_val_batches)

    def evaluations(self, row: str, trainer: Any, form: str) -> list[Evaluation]:
        """Return what ``trainer`` has logged when the fit has ended, where the model has that ``form``."""
        logged = plain_metrics(trainer.callback_metrics)
        own = {name: value for name, value in logged.items() if name in self.names}
        origin = "last validation of fit"
        if self.step != trainer.global_step:
            origin += f", at step {self.step} of {trainer.global_step}"
        if self.form != form:
            origin += f", {self.form} and not yet {form}"
        training = {name: value for name, value in logged.items() if name not in own}
        return [Evaluation(row, training, ""), Evaluation(row, own, origin, self.samples)]


def fingerprint(model: nn.Module) -> int | None:
    """Return a number that models share if they hold the same values under the same names; None where none can be read.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> before = fingerprint(layer)
        >>> with torch.no_grad():
        ...     _ = layer.weight.add_(1)
        >>> fingerprint(layer) == before
        False
    """
    found = 0
    try:
        for name, value in model.state_dict().items():
            if isinstance(value, Tensor):
                held = value.int_repr() if value.is_quantized else value
                data: Any = held.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
                found = zlib.crc32(data, zlib.crc32(f"{name} {held.dtype} {tuple(held.shape)}".encode(), found))
    except (RuntimeError, TypeError, ValueError):
        return None
    return found


def of_same_weights(earlier: Sequence[Evaluation], model: nn.Module, row: str) -> list[Evaluation]:
    """Return those of ``earlier`` evaluations that were of the weights that ``model`` has before a fit, for ``row``."""
    now = fingerprint(model) if earlier else None
    return [
        replace(evaluation, row=row, origin=before_fit(evaluation.origin, model))
        for evaluation in earlier
        if evaluation.weights == now is not None
    ]


def before_fit(origin: str, model: nn.Module) -> str:
    """Say how metrics of a ``model`` that is now to be trained were measured."""
    return f"{origin} before fit, untrained" if is_untrained(model) else f"{origin} before fit"


def is_untrained(model: nn.Module) -> bool:
    """Whether the model shows that it never was trained: it has BatchNorms, and none of them has seen a batch.

    Example:
        >>> is_untrained(nn.BatchNorm1d(2)), is_untrained(nn.Linear(2, 2))
        (True, False)
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    return bool(norms) and all(_is_fresh(norm) for norm in norms)


def _is_fresh(norm: _BatchNorm) -> bool:
    # Files of old checkpoints hold no count, so that alone tells nothing.
    mean, variance, count = norm.running_mean, norm.running_var, norm.num_batches_tracked
    if mean is None or variance is None or count is None:
        return False
    return not bool(count) and not bool(mean.any()) and bool((variance == 1).all())


def validate_copy(trainer: Any, pl_module: Any) -> tuple[dict[str, Any], tuple[int | None, ...]]:
    """Return the metrics of the validation loop that a fit of ``trainer`` would run now, and the samples that it sees.

    It runs on a copy that shares the parameters' memory, with loaders of its own: buffers, metrics, counters, loggers,
    callbacks, random states and the generators of loaders stay as they were.

    Args:
        trainer: whose fit has started.
        pl_module: its module, on its device.
    """
    aliases = {
        id(parameter): nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
        for parameter in pl_module.parameters()
    }
    with isolated_random_state(), in_silence():
        loaders = trainer.fit_loop.epoch_loop.val_loop._data_source.dataloader()
        own = validating_trainer(trainer, trainer.strategy.root_device)
        with isolated_random_state(loaders=loaders):
            own.validate(copy_module(pl_module, aliases), dataloaders=tree_map(own_iterator, loaders), verbose=False)
        return own.callback_metrics, samples_of(own.val_dataloaders, own.num_val_batches)


def validating_trainer(trainer: Any, device: torch.device) -> Any:
    """Return a Trainer that validates as ``trainer`` does, in this process alone, and logs and saves nothing."""
    kind = next(kind for kind in type(trainer).__mro__ if kind.__module__.endswith("trainer.trainer"))
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
    own.loggers = silent_loggers(trainer)
    return own


def own_iterator(loader: Any) -> Any:
    """Return a loader with an iteration of its own."""
    if not isinstance(loader, DataLoader):
        return loader
    # Persistent workers would stay for the fit, which then draws fewer numbers.
    twin = copy.copy(loader)
    twin._iterator = None
    return twin


@contextmanager
def in_silence() -> Iterator[None]:
    """Keep a Trainer in the block from saying anything."""
    # What a Trainer says of itself was said by the one that trains.
    with ExitStack() as stack, warnings.catch_warnings(action="ignore"):
        for logger in map(logging.getLogger, ("lightning.pytorch", "pytorch_lightning", "lightning.fabric")):
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        yield
