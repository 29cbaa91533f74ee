"""Times a model: the median of repeated runs after a warm-up, with its spread, within a time budget."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_compress.report.inputs import call
from lightning_compress.undisturbed import device_of, undisturbed

_TURNS, _MOST_RUNS = 5, 1000
_WARM_UP_RUNS, _WARM_UP_FRACTION = 10, 0.2


@dataclass(frozen=True)
class Latency:
    """Time of one call at one batch size: the median of ``runs`` calls, and its lower and upper quartile."""

    batch_size: int
    median_ms: float
    lower_ms: float
    upper_ms: float
    runs: int


def measure_latency(
    model: nn.Module, inputs: Mapping[int, Any], max_seconds: float, threads: int | None = None
) -> tuple[Latency, ...]:
    """Time ``model`` on the inputs of each batch size, in evaluation mode under ``inference_mode``.

    The batch sizes take turns, so that a busy moment of the machine doesn't fall on one of them alone. Every turn warms
    up for a fifth of its time (at least one call) and then times calls: in all at least 5 for each batch size, at most
    1000, and no new ones after ``max_seconds``.

    Args:
        model: Any module.
        inputs: Batch size to example inputs of that size.
        max_seconds: Time budget for each batch size.
        threads: Threads of torch while timing; those that are set now by default.

    Example:
        >>> [one.batch_size for one in measure_latency(nn.Linear(3, 2), {1: torch.ones(1, 3)}, 0.01)]
        [1]
    """
    device = device_of(model)

    def run(size: int) -> None:
        call(model, inputs[size])
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    times_ms: dict[int, list[float]] = {size: [] for size in inputs}
    with undisturbed(model), _threads(threads), _no_garbage_collection():
        for _ in range(_TURNS):
            for size, times in times_ms.items():
                _take_turn(partial(run, size), times, max_seconds / _TURNS)
    return tuple(_summary(size, times) for size, times in times_ms.items())


def _take_turn(run: Callable[[], None], times_ms: list[float], seconds: float) -> None:
    started = time.perf_counter()
    for _ in range(_WARM_UP_RUNS):
        run()
        if time.perf_counter() - started > _WARM_UP_FRACTION * seconds:
            break
    for _ in range(_MOST_RUNS // _TURNS):
        begin = time.perf_counter()
        run()
        end = time.perf_counter()
        times_ms.append((end - begin) * 1e3)
        if end - started > seconds:
            break


def _summary(batch_size: int, times_ms: list[float]) -> Latency:
    quartiles = statistics.quantiles(times_ms, n=4, method="inclusive")
    lower, median, upper = (round(value, 6) for value in quartiles)
    return Latency(batch_size, median, lower, upper, len(times_ms))


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        if count is not None:
            torch.set_num_threads(before)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    # A garbage collection of the whole program isn't the model's latency.
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
