"""The public callbacks, found by scanning the package, each with the settings under which the contracts run it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from torch import nn

import lightning_compress
from lightning_compress import (
    AccuracyGuard,
    ChannelPruning,
    CompressionReport,
    Distillation,
    ExportModel,
    FeatureMSE,
    PostTrainingPruning,
    PostTrainingQuantization,
    QLoRA,
    QuantizationAwareTraining,
    Ramp,
    Rewind,
    ScheduledPruning,
    SoftTarget,
    Steps,
    Targets,
    Window,
)

PUBLIC = [
    value
    for name in lightning_compress.__all__
    if isinstance(value := getattr(lightning_compress, name), type) and issubclass(value, Callback)
    if not issubclass(value, Checkpoint)  # Lightning's own contract; see tests/choosing/test_phases.py
]


@dataclass(frozen=True)
class Row:
    """One callback under test.

    Attributes:
        name: of the test.
        make: a new callback.
        yaml: the same as LightningCLI reads it.
        bad: settings that must be refused, and the words of the error.
        changes: tensors beside its targets that it changes by design.
        manual: whether it works with manual optimization.
        narrows: whether tensors lose slices: keys stay, shapes don't.
        adapts: whether the module keeps adapters, and the weights under them stand in an entry of their own.
    """

    name: str
    make: Callable[[], Callback]
    yaml: dict[str, object]
    bad: tuple[tuple[dict[str, object], str], ...] = ()
    changes: tuple[str, ...] = ()
    manual: bool = True
    narrows: bool = False
    adapts: bool = False

    def __str__(self) -> str:
        return self.name


def distillation() -> Distillation:
    """An adapter, a ramp, and a teacher that is the same each time."""
    torch.manual_seed(7)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 4))
    ramps = [Ramp("soft_target", "temperature", 8.0, window=Window(0.2, 0.7))]
    return Distillation(teacher, [SoftTarget(), FeatureMSE("body", "1")], task_weight=0.5, ramps=ramps)


ROWS = (
    Row(
        "pruning",
        lambda: ScheduledPruning(sparsity=0.7, window=Window(0.1, 0.8)),
        {
            "class_path": "lightning_compress.ScheduledPruning",
            "init_args": {
                "method": "taylor",
                "sparsity": 0.7,
                "overrides": {"body": 0.75, "h*": 0.5},
                "max_layer_sparsity": 0.95,
                "rewind": {"to": 0.05, "unit": "fit"},
                "progress_bar": True,
            },
        },
        (
            ({"sparsity": 1.5}, r"`sparsity` must lie in \[0, 1\). Received: sparsity=1.5"),
            ({"sparsity": -0.2}, "`sparsity` must lie in"),
            ({}, "`sparsity` must be given"),
            ({"sparsity": 0.5, "method": "l1_unstructred"}, "Nearest: l1_unstructured"),
            ({"sparsity": 0.5, "method": "os.path.join"}, "BasePruningMethod"),
            ({"sparsity": 0.5, "method": "no.such.module"}, "`method` must be"),
            ({"sparsity": 0.5, "scope": "local"}, "`scope` must be"),
            ({"sparsity": 0.5, "method": "custom_from_mask"}, "fixes it itself"),
            ({"method": "custom_from_mask"}, "`mask_file` must be given"),
            ({"sparsity": 0.5, "method": "tailor"}, "Nearest: taylor"),
            ({"sparsity": 0.5, "overrides": {"body": 1.0}}, r"`overrides` must hold fractions in \[0, 1\)"),
            ({"sparsity": 0.5, "max_layer_sparsity": 0.0}, r"`max_layer_sparsity` must lie in \(0, 1\]"),
            ({"sparsity": 0.5, "n_m": "2:4"}, "`sparsity` must be left out: n_m='2:4' fixes it itself"),
            ({"n_m": "4:2"}, "`n_m` must be 'N:M'"),
            ({"n_m": "2:4", "method": "random_unstructured"}, "`n_m` must be left out with method"),
            ({"sparsity": 0.5, "method": "ln_structured", "regrow": True}, "`regrow` must be False"),
            ({"sparsity": 0.5, "regrow": True, "rewind": Rewind()}, "`rewind` must be left out"),
        ),
    ),
    Row(
        "structured pruning",
        lambda: ScheduledPruning("ln_structured", 0.5, scope="layer", targets=Targets(include=["body"])),
        {
            "class_path": "lightning_compress.ScheduledPruning",
            "init_args": {
                "method": "ln_structured",
                "sparsity": 0.5,
                "scope": "layer",
                "schedule": {"class_path": "lightning_compress.Polynomial", "init_args": {"power": 2.0}},
                "window": {"start": 0.1, "end": 0.75, "every_n_steps": 2},
                "targets": {"include": ["body"], "exclude": ["head"], "types": ["torch.nn.Linear"]},
            },
        },
        changes=("body.bias", "norm.weight", "norm.bias"),
    ),
    Row(
        "least squares",
        lambda: ScheduledPruning(
            "least_squares", 0.7, "layer", Steps([0.0, 1.0], [0.5, 1.0]), Window(0.1, 0.8), calibration_batches=3
        ),
        {
            "class_path": "lightning_compress.ScheduledPruning",
            "init_args": {"method": "wanda", "n_m": "2:4", "calibration_batches": 3},
        },
        (
            ({"sparsity": 0.5, "method": "least_square"}, "Nearest: least_squares"),
            ({"sparsity": 0.5, "method": "wanda", "regrow": True}, "`regrow` must be False"),
            ({"sparsity": 0.5, "method": "wanda", "rewind": Rewind()}, "`rewind` must be left out"),
            ({"sparsity": 0.5, "method": "wanda", "calibration_batches": 0}, "`calibration_batches` must be at least"),
        ),
        changes=("body.bias", "head.bias"),
    ),
    Row(
        "post-training pruning",
        lambda: PostTrainingPruning(sparsity=0.5, calibration_batches=4),
        {
            "class_path": "lightning_compress.PostTrainingPruning",
            "init_args": {"method": "wanda", "sparsity": 0.5, "overrides": {"head": 0.25}, "keep": True},
        },
        (
            ({"sparsity": 0.5, "method": "lamp"}, "`method` must be one of wanda, least_squares"),
            ({}, "`sparsity` must be given"),
            ({"sparsity": 0.5, "calibration_batches": 0}, "`calibration_batches` must be at least 1"),
        ),
    ),
    Row(
        "channels",
        lambda: ChannelPruning(
            channels=0.5,
            round_to=1,
            schedule=Steps([0.0, 1.0], [0.5, 1.0]),
            window=Window(0.05, 0.5),
            calibration_batches=0,
        ),
        {
            "class_path": "lightning_compress.ChannelPruning",
            "init_args": {
                "macs": 0.5,
                "importance": "taylor",
                "scope": "layer",
                "schedule": {"class_path": "lightning_compress.Linear"},
                "window": {"start": 0.2, "end": 0.8, "every_n_steps": 2},
                "targets": {"include": ["body"], "exclude": ["head"], "types": ["torch.nn.Linear"]},
                "overrides": {"b*": 0.5},
                "min_layer_channels": 0.25,
                "round_to": 4,
                "seed": 3,
                "calibration_batches": 0,
            },
        },
        (
            ({}, "`channels`, `params`, `macs` or `latency` must be given, exactly one of them. Received: none"),
            ({"channels": 0.5, "macs": 0.5}, "exactly one of them. Received: channels=0.5, macs=0.5"),
            ({"macs": 0.0}, r"`macs` must lie in \(0, 1\]. Received: macs=0.0"),
            ({"params": 1.5}, r"`params` must lie in \(0, 1\]. Received: params=1.5"),
            ({"latency": float("nan")}, r"`latency` must lie in \(0, 1\]. Received: latency=nan"),
            ({"channels": "0.5"}, r"`channels` must lie in \(0, 1\]. Received: channels='0.5'"),
            ({"channels": True}, r"`channels` must lie in \(0, 1\]. Received: channels=True"),
            ({"macs": 0.5, "importance": "tailor"}, "`importance` must be the name of one.*Nearest: taylor"),
            ({"macs": 0.5, "scope": "local"}, "`scope` must be 'global' or 'layer'. Received: scope='local'"),
            (
                {"macs": 0.5, "overrides": {"body": 0.0}},
                r"`overrides` must map patterns to fractions that remain, in \(0, 1\]",
            ),
            ({"macs": 0.5, "overrides": ["body"]}, "`overrides` must"),
            ({"macs": 0.5, "min_layer_channels": -0.1}, r"`min_layer_channels` must lie in \[0, 1\]"),
            ({"macs": 0.5, "min_layer_channels": "0.1"}, "`min_layer_channels` must"),
            ({"macs": 0.5, "round_to": 0}, "`round_to` must be a whole number, at least 1. Received: round_to=0"),
            ({"macs": 0.5, "round_to": 8.0}, "`round_to` must be a whole number"),
            ({"macs": 0.5, "round_to": True}, "`round_to` must be a whole number"),
            ({"macs": 0.5, "seed": 0.5}, "`seed` must"),
        ),
        narrows=True,
    ),
    Row(
        "channels with calibration",
        lambda: ChannelPruning(channels=0.5, round_to=1, window=Window(0.2, 0.5)),
        {
            "class_path": "lightning_compress.ChannelPruning",
            "init_args": {
                "macs": 0.5,
                "calibration_batches": 16,
                "blocks": True,
            },
        },
        (
            ({"macs": 0.5, "calibration_batches": -1}, "`calibration_batches` must be a whole number, at least 0"),
            ({"macs": 0.5, "calibration_batches": 2.0}, "`calibration_batches` must be a whole number"),
            ({"macs": 0.5, "calibration_batches": True}, "`calibration_batches` must be a whole number"),
            (
                {"macs": 0.5, "importance": "outputs", "calibration_batches": 0},
                "`calibration` must be given for importance='outputs'",
            ),
            ({"macs": 0.5, "regularization": 1e-3}, "`schedule` must take time with `regularization`"),
            (
                {"macs": 0.5, "importance": "outputs", "regularization": 1e-3},
                "`regularization` must be 0 with importance='outputs'",
            ),
        ),
        narrows=True,
    ),
    Row(
        "qat",
        lambda: QuantizationAwareTraining(),
        {"class_path": "lightning_compress.QuantizationAwareTraining", "init_args": {"window": {"start": 0.5}}},
        (
            ({"scheme": "int8_statik"}, "Nearest: int8_static"),
            ({"scheme": "int8_dynamic"}, "`scheme` must be int8_static"),
            ({"overrides": {"head": "int9"}}, "`scheme` must be the name of a scheme"),
            ({"flow": "pt2"}, "`flow` must be"),
            ({"freeze_observers": 0.0}, "`freeze_observers` must lie in"),
        ),
    ),
    Row(
        "ptq static",
        lambda: PostTrainingQuantization("int8_static", calibration_batches=2),
        {
            "class_path": "lightning_compress.PostTrainingQuantization",
            "init_args": {
                "scheme": {"class_path": "lightning_compress.StaticInt8", "init_args": {"observer": "histogram"}},
                "overrides": {"head": "int8_weight_only"},
                "compare": True,
            },
        },
        (
            ({"scheme": "int8_statik"}, "Nearest: int8_static"),
            ({"calibration_batches": 0}, "`calibration_batches` must be at least 1"),
            ({"flow": "pt2"}, "`flow` must be 'auto' or 'pt2e'"),
            (
                {"scheme": "int8_dynamic", "flow": "pt2e"},
                "`flow` must be 'auto' for a scheme that works layer by layer",
            ),
            ({"overrides": {"head": "int8_static"}}, "`overrides` must name schemes that work layer by layer"),
        ),
    ),
    Row(
        "ptq dynamic",
        lambda: PostTrainingQuantization("int8_dynamic"),
        {"class_path": "lightning_compress.PostTrainingQuantization", "init_args": {"scheme": "int8_dynamic"}},
    ),
    Row(
        "qlora",
        lambda: QLoRA(rank=2),
        {
            "class_path": "lightning_compress.QLoRA",
            "init_args": {
                "rank": 4,
                "alpha": 8.0,
                "targets": {"include": ["body"], "exclude": ["head"], "types": ["torch.nn.Linear"]},
                "dropout": 0.1,
                "modules_to_train": ["head", "no*"],
            },
        },
        (
            ({"rank": 0}, "`rank` must be at least 1. Received: rank=0"),
            ({"rank": 8.0}, "`rank` must"),
            ({"alpha": 0.0}, "`alpha` must"),
            ({"dropout": 1.0}, r"`dropout` must lie in \[0, 1\). Received: dropout=1.0"),
            ({"targets": ["body"]}, "`targets` must be a Targets"),
            ({"modules_to_train": "head"}, "`modules_to_train` must be a list of patterns"),
        ),
        adapts=True,
    ),
    Row(
        "distillation",
        distillation,
        {
            "class_path": "lightning_compress.Distillation",
            "init_args": {
                "teacher": {"class_path": "tests.support.modules.Classifier", "init_args": {"hidden": 48}},
                "losses": [
                    {"class_path": "lightning_compress.DKD"},
                    {
                        "class_path": "lightning_compress.FeatureMSE",
                        "init_args": {"student_layer": "body:output", "teacher_layer": "body"},
                    },
                    {
                        "class_path": "lightning_compress.RelationalAngle",
                        "init_args": {"student_layer": "head:input", "teacher_layer": "body"},
                    },
                ],
                "ramps": [{"loss": "dkd", "schedule": "Cosine", "window": {"end": 0.5}}],
                "teacher_adapter": {"class_path": "torch.nn.Identity"},
                "teacher_dtype": "float32",
            },
        },
        (
            ({"task_weight": -1.0}, "`task_weight` must be a finite number, at least 0. Received: task_weight=-1.0"),
            ({"losses": []}, "`losses` must name something to learn"),
            ({"losses": ["kd"]}, "`losses` must be a list of distillation losses"),
            ({"teacher_dtype": "int8"}, "`teacher_dtype` must be float32, bfloat16, float16 or None"),
            ({"ramps": [Ramp("soft_tarrget")]}, "`loss` must name a loss for a ramp.*Nearest: soft_target"),
            ({"ramps": [Ramp("soft_target", "temprature", 1.0)]}, "`number` must name a number.*Nearest: temperature"),
            ({"ramps": [Ramp("soft_target", "temperature")]}, "`temperature` must be a finite number above 0"),
            ({"ramps": [Ramp("task", "temperature", 1.0)]}, "`number` must be 'weight' for the task"),
        ),
        manual=False,
    ),
    Row(
        "guard",
        lambda: AccuracyGuard("val_loss", max_drop=10.0, mode="min", min_samples=10),
        {
            "class_path": "lightning_compress.AccuracyGuard",
            "init_args": {
                "monitor": "val_acc",
                "max_drop": 0.5,
                "mode": "max",
                "min_samples": 10,
                "fallback": "int8_weight_only",
                "baseline": 0.5,
                "smoothing": 0.0,
            },
        },
        (
            ({"monitor": "val_acc", "max_drop": 0.0}, "`max_drop` must be a finite number above 0"),
            ({"monitor": "val_acc", "max_drop": True}, "`max_drop` must be a finite number above 0"),
            ({"monitor": "val_acc", "max_drop": 0.1, "mode": "auto"}, "`mode` must be 'max' or 'min'"),
            ({"monitor": "val_loss", "max_drop": 0.1}, "`mode` must be 'min' for a loss. Received: mode='max'"),
            ({"monitor": "val_acc", "max_drop": 0.1, "min_samples": 0}, "`min_samples` must be a whole number"),
            ({"monitor": "val_acc", "max_drop": 0.1, "smoothing": 1.0}, r"`smoothing` must lie in \[0, 1\)"),
            ({"monitor": "val_acc", "max_drop": 0.1, "fallback": "int8_static"}, "`fallback` must be 'float' or a"),
            ({"monitor": "val_acc", "max_drop": 0.1, "fallback": "int9"}, "`scheme` must be the name of a scheme"),
        ),
    ),
    Row(
        "report",
        lambda: CompressionReport(directory="report", picture=False, max_seconds=0.1),
        {
            "class_path": "lightning_compress.CompressionReport",
            "init_args": {"directory": "report", "picture": False, "max_seconds": 0.1},
        },
    ),
    Row(
        "export",
        lambda: ExportModel("model.pt2", verify=False),
        {
            "class_path": "lightning_compress.ExportModel",
            "init_args": {
                "path": "out/model.onnx",
                "target": "onnxruntime",
                "test": False,
                "module": "",
                "dynamic": {"x": [0]},
                "calibration_batches": 2,
            },
        },
        (
            ({"path": "model.tflite"}, "`path` must end in .onnx"),
            ({"path": "model.onnx", "target": "openvinoo"}, "`target` must be one of .*Nearest: openvino"),
            ({"path": "model.pte", "target": "openvino"}, "`path` must end in .onnx for target='openvino'"),
            ({"path": "model.onnx", "calibration_batches": 0}, "`calibration_batches` must be at least 1"),
        ),
    ),
)
