"""Calibration: runs batches through a prepared model so that its observers see the activations' ranges."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_compress.errors import CompressionError
from lightning_compress.modules.calls import run_step
from lightning_compress.modules.isolation import isolated_evaluation
from lightning_compress.modules.paths import clean_name
from lightning_compress.modules.routing import CHILD
from lightning_compress.quantization.static.traced import Traced


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    limit: int,
    run: Callable[[nn.Module, Any], Any] = run_step,
) -> int:
    """Run up to ``limit`` ``batches`` through a prepared model in evaluation mode; returns how many there were.

    Nothing but observers changes: no gradients, no BatchNorm statistics, no global random state.

    Raises:
        CompressionError: there wasn't a single batch.
    """
    count = 0
    with isolated_evaluation(model), _observing(model):
        for batch in batches:
            if count == limit:
                break
            run(model, batch)
            count += 1
    if count == 0:
        raise CompressionError("`calibration` must give at least one batch. Received: an empty loader.")
    _check_ranges(model)
    return count


def _check_ranges(model: nn.Module) -> None:
    """Raise where an observer saw what has no range; before it has seen anything its minimum is inf."""
    for name, module in model.named_modules():
        low, high = (dict(module._buffers).get(name) for name in ("min_val", "max_val"))
        if low is None or high is None:
            continue
        if (low.isnan() | (low == -math.inf)).any() or (high.isnan() | (high == math.inf)).any():
            place = clean_name(name).replace(f"{CHILD}.graph.", "")
            raise CompressionError(f"`calibration` must be finite. Received: NaN or infinity, seen by `{place}`.")


@contextmanager
def _observing(model: nn.Module) -> Iterator[None]:
    traced = [module for module in model.modules() if isinstance(module, Traced)]
    for module in traced:
        module.calibrating = True
    try:
        yield
    finally:
        for module in traced:
            module.calibrating = False
