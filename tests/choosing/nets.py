"""A classifier that is right by construction, and whose int8 form is wrong where a layer's channels differ in range."""

from __future__ import annotations

import itertools
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import StaticInt8

PLAIN = StaticInt8(equalize=False, smooth=False)
"""Evens out no ranges."""


class Right(L.LightningModule):
    """Four layers, the outputs of one of which have channels whose ranges differ by 10,000 to one."""

    def __init__(self, outliers: bool = True, width: int = 48) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        sizes = [16, width, width, width, 4]
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(sizes):
            layer = nn.Linear(inputs, outputs)
            layer.weight.data = torch.randn(outputs, inputs, generator=generator) * (2 / inputs) ** 0.5
            layer.bias.data = torch.randn(outputs, generator=generator) * 0.1
            layers += [layer, nn.ReLU()]
        self.net = nn.Sequential(*layers[:-1])
        if outliers:
            scale = torch.logspace(0, 4, width)[torch.randperm(width, generator=generator)]
            self.net[2].weight.data *= scale[:, None]
            self.net[2].bias.data *= scale
            self.net[4].weight.data /= scale

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def evaluate(self, batch: list[Tensor], stage: str) -> None:
        x, y = batch
        self.log(f"{stage}_acc", (self(x).argmax(1) == y).float().mean())
        self.log(f"{stage}_loss", nn.functional.cross_entropy(self(x), y))

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "test")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Labelled(L.LightningDataModule):
    """Samples on which a float `Right` is sure and right."""

    def __init__(self, validation: int = 800, batch_size: int = 50) -> None:
        super().__init__()
        self.batch_size = batch_size
        x = torch.randn(40_000, 16, generator=torch.Generator().manual_seed(4))
        with torch.no_grad():
            top = Right(outliers=False)(x).topk(2, dim=1)
        x = x[(top.values[:, 0] - top.values[:, 1]).sort(descending=True, stable=True).indices[: 3 * 800]]
        x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(5))]
        with torch.no_grad():
            y = Right(outliers=False)(x).argmax(1)
        self.parts = [TensorDataset(*part) for part in zip(x.split(800), y.split(800), strict=True)]
        self.parts[1] = TensorDataset(*self.parts[1][:validation])
        self.read: list[str] = []

    def loader(self, part: int, name: str) -> DataLoader[Any]:
        self.read.append(name)
        return DataLoader(self.parts[part], batch_size=self.batch_size)

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader(0, "train")

    def val_dataloader(self) -> DataLoader[Any]:
        return self.loader(1, "val")

    def test_dataloader(self) -> DataLoader[Any]:
        return self.loader(2, "test")
