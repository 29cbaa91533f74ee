"""Defines a large teacher, a small student, and the plain LightningModule that trains either of them."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional


def conv_bn(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs)]


class Residual(nn.Module):
    """Two convolutions around a connection that skips them."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(*conv_bn(inputs, outputs, stride), nn.ReLU(), *conv_bn(outputs, outputs))
        same = inputs == outputs and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.body(x) + self.skip(x))


class Teacher(nn.Module):
    """Seven residual blocks, 17 convolutions."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(1, width), nn.ReLU())
        self.features = nn.Sequential(
            *(Residual(width, width) for _ in range(2)),
            Residual(width, 2 * width, stride=2),
            *(Residual(2 * width, 2 * width) for _ in range(2)),
            Residual(2 * width, 4 * width, stride=2),
            Residual(4 * width, 4 * width),
        )
        self.head = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(self.stem(x)).mean((2, 3)))


class Student(nn.Module):
    """Three convolutions, each of which becomes one int8 kernel together with its BatchNorm and ReLU."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(*conv_bn(1, width), nn.ReLU()),
            *(*conv_bn(width, 2 * width, stride=2), nn.ReLU()),
            *(*conv_bn(2 * width, 2 * width, stride=2), nn.ReLU()),
        )
        self.head = nn.Linear(2 * width * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(self.features(x), 1))


class Classifier(L.LightningModule):
    """An ordinary LightningModule, which knows nothing of compression."""

    def __init__(self, network: nn.Module, lr: float = 3e-3) -> None:
        super().__init__()
        self.network = network
        self.lr = lr

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return functional.cross_entropy(self(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "test")

    def evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        images, labels = batch
        logits = self(images)
        loss = functional.cross_entropy(logits, labels)
        accuracy = (logits.argmax(1) == labels).float().mean()
        self.log_dict({f"{stage}_loss": loss, f"{stage}_acc": accuracy}, prog_bar=True)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.trainer.max_epochs)
        return {"optimizer": optimizer, "lr_scheduler": schedule}
