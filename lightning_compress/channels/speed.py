"""Does a module run any faster for the channels that have left it?"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_compress.channels.change import CHANGE
from lightning_compress.modules.copying import copy_module
from lightning_compress.modules.latency import brief, is_slower, round_ratios

_logger = logging.getLogger("lightning_compress")


def slower_than_whole(narrow: nn.Module, run: Callable[[nn.Module], Any], *, fixed_rounds: bool = False) -> str:
    """Return a line for the log and the report if a module takes longer than before it lost channels; else nothing.

    Both take turns for a moment, the whole one with values of no meaning.

    Args:
        narrow: a copy of the module.
        run: runs it.
        fixed_rounds: whether other processes do the same.
    """
    whole = copy_module(narrow)
    CHANGE.revert_(whole)
    try:
        found = round_ratios(whole, narrow, run, **brief(fixed_rounds))
    except Exception as error:  # it is the user's; to be timed is no reason to fail
        _logger.debug("The narrow model wasn't timed: %s", error)
        return ""
    if not is_slower(found):
        return ""
    return (
        f"slower than whole here: a batch takes {statistics.median(found):.2f} times as long without these channels "
        f"(the median of {len(found)} rounds in turns). Some widths suit no kernel: a larger round_to or a budget of "
        "latency avoids them"
    )
