"""A quantized copy of a Trainer's module, as the guards of that Trainer want it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl

from lightning_compress.calibration import (
    calibration_batches,
    calibration_loader,
    calibration_source,
    fit_loader,
    stage_of,
)
from lightning_compress.callback import Candidate, CompressionCallback, compression_callbacks
from lightning_compress.modules.isolation import evaluation_mode, isolated_random_state
from lightning_compress.probe import data_feed
from lightning_compress.quantization import convert
from lightning_compress.quantization.alone import errors_alone
from lightning_compress.quantization.quantize import quantize_, time_ratio
from lightning_compress.quantization.recipe import Recipe
from lightning_compress.quantization.schemes import resolve
from lightning_compress.silent_copy import make_probe
from lightning_compress.targets import Targets

_FAR = "The quantized model is far"
"""Begins a warning of which a guard finds the remedy."""


def guards_of(trainer: pl.Trainer) -> list[CompressionCallback]:
    """Return the callbacks of a Trainer that decide what becomes of a quantized model."""
    return [callback for callback in compression_callbacks(trainer) if callback.guards]


def guarded_copy(trainer: pl.Trainer, pl_module: pl.LightningModule, recipe: Recipe) -> tuple[pl.LightningModule, str]:
    """Quantize a copy of a float module, and again with less in few bits until every guard of the Trainer agrees.

    Returns:
        The copy, which can be reverted and is silent; and what is to be said of the way that batches took.

    Raises:
        CompressionError: it can't be quantized, or a guard is against all that can be done.
    """
    first = _Copy(trainer, pl_module, recipe)
    candidate = first.candidate
    for guard in guards_of(trainer):
        candidate = guard.guard(trainer, pl_module, candidate)
    return candidate.model, first.way


def guarded_conversion(trainer: pl.Trainer, pl_module: pl.LightningModule, recipe: Recipe) -> pl.LightningModule | None:
    """Ask the guards of a Trainer whether a module that was trained with fake-quantizers may be converted.

    Returns:
        A copy in which less is in few bits, quantized by ``recipe``; None if the module may be converted as it is.
    """
    floats = make_probe(trainer, pl_module)
    convert.revert_(floats, "float")
    converted = make_probe(trainer, pl_module)
    convert.convert_prepared_(converted)
    first = candidate = _Copy(trainer, floats, recipe, converted).candidate
    for guard in guards_of(trainer):
        candidate = guard.guard(trainer, pl_module, candidate)
    return None if candidate is first else candidate.model


class _Copy:
    """A quantized copy by one recipe, or one that is ``made`` already, and how others follow from it."""

    def __init__(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        recipe: Recipe,
        made: pl.LightningModule | None = None,
    ) -> None:
        self.trainer, self.module, self.recipe = trainer, pl_module, recipe
        self.guarded = bool(guards_of(trainer))
        self.probe = made or make_probe(trainer, pl_module, recipe.only_read(pl_module))
        self.batch: Any = None
        self.way = ""
        with warnings.catch_warnings() if self.guarded else nullcontext():
            if self.guarded:
                warnings.filterwarnings("ignore", message=_FAR)
            self._quantize(made is not None)

    def _quantize(self, is_made: bool) -> None:
        recipe, trainer, fits = self.recipe, self.trainer, self.trainer.state.fn == "fit"
        takes_batch = recipe.decides_per_token and calibration_source(trainer, self.module) is not None
        if not (recipe.calibrates or self.guarded or takes_batch):
            with evaluation_mode(self.probe):
                quantize_(self.probe, recipe, None, ())
            return
        floats = make_probe(trainer, self.module, list(self.module.parameters())) if is_made else self.probe
        loader = (fit_loader if fits else calibration_loader)(trainer, self.module)
        feed = data_feed(trainer, floats, "validation" if fits else stage_of(trainer))
        found = calibration_batches(loader, trainer, floats, recipe.calibration_batches)
        with evaluation_mode(self.probe), isolated_random_state(loaders=loader), closing(found):
            batches = feed.choose(floats, found)
            self.batch = next(batches, None)
            if not is_made:
                quantize_(self.probe, recipe, self.batch, batches, feed, feed.others())
        self.way, self.feed = f"; {feed}", feed

    @property
    def candidate(self) -> Candidate:
        """What a guard sees of it."""
        floats = make_probe(self.trainer, self.module, list(self.module.parameters()))
        return Candidate(self.probe, floats, self.recipe.scheme.name, self._errors, self._without, self._ratio)

    def _errors(self) -> dict[str, float]:
        return errors_alone(self.probe, [self.batch], self.feed)

    def _without(self, layers: Sequence[str], scheme: str) -> Candidate:
        recipe, overrides, targets = self.recipe, dict(self.recipe.overrides), self.recipe.targets
        if scheme == "float":
            targets = replace(targets or Targets(), exclude=[*(targets.exclude if targets else ()), *layers])
        else:
            overrides |= dict.fromkeys(layers, resolve(scheme))
        recipe = Recipe(recipe.scheme, recipe.calibration_batches, targets, overrides, "auto")
        return _Copy(self.trainer, self.module, recipe).candidate

    def _ratio(self, other: Candidate) -> float | None:
        return time_ratio(self.probe, other.model, self.feed, self.batch, fixed_rounds=self.trainer.world_size > 1)
