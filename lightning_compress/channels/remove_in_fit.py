"""A round of removal in a fit: measured, planned, cut, and fitted or its statistics restarted."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

from lightning_compress.calibration import calibration_source, chosen_batches
from lightning_compress.channels.batchnorm_restart import BatchNormRestart, input_moments
from lightning_compress.channels.compensate import Compensation, fitted_narrow, take_fits_
from lightning_compress.channels.fit_calls import FitCalls, cut_fit_, without_adapters
from lightning_compress.channels.planning.output_changes import output_changes
from lightning_compress.channels.remove_channels import check_module
from lightning_compress.channels.rounds import Rounds
from lightning_compress.compensation.in_order import Runner
from lightning_compress.silent_copy import make_probe
from lightning_compress.structure.change import to_float_
from lightning_compress.structure.listener import averaged_copies

Batch = tuple[Any, int]
"""A batch, and its number."""


class Calibration(NamedTuple):
    """How a module runs, and batches to measure on and to fit to, with where they come from."""

    runner: Runner
    batches: list[Any]
    source: str
    seed: int


def calibration_data(trainer: Any, pl_module: Any, count: int, seed: int) -> Calibration:
    """Read ``count`` batches of a fit's data beside it."""
    probe = make_probe(trainer, pl_module)
    to_float_(probe)
    feed, batches = chosen_batches(trainer, pl_module, probe, count, seed)
    source = "the train loader" if calibration_source(trainer, pl_module) is None else "`calibration_dataloader`"
    return Calibration(Runner(pl_module, feed, partial(make_probe, trainer)), batches, source, seed)


class Outcome(NamedTuple):
    """What a round led to: optimizers whose state starts anew for what shrank, and what was fitted."""

    anew: list[str]
    compensation: Compensation | None


def remove_in_fit_(
    trainer: Any,
    pl_module: Any,
    batch: Batch,
    rounds: Rounds,
    statistics: BatchNormRestart,
    progress: float,
    step: int,
    data: Calibration | None,
) -> Outcome:
    """Carry a round out on a module and all that follows it: all ranks take the first one's plan and fits."""
    check_module(pl_module)
    calls = FitCalls(trainer, pl_module, *batch)
    agree = trainer.strategy.broadcast
    measure = None if data is None else lambda groups: output_changes(data.runner, groups, data.batches, data.seed)
    plan = rounds.plan(calls.subject, progress, step, agree, measure)
    own = without_adapters(plan)
    rounds.advance(own)
    if data is not None and own.kept:
        fits, compensation = agree(fitted_narrow(data.runner, own, data.batches, data.source, data.seed))
        anew = cut_fit_(trainer, pl_module, plan)
        take_fits_(pl_module, fits, compensation, averaged_copies(trainer))
        return Outcome(anew, compensation)
    before = input_moments(make_probe(trainer, pl_module), calls.own)
    anew = cut_fit_(trainer, pl_module, plan)
    if plan.kept:
        models = (pl_module, *averaged_copies(trainer))
        statistics.restart_(models, make_probe(trainer, pl_module), calls.own, before, plan.kept)
    return Outcome(anew, None)


def follow_statistics_(trainer: Any, pl_module: Any, batch: Batch, statistics: BatchNormRestart) -> None:
    """Let all norms average over this batch, those too that don't update their statistics themselves."""
    if statistics.awaits_pass(pl_module):
        calls = FitCalls(trainer, pl_module, *batch)
        probe = make_probe(trainer, pl_module)
        to_float_(probe)
        statistics.follow_((pl_module, *averaged_copies(trainer)), probe, calls.own)
