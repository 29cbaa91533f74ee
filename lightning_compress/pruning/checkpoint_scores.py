"""Which checkpoint is best: scores of models that weren't sparse yet can be forgotten."""

from __future__ import annotations

from typing import Any

import torch


def forget_scores(trainer: Any) -> None:
    """Give what `ModelCheckpoint` holds as best so far the worst of scores, so that the next one is better.

    It then replaces the files of the forgotten scores by its own rules.
    """
    checkpoint: Any
    for checkpoint in trainer.checkpoint_callbacks:
        if getattr(checkpoint, "best_k_models", None):
            worst = torch.tensor(torch.inf if checkpoint.mode == "min" else -torch.inf)
            checkpoint.best_k_models = dict.fromkeys(checkpoint.best_k_models, worst)
            checkpoint.kth_value = checkpoint.best_model_score = worst
