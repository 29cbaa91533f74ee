"""Knowledge distillation: losses, taps, adapters, the teacher, and the module that puts them together."""

from lightning_compress.distillation.adapters import adapt, make_adapter
from lightning_compress.distillation.features import Taps, find_layer
from lightning_compress.distillation.functional import feature_cosine, feature_mse, hard_target, soft_target
from lightning_compress.distillation.losses import (
    DistillationLoss,
    FeatureCosine,
    FeatureLoss,
    FeatureMSE,
    HardTarget,
    LogitLoss,
    SoftTarget,
)
from lightning_compress.distillation.module import DistillationModule
from lightning_compress.distillation.teacher import load_weights_

__all__ = [
    "DistillationLoss",
    "DistillationModule",
    "FeatureCosine",
    "FeatureLoss",
    "FeatureMSE",
    "HardTarget",
    "LogitLoss",
    "SoftTarget",
    "Taps",
    "adapt",
    "feature_cosine",
    "feature_mse",
    "find_layer",
    "hard_target",
    "load_weights_",
    "make_adapter",
    "soft_target",
]
