"""Integers beside outputs that aren't of classes are no classes: nothing is said of accuracy, and nothing logged."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import Distillation, FeatureMSE, LogitMSE, SoftTarget
from lightning_compress.distillation import DistillationModule
from lightning_compress.distillation.losses.base import DistillationLoss
from tests.distillation.nets import trainer

DATA = TensorDataset(
    torch.rand(64, 12, generator=torch.Generator().manual_seed(0)),
    torch.randint(10, (64,), generator=torch.Generator().manual_seed(1)),
)


class AutoEncoder(L.LightningModule):
    """It ignores the labels of its batches."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, width), nn.ReLU(), nn.Linear(width, 12))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0]), batch[0])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters())


class OwnTask(DistillationModule):
    def compute_terms(self, batch: Any) -> Any:
        self.inputs = batch[0]
        return super().compute_terms(batch)

    def compute_task_loss(self, outputs: Tensor, targets: Any) -> Tensor:
        return (outputs - outputs.detach().mean()).square().mean()


def fitted(losses: list[DistillationLoss], kind: str) -> dict[str, float]:
    loader, width = DataLoader(DATA, 16), 8
    if kind == "callback":
        fit, module = trainer(callbacks=[Distillation(AutoEncoder(width), losses)]), AutoEncoder()
    else:
        weight = 0.0 if kind == "no task" else 0.5
        module = OwnTask(AutoEncoder().net, AutoEncoder(width).net, losses=losses, task_weight=weight)
        fit = trainer()
    fit.fit(module, loader, loader)
    return dict(fit.callback_metrics)


@pytest.mark.parametrize("kind", ["callback", "no task", "task of one's own"])
def test_a_loss_that_isnt_of_classes_says_nothing_of_them(kind: str) -> None:
    # Warnings are errors here: that the teacher is near chance would be one.
    logged = fitted([LogitMSE(), FeatureMSE(":output", ":output")], kind)
    assert not {"val_agreement", "val_kl", "val_acc"} & set(logged) and "train_logit_mse" in logged


def test_beside_a_loss_of_classes_they_are_compared() -> None:
    with pytest.warns(UserWarning, match="near chance"):
        logged = fitted([LogitMSE(), SoftTarget()], "callback")
    assert {"val_agreement", "val_kl"} <= set(logged)
