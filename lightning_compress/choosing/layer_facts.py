"""What a layer costs in a run: its multiply-accumulates, and its time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from typing import Any

from torch import nn

from lightning_compress.choosing.forms import Run
from lightning_compress.modules.calls import samples_in
from lightning_compress.modules.copying import copy_tensors
from lightning_compress.modules.isolation import isolated_evaluation
from lightning_compress.report.macs import counted

_RUNS = 5


@dataclass(frozen=True)
class LayerFacts:
    """What a layer costs.

    Attributes:
        macs: multiply-accumulates of one sample.
        latency_ms: time of its calls for the batch, in milliseconds; the median of some runs.
    """

    macs: float
    latency_ms: float


def layer_facts(model: nn.Module, run: Run, batch: Any, layers: Mapping[str, nn.Module]) -> dict[str, LayerFacts]:
    """Measure ``layers`` of a model while a batch runs through it."""
    macs = dict.fromkeys(layers, 0.0)
    runs = list[dict[str, float]]()
    with isolated_evaluation(model):
        with counted() as counter:
            _between(model, run, batch, layers, lambda: counter.macs, macs)
        for _ in range(1 + _RUNS):  # the first warms up
            runs.append(dict.fromkeys(layers, 0.0))
            _between(model, run, batch, layers, time.perf_counter, runs[-1])
    samples = samples_in(batch)
    return {path: LayerFacts(macs[path] / samples, 1e3 * median(times[path] for times in runs[1:])) for path in layers}


def sample_macs(model: nn.Module, run: Run, batch: Any) -> float:
    """Count the multiply-accumulates of a sample in all of a model."""
    with isolated_evaluation(model), counted() as counter:
        run(model, copy_tensors(batch))
    return counter.macs / samples_in(batch)


def _between(
    model: nn.Module,
    run: Run,
    batch: Any,
    layers: Mapping[str, nn.Module],
    read: Callable[[], float],
    sums: dict[str, float],
) -> None:
    """Add how much further a counter has gone by each call of each layer."""
    starts = dict[str, float]()

    def leave(path: str) -> None:
        sums[path] += read() - starts[path]

    with ExitStack() as hooks:
        for path, layer in layers.items():
            before = layer.register_forward_pre_hook(lambda *_, path=path: starts.__setitem__(path, read()))
            after = layer.register_forward_hook(lambda *_, path=path: leave(path))
            hooks.enter_context(before)
            hooks.enter_context(after)
        run(model, copy_tensors(batch))
