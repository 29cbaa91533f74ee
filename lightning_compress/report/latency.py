"""How long does a call take? The median of repeated calls after a warm-up, with its spread, within a time budget."""

from __future__ import annotations

import statistics
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_compress.distillation.calling import call
from lightning_compress.modules.isolation import isolated_inference
from lightning_compress.modules.latency import finished_call, time_in_turns

# Fewer rounds than the least can't tell a difference from chance: of 8 ratios 7 must lie on one side of 1.
_LEAST_ROUNDS, _MOST_ROUNDS, _MOST_RUNS = 8, 20, 1000
_WARM_UP_RUNS, _WARM_UP_FRACTION = 10, 0.2
_LOST = 0.1


@dataclass(frozen=True)
class Latency:
    """The time of a call at some batch size: the median of ``runs`` calls, and its lower and upper quartile.

    ``rounds_ms`` are the medians of the rounds in which several models took turns; those of models with the same
    ``turns`` belong together, round by round. ``waited`` is the fraction of the time in which no thread of this process
    ran: the machine did other work, or the model waits for something.
    """

    batch_size: int
    median_ms: float
    lower_ms: float
    upper_ms: float
    runs: int
    rounds_ms: tuple[float, ...] = ()
    turns: str = ""
    waited: float = 0.0


def speedup_range(after: Latency, before: Latency) -> tuple[float, float, float] | None:
    """Say how many times faster ``after`` is than ``before``: lower quartile, median, upper; None where a time is 0.

    For models that took turns these are of the ratios round by round: whatever slowed a round slowed both. Otherwise
    all that is known is where the middle halves of both lie. A busy machine makes long calls wait more often than short
    ones, so the range is wide enough for the ratio of the times in which they ran.

    Example:
        >>> fast = Latency(1, 1.0, 0.9, 1.1, 50, (1.0, 1.0, 9.0), "a")
        >>> slow = Latency(1, 2.0, 1.9, 2.1, 50, (2.0, 2.0, 18.0), "a")
        >>> speedup_range(fast, slow)
        (2.0, 2.0, 2.0)
    """
    if after.turns and after.turns == before.turns and len(after.rounds_ms) == len(before.rounds_ms) > 1:
        if not all(after.rounds_ms + before.rounds_ms):
            return None
        ratios = [old / new for old, new in zip(before.rounds_ms, after.rounds_ms, strict=True)]
        lower, median, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    elif all((after.lower_ms, after.median_ms, after.upper_ms, before.lower_ms, before.median_ms, before.upper_ms)):
        median = before.median_ms / after.median_ms
        lower, upper = before.lower_ms / after.upper_ms, before.upper_ms / after.lower_ms
    else:
        return None
    if after.waited < 1 and before.waited < 1:
        running = median * (1 - before.waited) / (1 - after.waited)
        lower, upper = min(lower, running), max(upper, running)
    return lower, median, upper


def measure_latency(
    models: Mapping[str, tuple[nn.Module, Mapping[int, Any]]],
    max_seconds: float,
    threads: int | None = None,
    run: Callable[[nn.Module, Any], Any] = call,
) -> dict[str, tuple[Latency, ...]]:
    """Time models on inputs of several batch sizes, in evaluation mode under ``inference_mode``.

    Models and batch sizes take turns in short rounds, so that a busy moment of the machine doesn't fall on one of them
    alone. In its turn a model is called until its share of the round is over, after calls that warm it up: in at least
    8 rounds, and in no new one after the budget.

    Args:
        models: Name to any module, and its example inputs by batch size.
        max_seconds: Time budget for each model and batch size.
        threads: Threads of torch while timing; those that are set now by default.
        run: How inputs go through a model.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> timed = measure_latency({"a": (model, {1: torch.ones(1, 3)}), "b": (model, {1: torch.ones(1, 3)})}, 0.01)
        >>> [latency.batch_size for latency in timed["a"]], list(timed)
        ([1], ['a', 'b'])
    """

    def swapped(inputs: Any, model: nn.Module) -> Any:
        return run(model, inputs)

    turns = uuid.uuid4().hex[:8]
    slots = {
        (name, size): _Slot(finished_call(model, partial(swapped, inputs)), max_seconds / _MOST_ROUNDS)
        for name, (model, by_size) in models.items()
        for size, inputs in by_size.items()
    }
    with ExitStack() as stack:
        for model, _ in models.values():
            stack.enter_context(isolated_inference(model))
        if threads is not None:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(threads)
        time_in_turns(
            [slot.take for slot in slots.values()],
            max_seconds=max_seconds * len(slots),
            min_rounds=_LEAST_ROUNDS,
            max_rounds=_MOST_ROUNDS,
            warm_up=0,
        )
    return {
        name: tuple(slots[name, size].summary(size, turns) for size in by_size) for name, (_, by_size) in models.items()
    }


@dataclass
class _Slot:
    """The turns of a model at some batch size."""

    run: Callable[[], None]
    seconds: float
    rounds_ms: list[list[float]] = field(default_factory=list)
    waited_ms: float = 0.0

    def take(self) -> None:
        started = time.perf_counter()
        # The others have emptied the caches meanwhile; a call that takes long fills them by itself.
        if not self.rounds_ms or min(self.rounds_ms[-1]) < 1e3 * _WARM_UP_FRACTION * self.seconds:
            for _ in range(_WARM_UP_RUNS):
                self.run()
                if time.perf_counter() - started > _WARM_UP_FRACTION * self.seconds:
                    break
        calls: list[tuple[float, float]] = []
        for _ in range(_MOST_RUNS // _MOST_ROUNDS):
            running, begin = time.process_time(), time.perf_counter()
            self.run()
            end = time.perf_counter()
            waited = end - begin - (time.process_time() - running)
            calls.append(((end - begin) * 1e3, max(0.0, waited) * 1e3))
            if end - started > self.seconds:
                break
        # Calls that nothing else came in between say what the model takes; if there are none, all must do.
        calls = [(taken_ms, waited_ms) for taken_ms, waited_ms in calls if waited_ms <= _LOST * taken_ms] or calls
        self.rounds_ms.append([time_ms for time_ms, _ in calls])
        self.waited_ms += sum(waited_ms for _, waited_ms in calls)

    def summary(self, batch_size: int, turns: str) -> Latency:
        times = [time_ms for round_ms in self.rounds_ms for time_ms in round_ms]
        lower, median, upper = (round(value, 6) for value in statistics.quantiles(times, n=4, method="inclusive"))
        rounds = tuple(round(statistics.median(round_ms), 6) for round_ms in self.rounds_ms)
        waited = round(min(1.0, self.waited_ms / sum(times)), 3) if any(times) else 0.0
        return Latency(batch_size, median, lower, upper, len(times), rounds, turns, waited)
