"""The order in which callbacks hear of a step, whatever their order in the Trainer's list."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

_AVERAGING = "averaging"
_ORDER = (_AVERAGING, "distillation", "channels", "pruning", "quantization-aware training")
"""In this order those hear of a step who change weights or structure, or copy them, wherever the user has put them.

Averages take over the weights of a step before something is done to them and to the averages alike.
"""


def order_callbacks_(trainer: pl.Trainer) -> None:
    """Let those callbacks of which the results depend on their order share their places in the order of `_ORDER`."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    places = [place for place, callback in enumerate(callbacks) if _key(callback) in _ORDER]
    ordered = list(callbacks)  # a new list, as the Trainer is running through the old one
    for place, callback in zip(places, sorted((callbacks[place] for place in places), key=_rank), strict=True):
        ordered[place] = callback
    trainer.callbacks = ordered  # type: ignore[attr-defined]


def _key(callback: Callback) -> str:
    averages = hasattr(callback, "_average_model")  # `averaged_copies` finds its copies by that, too
    return _AVERAGING if averages else getattr(callback, "key", "")


def _rank(callback: Callback) -> int:
    return _ORDER.index(_key(callback))
