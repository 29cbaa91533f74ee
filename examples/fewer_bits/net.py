"""Defines the data and the network of these examples: a classifier of handwritten digits."""

from __future__ import annotations

import logging
import warnings

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")


class Digits(L.LightningDataModule):
    """1400 digits to train on, 397 to test on; `turned` gives each a quarter turn."""

    def __init__(self, turned: bool = False) -> None:
        super().__init__()
        self.turned = turned

    def setup(self, stage: str) -> None:
        x, y = load_digits(return_X_y=True)
        if self.turned:
            x = x.reshape(-1, 8, 8).transpose(0, 2, 1).reshape(-1, 64).copy()
        everything = TensorDataset(torch.tensor(x / 16).float(), torch.tensor(y))
        split = torch.Generator().manual_seed(0)
        self.train, self.held_out = torch.utils.data.random_split(everything, [1400, 397], split)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.train, batch_size=64, shuffle=True)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.held_out, batch_size=397)


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU())
        self.head = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        logits = self(batch[0])
        self.log("accuracy", (logits.argmax(1) == batch[1]).float().mean())
        self.log("loss", nn.functional.cross_entropy(logits, batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


def trainer(*callbacks: L.Callback, epochs: int = 1) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=list(callbacks), enable_model_summary=False, **quiet
    )
