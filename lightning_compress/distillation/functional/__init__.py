"""The losses as pure functions of tensors.

All arithmetic is in float32 (float64 stays) with autocast off; logits are compared in log space. Values *and*
gradients are finite for extreme and for masked (-inf) logits, for zero features and for a batch of one.
"""

from lightning_compress.distillation.functional.features import (
    attention_transfer,
    feature_cosine,
    feature_mse,
    relational_angle,
    relational_distance,
    similarity_preserving,
)
from lightning_compress.distillation.functional.logits import (
    dist,
    dkd,
    hard_target,
    logit_mse,
    soft_target,
    standardize_logits,
)

__all__ = [
    "attention_transfer",
    "dist",
    "dkd",
    "feature_cosine",
    "feature_mse",
    "hard_target",
    "logit_mse",
    "relational_angle",
    "relational_distance",
    "similarity_preserving",
    "soft_target",
    "standardize_logits",
]
