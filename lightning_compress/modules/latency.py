"""How long do models take? They are timed in turns, so that a busy moment of the machine falls on all of them."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from lightning_compress.modules.isolation import isolated_inference
from lightning_compress.modules.paths import device_of


def time_in_turns(
    runs: Sequence[Callable[[], Any]],
    *,
    max_seconds: float = 1.5,
    min_rounds: int = 5,
    max_rounds: int = 30,
    warm_up: int = 2,
) -> list[tuple[float, ...]]:
    """Time ``runs`` in turns: the seconds that they take, one row for each round in which all of them had their turn.

    Args:
        runs: what to time; they take turns.
        max_seconds: no new round begins after so long, the warm-up included.
        min_rounds: so many rounds are timed in any case.
        max_rounds: so many at most.
        warm_up: rounds before the first that is timed.

    Example:
        >>> rounds = time_in_turns([lambda: None, lambda: None], max_seconds=0.0, min_rounds=3)
        >>> len(rounds), len(rounds[0])
        (3, 2)
    """
    rounds: list[tuple[float, ...]] = []
    with ExitStack() as stack:
        if gc.isenabled():  # a garbage collection of the whole program isn't a model's latency
            gc.disable()
            stack.callback(gc.enable)
        started = time.perf_counter()
        for turn in range(warm_up + max_rounds):
            seconds = tuple(map(_seconds, runs))
            if turn >= warm_up:
                rounds.append(seconds)
            if len(rounds) >= min_rounds and time.perf_counter() - started > max_seconds:
                break
    return rounds


def round_ratios(
    before: nn.Module, after: nn.Module, run: Callable[[nn.Module], Any], **limits: Any
) -> tuple[float, ...]:
    """Return the time of ``run(after)`` over that of ``run(before)`` in each of several rounds, in evaluation.

    Both modules and the global random states are left as they were; ``limits`` are those of `time_in_turns`.

    Example:
        >>> ratios = round_ratios(nn.Linear(4, 4), nn.Linear(4, 4), lambda model: model(torch.ones(1, 4)))
        >>> len(ratios) >= 5
        True
    """
    with isolated_inference(before), isolated_inference(after):
        rounds = time_in_turns([finished_call(before, run), finished_call(after, run)], **limits)
    return tuple(second / first for first, second in rounds)


def finished_call(model: nn.Module, run: Callable[[nn.Module], Any]) -> Callable[[], None]:
    """Return a call of ``run(model)`` that lasts until the model's device has done its work."""
    device = device_of(model)

    def call() -> None:
        run(model)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    return call


def latency_ratio(before: nn.Module, after: nn.Module, run: Callable[[nn.Module], Any]) -> float:
    """Return the median of `round_ratios`."""
    return statistics.median(round_ratios(before, after, run))


NOISE = 1.05
"""Three quarters of the rounds must exceed this ratio: a busy machine slows single rounds."""


def is_slower(ratios: Sequence[float]) -> bool:
    """Whether rounds show that the second takes longer.

    Example:
        >>> is_slower([1.2, 1.1, 1.3]), is_slower([0.9, 1.0, 5.0, 5.0])
        (True, False)
    """
    return statistics.quantiles(ratios, n=4, method="inclusive")[0] > NOISE


def brief(fixed_rounds: bool) -> dict[str, Any]:
    """Return limits of `time_in_turns` for a look in passing: about 0.3 s, 4 calls of each at least.

    Where other processes must follow there are ``fixed_rounds``, whatever they take.
    """
    return {"max_seconds": 0.0 if fixed_rounds else 0.3, "min_rounds": 3, "max_rounds": 20, "warm_up": 1}


def _seconds(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
