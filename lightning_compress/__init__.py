"""Pruning, quantization and knowledge distillation as callbacks of a PyTorch Lightning Trainer."""

from lightning_compress.channels import RemovalPlan, plan_removal, remove_channels_
from lightning_compress.channels.callback import ChannelPruning
from lightning_compress.distillation import (
    DIST,
    DKD,
    AttentionTransfer,
    Distillation,
    DistillationModule,
    EMATeacher,
    FeatureCosine,
    FeatureLoss,
    FeatureMSE,
    HardTarget,
    LogitLoss,
    LogitMSE,
    Ramp,
    RelationalAngle,
    RelationalDistance,
    SimilarityPreserving,
    Snapshot,
    SoftTarget,
)
from lightning_compress.errors import CompressionError, MissingExtraError, NoEffectWarning
from lightning_compress.pruning import Rewind, ScheduledPruning, prune_, sparsity
from lightning_compress.quantization import GPTQ, NF4, DynamicInt8, StaticInt8, WeightOnly, quantize
from lightning_compress.quantization.ptq import PostTrainingQuantization
from lightning_compress.quantization.qat import QuantizationAwareTraining
from lightning_compress.quantization.qlora import QLoRA
from lightning_compress.report import CompressionReport, compare, measure
from lightning_compress.schedules import Cosine, Exponential, Linear, OneShot, Polynomial, Steps
from lightning_compress.structure import load_compressed, merge_adapters, save_compressed
from lightning_compress.targets import Targets
from lightning_compress.window import Window

__all__ = [
    "DIST",
    "DKD",
    "GPTQ",
    "NF4",
    "AttentionTransfer",
    "ChannelPruning",
    "CompressionError",
    "CompressionReport",
    "Cosine",
    "Distillation",
    "DistillationModule",
    "DynamicInt8",
    "EMATeacher",
    "Exponential",
    "FeatureCosine",
    "FeatureLoss",
    "FeatureMSE",
    "HardTarget",
    "Linear",
    "LogitLoss",
    "LogitMSE",
    "MissingExtraError",
    "NoEffectWarning",
    "OneShot",
    "Polynomial",
    "PostTrainingQuantization",
    "QLoRA",
    "QuantizationAwareTraining",
    "Ramp",
    "RelationalAngle",
    "RelationalDistance",
    "RemovalPlan",
    "Rewind",
    "ScheduledPruning",
    "SimilarityPreserving",
    "Snapshot",
    "SoftTarget",
    "StaticInt8",
    "Steps",
    "Targets",
    "WeightOnly",
    "Window",
    "compare",
    "load_compressed",
    "measure",
    "merge_adapters",
    "plan_removal",
    "prune_",
    "quantize",
    "remove_channels_",
    "save_compressed",
    "sparsity",
]
