"""Says where the quantized form of a model takes longer than the float one, on a batch of the shapes seen."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_compress.modules.copying import copy_tensors
from lightning_compress.modules.latency import round_ratios
from lightning_compress.quantization.convert import record_of

_logger = logging.getLogger("lightning_compress")

NOISE = 1.05
"""Three quarters of the rounds must exceed this ratio: a busy machine slows single rounds."""

_SECONDS, _LEAST, _MOST, _WARM_UP = 0.3, 3, 20, 1


def slower_than_float(
    floats: nn.Module,
    quantized: nn.Module,
    run: Callable[[nn.Module, Any], Any],
    batch: Any,
    *,
    fixed_rounds: bool = False,
) -> str:
    """A line for the log and the report if ``quantized`` takes longer than ``floats``; empty if it doesn't.

    Both take turns for about 0.3 s, 4 calls of each at least. Forms that are compiled at their first call aren't timed.

    Args:
        floats: the float model, or a copy of it; what can't be put back afterwards, such as lists that grow, changes.
        quantized: likewise.
        run: how a batch goes through.
        batch: of the shapes that matter.
        fixed_rounds: the same number of calls whatever they take, where other processes must follow.
    """
    record = record_of(quantized) or {}
    if any(unit["flow"] == "pt2e" for unit in record.get("units", ())):
        return ""
    seconds = 0.0 if fixed_rounds else _SECONDS
    try:
        ratios = round_ratios(
            floats,
            quantized,
            lambda model: run(model, copy_tensors(batch)),
            max_seconds=seconds,
            min_rounds=_LEAST,
            max_rounds=_MOST,
            warm_up=_WARM_UP,
        )
    except Exception as error:  # it is the user's; to be timed is no reason to fail
        _logger.debug("The quantized model wasn't timed: %s", error)
        return ""
    lower, median, _ = statistics.quantiles(ratios, n=4, method="inclusive")
    if lower <= NOISE:
        return ""
    return (
        f"slower than float here: a batch takes {median:.2f} times as long in the quantized form (the median of "
        f"{len(ratios)} rounds in turns)"
    )
