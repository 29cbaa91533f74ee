"""Trains, distils, prunes and quantizes the digits' networks: what several benchmarks have in common."""

from __future__ import annotations

import logging
import sys
import warnings
from functools import partial
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "digits"))  # the examples are no package

from data import Digits
from networks import Classifier, Student, Teacher

from lightning_compress import (
    DistillationModule,
    FeatureMSE,
    QuantizationAwareTraining,
    ScheduledPruning,
    SoftTarget,
)

TEACHER_EPOCHS, STUDENT_EPOCHS = 15, 40


def train_teacher(data: Digits, epochs: int = TEACHER_EPOCHS) -> Classifier:
    model = Classifier(Teacher())
    fit(model, data, epochs)
    return model


def train_alone(data: Digits, epochs: int = STUDENT_EPOCHS) -> Classifier:
    model = Classifier(Student())
    fit(model, data, epochs)
    return model


def distil(
    teacher: nn.Module, data: Digits, epochs: int = STUDENT_EPOCHS, callbacks: tuple[L.Callback, ...] = ()
) -> DistillationModule:
    """Teach a student; pruning and quantization are two more callbacks of the same `fit`."""
    module = DistillationModule(
        student=Student(),
        teacher=teacher,
        task_weight=0.25,
        losses=[
            SoftTarget(temperature=4.0, weight=0.75),
            # 48 channels against 96: a regressor between them is made by itself, and trained along.
            FeatureMSE(student_layer="features", teacher_layer="features", weight=0.25),
        ],
        optimizer=partial(torch.optim.AdamW, lr=3e-3),
        scheduler=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=epochs),
    )
    fit(module, data, epochs, callbacks)
    return module


def compression() -> tuple[L.Callback, ...]:
    """Zero half of the student's weights on a schedule; train it for int8 and convert it when the fit ends."""
    return ScheduledPruning("l1_unstructured", sparsity=0.5), QuantizationAwareTraining()


def fit(
    model: L.LightningModule, data: L.LightningDataModule, epochs: int, callbacks: tuple[L.Callback, ...] = ()
) -> None:
    L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        check_val_every_n_epoch=min(5, epochs),
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_model_summary=False,
        enable_progress_bar=False,
    ).fit(model, data)


def test(model: L.LightningModule, data: L.LightningDataModule) -> dict[str, float]:
    """The metrics of `trainer.test`; of the int8 model, if the module was converted."""
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    return dict(trainer.test(model, data, verbose=False)[0])


def float_form(checkpoint: str | Path) -> Student:
    """The distilled and pruned student before int8, out of a checkpoint that was saved while it was trained.

    It holds the student's own keys, although the student was masked and fake-quantized then: plain torch loads it.
    """
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    student = Student()
    prefix = "student."
    student.load_state_dict({key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)})
    return student


def quiet() -> None:
    """Lightning's hints for beginners and the deprecations between its dependencies aren't about a benchmark."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for module in ("lightning", "torch"):
        warnings.filterwarnings("ignore", module=rf"{module}\.")
