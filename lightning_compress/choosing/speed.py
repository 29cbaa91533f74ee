"""How fast is a model that is compressed in earnest? It is timed in turns with the model that it was made of."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_compress.choosing.forms import Run
from lightning_compress.modules.copying import copy_module, copy_tensors
from lightning_compress.modules.isolation import evaluation_mode, isolated_inference
from lightning_compress.modules.latency import round_ratios, time_in_turns
from lightning_compress.quantization.quantize import quantize_
from lightning_compress.quantization.recipe import Recipe


@dataclass(frozen=True)
class Speed:
    """How many times faster than a model another is.

    Attributes:
        median: over rounds in which both had their turn.
        low: a quarter of the rounds is below.
        high: a quarter is above.
    """

    median: float
    low: float
    high: float

    @classmethod
    def beside(cls, model: nn.Module, other: nn.Module, run: Run, batch: Any) -> Speed:
        """Time ``other`` in turns with ``model``, for two seconds."""
        ratios = round_ratios(model, other, lambda module: run(module, copy_tensors(batch)), max_seconds=2.0)
        low, middle, high = statistics.quantiles([1 / ratio for ratio in ratios], n=4)
        return cls(middle, low, high)


def milliseconds(model: nn.Module, run: Run, batch: Any) -> float:
    """Return how long a batch takes in evaluation: the median of the runs of a second."""
    with isolated_inference(model):
        rounds = time_in_turns([lambda: run(model, copy_tensors(batch))], max_seconds=1.0)
    return 1e3 * statistics.median(seconds for [seconds] in rounds)


def quantized_copy(model: nn.Module, recipe: Recipe, batches: Sequence[Any], run: Run) -> nn.Module:
    """Return a quantized copy, as the callbacks make one; none of what `quantize` logs is logged."""
    twin = copy_module(model)
    with evaluation_mode(twin):
        quantize_(twin, recipe, batches[0], iter(batches[1:]), run)
    return twin
