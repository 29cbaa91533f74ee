"""What the golden checkpoints are of: a network and what was done to it, by public names alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from torch import Tensor, nn

from lightning_compress import (
    GPTQ,
    NF4,
    ChannelPruning,
    Distillation,
    DistillationModule,
    DynamicInt8,
    EMATeacher,
    FeatureMSE,
    PostTrainingQuantization,
    QLoRA,
    QuantizationAwareTraining,
    Ramp,
    Rewind,
    ScheduledPruning,
    SoftTarget,
    StaticInt8,
    Steps,
    Targets,
    WeightOnly,
    Window,
    plan_removal,
    quantize,
    remove_channels_,
)
from tests.golden.networks import NETWORKS, Classifier, calibration, inputs, pattern

FOLDER = Path(__file__).parent
INT8 = StaticInt8(reduce_range=True)
"""Weights of 7 bits: the files are right on every CPU, and no warning depends on it."""


@dataclass(frozen=True)
class Case:
    """One golden checkpoint.

    Args:
        name: of its file, and of its entry in `expected.json`.
        kind: of the network.
        build: the float model, as its constructor makes it.
        callbacks: of the fit that wrote the file; None where `save_compressed` did.
        compress: what was done to a model without a Trainer.
        resumes: whether the file is of the middle of a fit, which may go on from it.
        rounded: whether the outputs are rounded to int8. One rounding may come out otherwise on another CPU.
        flag: `weights_only` for a file of the middle of the fit, without what a fit goes on from; `tested` for one of
            PostTrainingQuantization.
    """

    name: str
    kind: str
    build: Callable[[], Any]
    callbacks: Callable[[], Sequence[Callback]] | None = None
    compress: Callable[[nn.Module], nn.Module] | None = None
    resumes: bool = False
    rounded: bool = False
    flag: str = ""

    def __str__(self) -> str:
        return self.name

    @property
    def path(self) -> str:
        return str(FOLDER / f"{self.name}.ckpt")

    def outputs(self, model: nn.Module) -> Tensor:
        """What a model gives in evaluation."""
        with torch.no_grad():
            output: Tensor = model.eval()(inputs(self.kind))
        return output


def fitted(name: str, kind: str, callbacks: Callable[[], Sequence[Callback]], **options: Any) -> Case:
    """A case of a fit of the classifier."""
    return Case(name, kind, lambda: Classifier(kind), callbacks, **{"resumes": True, **options})


def plain(name: str, kind: str, compress: Callable[[nn.Module], nn.Module], **options: Any) -> Case:
    """A case of a network without a Trainer."""
    return Case(name, kind, NETWORKS[kind], compress=compress, **options)


def steps(start: int, end: int) -> Window:
    """A window in optimizer steps: an epoch has six."""
    return Window(start, end, unit="step")


def qat(start: int = 2) -> QuantizationAwareTraining:
    return QuantizationAwareTraining(INT8, window=steps(start, 12))


def channels(start: int = 2, end: int = 9) -> ChannelPruning:
    """Half of the way leaves at once, the rest at the end, which is in the second epoch."""
    schedule = Steps([0.0, 1.0], [0.5, 1.0])
    return ChannelPruning(channels=0.5, round_to=1, schedule=schedule, calibration_batches=0, window=steps(start, end))


def teacher() -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 10), nn.ReLU(), nn.Linear(10, 4))
    for parameter in net.parameters():  # the same bits everywhere: the file holds their fingerprint
        parameter.data.copy_(pattern(*parameter.shape))
    return net


def distillation_module() -> DistillationModule:
    return DistillationModule(
        student=NETWORKS["images"](),
        teacher=teacher(),
        losses=[SoftTarget(temperature=2.0), FeatureMSE("body", "1")],
        optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        ramps=[Ramp("soft_target", "temperature", 4.0, window=steps(2, 10))],
    )


def narrowed_(model: nn.Module) -> nn.Module:
    """Without Trainer: heads, the widths of LSTM and feed-forward block, or channels."""
    kind = "images" if "conv" in dict(model.named_children()) else "sequences"
    plan = plan_removal(model, (inputs(kind),), channels=0.5, round_to=1)
    remove_channels_(model, plan)
    return model


def quantized(scheme: Any, kind: str, **options: Any) -> Callable[[nn.Module], nn.Module]:
    return lambda model: quantize(model.eval(), scheme, calibration(kind), **options)


MIXED = {
    "words": WeightOnly(bits=4, group_size=4),
    "attention": NF4(block_size=4),
    "up": GPTQ(bits=4, group_size=4),
    "head": WeightOnly(bits=3, group_size=4, symmetric=False),
}

CASES = (
    fitted("masked", "images", lambda: [ScheduledPruning("taylor", 0.7, window=steps(2, 11), regrow=True)]),
    fitted(
        "masked_rewound",
        "images",
        lambda: [
            ScheduledPruning(
                "ln_structured",
                0.5,
                scope="layer",
                schedule=Steps([0.0, 1.0], [0.5, 1.0]),
                window=steps(3, 10),
                rewind=Rewind(2, unit="step"),
                targets=Targets(include=["net.conv", "net.deep", "net.body"]),
            )
        ],
    ),
    fitted(
        "masked_weights_only",
        "images",
        lambda: [ScheduledPruning(sparsity=0.6, window=steps(1, 11))],
        resumes=False,
        flag="weights_only",
    ),
    fitted("prepared", "images", lambda: [qat()], rounded=True),
    fitted(
        "prepared_few_bits",
        "images",
        lambda: [QuantizationAwareTraining(WeightOnly(bits=4, group_size=4))],
        rounded=True,
    ),
    fitted("converted", "images", lambda: [qat()], resumes=False, rounded=True),
    fitted(
        "converted_tested",
        "images",
        lambda: [PostTrainingQuantization(INT8, keep=True, overrides={"net.head": "int8_weight_only"})],
        resumes=False,
        rounded=True,
        flag="tested",
    ),
    plain(
        "dynamic",
        "sequences",
        quantized(
            DynamicInt8(reduce_range=True),
            "sequences",
            overrides={"head": DynamicInt8(per_token=True, reduce_range=True)},
        ),
        rounded=True,
    ),
    plain("packed", "sequences", quantized(WeightOnly(bits=8), "sequences", overrides=MIXED)),
    fitted("adapted", "sequences", lambda: [QLoRA(rank=2, modules_to_train=["net.head"])]),
    fitted("narrowed", "images", lambda: [channels()]),
    fitted("narrowed_converted", "images", lambda: [channels(1, 4), qat(5)], resumes=False, rounded=True),
    fitted("averaged", "images", lambda: [qat(), EMAWeightAveraging(decay=0.8)], rounded=True),
    fitted(
        "averaged_narrowed",
        "images",
        lambda: [channels(), ScheduledPruning(sparsity=0.6, window=steps(1, 11)), EMAWeightAveraging(decay=0.8)],
    ),
    fitted("averaged_adapted", "sequences", lambda: [QLoRA(rank=2), EMAWeightAveraging(decay=0.8)]),
    Case("distilled", "images", distillation_module, lambda: [], resumes=True),
    fitted("taught_by_average", "images", lambda: [Distillation(EMATeacher(0.8), [SoftTarget()], task_weight=0.5)]),
    plain(
        "saved_quantized",
        "images",
        quantized(INT8, "images", overrides={"head": DynamicInt8(reduce_range=True)}),
        rounded=True,
    ),
    plain("saved_narrowed", "sequences", narrowed_),
    plain(
        "saved_narrowed_quantized", "images", lambda model: quantized(INT8, "images")(narrowed_(model)), rounded=True
    ),
)


def quiet_trainer(callbacks: Sequence[Callback], epochs: int = 2) -> pl.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return pl.Trainer(accelerator="cpu", devices=1, max_epochs=epochs, callbacks=list(callbacks), **quiet)


def facts(module: nn.Module, callbacks: Sequence[Any]) -> dict[str, Any]:
    """What can be counted of a fit: steps and sparsity of callbacks, shapes of parameters, and zeros in them."""
    parameters = list(module.parameters())
    return {
        "steps": {type(one).__name__: one.state_dict()["step"] for one in callbacks if "step" in one.state_dict()},
        "pruned": [
            sum(int((~mask).sum()) for mask in one.masks.values()) for one in callbacks if hasattr(one, "masks")
        ],
        "shapes": sorted(list(parameter.shape) for parameter in parameters),
        "zeros": sum(int((parameter == 0).sum()) for parameter in parameters),
    }
