"""What a student is asked to imitate: each loss is a small frozen class around a pure function, with its weight."""

from lightning_compress.distillation.losses.base import DistillationLoss, FeatureLoss, LogitLoss
from lightning_compress.distillation.losses.features import (
    AttentionTransfer,
    FeatureCosine,
    FeatureMSE,
    RelationalAngle,
    RelationalDistance,
    SimilarityPreserving,
)
from lightning_compress.distillation.losses.logits import DIST, DKD, HardTarget, LogitMSE, SoftTarget

__all__ = [
    "DIST",
    "DKD",
    "AttentionTransfer",
    "DistillationLoss",
    "FeatureCosine",
    "FeatureLoss",
    "FeatureMSE",
    "HardTarget",
    "LogitLoss",
    "LogitMSE",
    "RelationalAngle",
    "RelationalDistance",
    "SimilarityPreserving",
    "SoftTarget",
]
