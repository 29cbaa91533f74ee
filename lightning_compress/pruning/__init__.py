"""Pruning: which weights become zero, and when."""

from lightning_compress.pruning.callback import ScheduledPruning
from lightning_compress.pruning.prune import prune_

__all__ = ["ScheduledPruning", "prune_"]
