"""How fast is a model that is compressed in earnest? It is timed in turns with the model that it was made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_compress.choosing.forms import Run
from lightning_compress.modules.copying import copy_module, copy_tensors
from lightning_compress.modules.isolation import evaluation_mode
from lightning_compress.quantization.quantize import quantize_
from lightning_compress.quantization.recipe import Recipe
from lightning_compress.report.latency import Latency, measure_latency, speedup_range

SECONDS = 1.0
"""So long each of the models is timed."""


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
        """Time ``other`` in turns with ``model``, for some two seconds."""
        found = speedup_range(*_timed([other, model], run, batch))
        assert found is not None  # no call takes no time
        low, median, high = found
        return cls(median, low, high)


def milliseconds(model: nn.Module, run: Run, batch: Any) -> float:
    """Return how long a batch takes in evaluation: the median of the runs of a second."""
    return _timed([model], run, batch)[0].median_ms


def _timed(models: Sequence[nn.Module], run: Run, batch: Any) -> list[Latency]:
    named = {str(place): (model, {1: batch}) for place, model in enumerate(models)}
    timed = measure_latency(named, SECONDS, run=lambda model, batch: run(model, copy_tensors(batch)))
    return [latency for [latency] in timed.values()]


def quantized_copy(model: nn.Module, recipe: Recipe, batches: Sequence[Any], run: Run) -> nn.Module:
    """Return a quantized copy, as the callbacks make one; none of what `quantize` logs is logged."""
    twin = copy_module(model)
    with evaluation_mode(twin):
        quantize_(twin, recipe, batches[0], iter(batches[1:]), run)
    return twin
