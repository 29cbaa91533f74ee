"""Pruning, quantization and knowledge distillation as callbacks of a PyTorch Lightning Trainer."""

from .channels import RemovalPlan, plan_removal, remove_channels_
from .channels.callback import ChannelPruning
from .choosing import SearchResult, SensitivityTable, search, sensitivity
from .choosing.guard import AccuracyGuard
from .choosing.phases import PhaseCheckpoint
from .choosing.validation import ValidationMetric
from .distillation import Distillation, DistillationModule, EMATeacher, Ramp, Snapshot
from .distillation.losses.attention_transfer import AttentionTransfer
from .distillation.losses.base import FeatureLoss, LogitLoss
from .distillation.losses.dist import DIST
from .distillation.losses.dkd import DKD
from .distillation.losses.features import FeatureCosine, FeatureMSE
from .distillation.losses.logits import LogitMSE
from .distillation.losses.relations import RelationalAngle, RelationalDistance, SimilarityPreserving
from .distillation.losses.soft_target import HardTarget, SoftTarget
from .errors import CompressionError, MissingExtraError, NoEffectWarning
from .export import ExportedModel, export
from .export.callback import ExportModel
from .export.runtime_module import RuntimeModule
from .pruning import PostTrainingPruning, Rewind, ScheduledPruning, prune_, sparsity
from .quantization import GPTQ, NF4, DynamicInt8, StaticInt8, WeightOnly, quantize
from .quantization.lora.merge import merge_adapters
from .quantization.ptq import PostTrainingQuantization
from .quantization.qat import QuantizationAwareTraining
from .quantization.qlora import QLoRA
from .report import CompressionReport, compare, measure
from .schedules import Cosine, Exponential, Linear, OneShot, Polynomial, Steps
from .structure.files import load_compressed, save_compressed
from .targets import Targets
from .window import Window

__all__ = [
    "DIST",
    "DKD",
    "GPTQ",
    "NF4",
    "AccuracyGuard",
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
    "ExportModel",
    "ExportedModel",
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
    "PhaseCheckpoint",
    "Polynomial",
    "PostTrainingPruning",
    "PostTrainingQuantization",
    "QLoRA",
    "QuantizationAwareTraining",
    "Ramp",
    "RelationalAngle",
    "RelationalDistance",
    "RemovalPlan",
    "Rewind",
    "RuntimeModule",
    "ScheduledPruning",
    "SearchResult",
    "SensitivityTable",
    "SimilarityPreserving",
    "Snapshot",
    "SoftTarget",
    "StaticInt8",
    "Steps",
    "Targets",
    "ValidationMetric",
    "WeightOnly",
    "Window",
    "compare",
    "export",
    "load_compressed",
    "measure",
    "merge_adapters",
    "plan_removal",
    "prune_",
    "quantize",
    "remove_channels_",
    "save_compressed",
    "search",
    "sensitivity",
    "sparsity",
]
