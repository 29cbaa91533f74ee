"""Knowledge distillation: losses, taps, adapters, the teacher, and the module that puts them together."""

from lightning_compress.distillation.adapters import adapt, make_adapter
from lightning_compress.distillation.callback import Distillation
from lightning_compress.distillation.features import Taps, find_layer
from lightning_compress.distillation.functional import (
    attention_transfer,
    dist,
    dkd,
    feature_cosine,
    feature_mse,
    hard_target,
    logit_mse,
    relational_angle,
    relational_distance,
    similarity_preserving,
    soft_target,
)
from lightning_compress.distillation.losses import (
    DIST,
    DKD,
    AttentionTransfer,
    DistillationLoss,
    FeatureCosine,
    FeatureLoss,
    FeatureMSE,
    HardTarget,
    LogitLoss,
    LogitMSE,
    RelationalAngle,
    RelationalDistance,
    SimilarityPreserving,
    SoftTarget,
)
from lightning_compress.distillation.module import DistillationModule
from lightning_compress.distillation.ramps import Ramp
from lightning_compress.distillation.student_teachers import EMATeacher, Snapshot
from lightning_compress.distillation.weights import load_weights_

__all__ = [
    "DIST",
    "DKD",
    "AttentionTransfer",
    "Distillation",
    "DistillationLoss",
    "DistillationModule",
    "EMATeacher",
    "FeatureCosine",
    "FeatureLoss",
    "FeatureMSE",
    "HardTarget",
    "LogitLoss",
    "LogitMSE",
    "Ramp",
    "RelationalAngle",
    "RelationalDistance",
    "SimilarityPreserving",
    "Snapshot",
    "SoftTarget",
    "Taps",
    "adapt",
    "attention_transfer",
    "dist",
    "dkd",
    "feature_cosine",
    "feature_mse",
    "find_layer",
    "hard_target",
    "load_weights_",
    "logit_mse",
    "make_adapter",
    "relational_angle",
    "relational_distance",
    "similarity_preserving",
    "soft_target",
]
