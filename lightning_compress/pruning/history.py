"""How sparsity grew over a fit, in points that a picture needs."""

from __future__ import annotations

from typing import NamedTuple

from lightning_compress.pruning.masks import sparsity_of
from lightning_compress.pruning.methods import Masks

HISTORY_POINTS = 100
"""How many points of time the history of a fit holds at most, about."""


class SparsityPoint(NamedTuple):
    """Sparsity after some optimizer step: overall, and by parameter name."""

    step: int
    sparsity: float
    by_layer: dict[str, float]


def add_point_(history: list[SparsityPoint], step: int, masks: Masks, at_end: bool) -> None:
    """Note the sparsity of every layer where it has moved on visibly, or ends."""
    now = sparsity_of(masks)
    last = history[-1].sparsity if history else None
    if last is None or now - last >= 1 / HISTORY_POINTS or (at_end and now > last):
        by_layer = {name: sparsity_of({name: mask}) for name, mask in masks.items()}
        history.append(SparsityPoint(step, now, by_layer))
