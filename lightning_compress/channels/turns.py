"""Times two models in turns, so that a busy machine slows both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lightning_compress.report.undisturbed import device_of, undisturbed

_ROUNDS, _SECONDS = 30, 1.5


def latency_ratio(before: nn.Module, after: nn.Module, run: Callable[[nn.Module], Any]) -> float:
    """The median time of a run of ``after`` over that of ``before``, in evaluation, measured in turns.

    Args:
        before: any module; left as it was.
        after: likewise.
        run: calls the model that it is given.
    """
    times: dict[nn.Module, list[float]] = {before: [], after: []}
    device = device_of(before)
    with undisturbed(before), undisturbed(after):
        started = time.perf_counter()
        for turn in range(_ROUNDS + 2):
            for model, mine in times.items():
                begin = time.perf_counter()
                run(model)
                if device.type != "cpu":
                    torch.accelerator.synchronize(device)
                if turn >= 2:  # warm by then
                    mine.append(time.perf_counter() - begin)
            if turn >= 6 and time.perf_counter() - started > _SECONDS:
                break
    return statistics.median(times[after]) / statistics.median(times[before])
