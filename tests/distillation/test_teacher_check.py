"""What the first batch says of a teacher; integers beside outputs that aren't of classes are no classes."""

from __future__ import annotations

import copy
import logging
import math
import warnings
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import FeatureMSE, LogitMSE, SoftTarget
from lightning_compress.distillation import Distillation, DistillationModule, EMATeacher
from lightning_compress.distillation.losses.base import DistillationLoss
from tests.distillation.nets import ConvNet, dataset, loader, soft_only, trainer
from tests.distillation.own import WAYS, Own, build

pytestmark = pytest.mark.filterwarnings(
    # The module can validate; these runs have nothing to validate on.
    "ignore:You defined a `validation_step` but have no:UserWarning",
    "ignore:The dirpath has changed",
    "ignore:Be aware that when using `ckpt_path`",
)


class Oracle(nn.Module):
    """Knows the classes of `nets.dataset`, with a chosen number of mistakes and confidence."""

    def __init__(self, wrong: int = 0, scale: float = 5.0) -> None:
        super().__init__()
        self.wrong, self.scale, self.weight = wrong, scale, nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        classes = (x.mean((1, 2, 3)) * 40).long().clamp(-2, 1) + 2
        shift = (torch.arange(len(x)) < self.wrong).long()
        return F.one_hot((classes + shift) % 4, 4).float() * self.scale + 0 * self.weight


def start(way: str, teacher: nn.Module, student: nn.Module | None = None, val: bool = False) -> None:
    module, callbacks = build(way, teacher)
    if student is not None:
        setattr(module, "student" if way == "module" else "net", student)
    fit = trainer(callbacks=callbacks, limit_train_batches=1, limit_val_batches=int(val))
    fit.fit(module, DataLoader(dataset(), batch_size=20), loader() if val else None)


@WAYS
def test_a_good_teacher_is_described_and_not_warned_of(way: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*[Tt]eacher.*")
        start(way, Oracle(wrong=2))
    (text,) = (record.getMessage() for record in caplog.records if "teacher on the first" in record.getMessage())
    p = math.exp(5.0) / (math.exp(5.0) + 3)
    q = (1 - p) / 3
    entropy = -(p * math.log(p) + 3 * q * math.log(q))
    assert "teacher on the first 20 predictions: accuracy 0.900" in text
    assert f"entropy {entropy:.3f} of at most 1.386 nats" in text


@WAYS
def test_a_teacher_near_chance_or_behind_is_warned_of(way: str) -> None:
    with pytest.warns(UserWarning, match="accuracy is near chance: 0.000 on 20 predictions.*`teacher_adapter`"):
        start(way, Oracle(wrong=20))
    with pytest.warns(UserWarning, match="behind the student: accuracy 0.600 against 1.000"):
        start(way, Oracle(wrong=8), student=Oracle())


@WAYS
def test_an_average_is_never_told_that_it_is_near_chance(way: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*[Tt]eacher.*")
        start(way, EMATeacher(0.9))


@WAYS
def test_regression_has_no_chance(way: str) -> None:
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
    student = copy.deepcopy(teacher)
    rows = [(x, torch.zeros(1)) for x, _ in dataset()]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*[Tt]eacher.*")
        losses = [FeatureMSE("1", "1")]
        if way == "module":
            module: Any = DistillationModule(student, teacher, losses, task_loss=nn.MSELoss())
            trainer().fit(module, DataLoader(rows, batch_size=8))
            return

        class Regression(Own):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                return F.mse_loss(self(batch[0]), batch[1])

        callback = Distillation(teacher, losses, student="net")
        trainer(callbacks=[callback]).fit(Regression(student), DataLoader(rows, batch_size=8))


def test_a_teacher_of_probabilities_is_told() -> None:
    module = soft_only(teacher=nn.Sequential(ConvNet(8), nn.Softmax(-1)))
    with pytest.warns(UserWarning, match="puts out probabilities, where logits are compared"):
        trainer().fit(module, loader())


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
