"""Pruning: which weights become zero, and when."""

from lightning_compress.pruning.callback import ScheduledPruning
from lightning_compress.pruning.post_training import PostTrainingPruning
from lightning_compress.pruning.prune import prune_, sparsity
from lightning_compress.pruning.rewind import Rewind

__all__ = ["PostTrainingPruning", "Rewind", "ScheduledPruning", "prune_", "sparsity"]
