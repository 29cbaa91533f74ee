"""A round of removal in a fit: measured, planned, cut, and fitted or its statistics restarted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from lightning_compress.calibration import calibration_source, chosen_batches, reads_again
from lightning_compress.channels.batchnorm_restart import BatchNormRestart, input_moments
from lightning_compress.channels.change import CHANGE
from lightning_compress.channels.compensate import Compensation, fitted_narrow, take_fits_
from lightning_compress.channels.fit_calls import FitCalls, cut_fit_, without_adapters
from lightning_compress.channels.planning.output_changes import output_changes
from lightning_compress.channels.remove_channels import CALIBRATION_BATCHES, check_module
from lightning_compress.channels.rounds import Rounds
from lightning_compress.channels.speed import slower_than_whole
from lightning_compress.channels.tracing.groups import Group
from lightning_compress.compensation.runner import Runner
from lightning_compress.errors import CompressionError, in_a_line
from lightning_compress.silent_copy import make_probe
from lightning_compress.structure.change import to_float_
from lightning_compress.structure.listener import averaged_copies

T = TypeVar("T")
SAMPLES = 256
"""By default so many samples are measured on and fitted to, or a few more, as batches are whole."""
Batch = tuple[Any, int]
"""A batch, and its number."""


class Calibration(NamedTuple):
    """How a module runs, and batches to measure on and to fit to, with where they come from."""

    runner: Runner
    batches: list[Any]
    source: str
    seed: int


def calibration_data(trainer: Any, pl_module: Any, count: int | None, seed: int) -> Calibration:
    """Read ``count`` batches of a fit's data beside it; None for so many as hold `SAMPLES`."""
    probe = make_probe(trainer, pl_module)
    to_float_(probe)
    if count is None:
        if not reads_again(trainer, pl_module):
            raise CompressionError(
                "The train loader is a stream, which may give a sample only once. Define `calibration_dataloader()`."
            )
        most = CALIBRATION_BATCHES
        if calibration_source(trainer, pl_module) is None:  # what a limit leaves out of the fit stays out
            most = min(most, trainer.num_training_batches)
        feed, batches = chosen_batches(trainer, pl_module, probe, most, seed, SAMPLES)
    else:
        feed, batches = chosen_batches(trainer, pl_module, probe, count, seed)
    source = "the train loader" if calibration_source(trainer, pl_module) is None else "`calibration_dataloader`"
    return Calibration(Runner(pl_module, feed, partial(make_probe, trainer)), batches, source, seed)


class Outcome(NamedTuple):
    """What a round led to.

    Attributes:
        anew: optimizers whose state starts anew for what shrank.
        compensation: what was fitted.
        why_not: why nothing was.
        slower: says so if the last round leaves the module slower than it was.
    """

    anew: list[str]
    compensation: Compensation | None = None
    why_not: str = ""
    slower: str = ""


class _Attempts:
    """Does work step by step; where nobody has asked for it, it may fail, and the steps after it are left out."""

    def __init__(self, may_fail: bool) -> None:
        self.may_fail, self.failure = may_fail, ""

    def __call__(self, step: Callable[..., T], *args: Any) -> T | None:
        if self.failure:
            return None
        try:
            return step(*args)
        except Exception as error:  # of code of the user's
            if not self.may_fail:
                raise
            self.failure = in_a_line(error)
            return None


def remove_in_fit_(
    trainer: Any,
    pl_module: Any,
    batch: Batch,
    rounds: Rounds,
    statistics: BatchNormRestart,
    progress: float,
    step: int,
    calibration_batches: int | None,
) -> Outcome:
    """Carry a round out on a module and all that follows it: all ranks take the first one's plan and fits."""
    check_module(pl_module)
    calls = FitCalls(trainer, pl_module, *batch)
    agree = trainer.strategy.broadcast
    attempt, data = _Attempts(may_fail=calibration_batches is None), None
    if calibration_batches != 0:
        data = attempt(calibration_data, trainer, pl_module, calibration_batches, rounds.recipe.seed + step)

    def measure(groups: Sequence[Group]) -> dict[str, Tensor] | None:
        return data and attempt(output_changes, data.runner, groups, data.batches, data.seed)

    plan = rounds.plan(calls.subject, progress, step, agree, measure)
    own = without_adapters(plan)
    rounds.advance(own)
    found = None
    if data is not None and own.kept:
        found = attempt(fitted_narrow, data.runner, own, data.batches, data.source, data.seed)
    compensation = None
    if (found := agree(found)) is not None:
        fits, compensation = found
        anew = cut_fit_(trainer, pl_module, plan)
        take_fits_(pl_module, fits, compensation, averaged_copies(trainer))
    else:
        before = input_moments(make_probe(trainer, pl_module), calls.own)
        anew = cut_fit_(trainer, pl_module, plan)
        if plan.kept:
            models = (pl_module, *averaged_copies(trainer))
            statistics.restart_(models, make_probe(trainer, pl_module), calls.own, before, plan.kept)
    slower = ""
    if rounds.is_final and CHANGE.record(pl_module) is not None:
        probe, more = make_probe(trainer, pl_module), trainer.world_size > 1
        slower = agree(slower_than_whole(probe, calls.runs[0], fixed_rounds=more))
    return Outcome(anew, compensation, attempt.failure, slower)


def follow_statistics_(trainer: Any, pl_module: Any, batch: Batch, statistics: BatchNormRestart) -> None:
    """Let all norms average over this batch, those too that don't update their statistics themselves."""
    if statistics.awaits_pass(pl_module):
        calls = FitCalls(trainer, pl_module, *batch)
        probe = make_probe(trainer, pl_module)
        to_float_(probe)
        statistics.follow_((pl_module, *averaged_copies(trainer)), probe, calls.own)
