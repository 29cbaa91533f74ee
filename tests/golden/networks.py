"""The networks and the data of the golden checkpoints. They never change: the files hold their weights."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


def pattern(*shape: int, start: int = 0) -> Tensor:
    """Numbers in [-1, 1) that look random, and are the same on each CPU and in each version of torch."""
    count = torch.Size(shape).numel()
    numbers = torch.arange(start, start + count)
    return ((numbers * numbers * 37 + numbers * 11) % 509 % 64 / 32.0 - 1.0).reshape(shape)


class Images(nn.Module):
    """Convolutions with BatchNorm, for images of shape (B, 1, 6, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.deep = nn.Conv2d(6, 8, 3)
        self.deep_norm = nn.BatchNorm2d(8)
        self.body = nn.Linear(8 * 4, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        x = self.deep_norm(self.deep(x)).relu()
        return self.head(self.body(x.mean(3).flatten(1)).relu())


class Sequences(nn.Module):
    """An embedding, an LSTM, attention and a feed-forward block, for ids of shape (B, 6)."""

    places: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.register_buffer("places", pattern(6, 8), persistent=False)
        self.rnn = nn.LSTM(8, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 4, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x, _ = self.rnn(self.words(ids) + self.places)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        x = x + self.down(self.up(x).relu())
        return self.head(x.mean(1))


NETWORKS: dict[str, type[nn.Module]] = {"images": Images, "sequences": Sequences}


class Classifier(pl.LightningModule):
    """Trains one of the networks on `loader`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = NETWORKS[kind]()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def inputs(kind: str, samples: int = 4, start: int = 1000) -> Tensor:
    """What a network takes."""
    if kind == "images":
        return pattern(samples, 1, 6, 6, start=start)
    return (pattern(samples, 6, start=start) * 32 + 32).long() % 20


def calibration(kind: str) -> list[Tensor]:
    return list(inputs(kind, 48, start=0).split(8))


def loader(kind: str) -> DataLoader[tuple[Tensor, ...]]:
    """Six batches of eight samples, in the same order each time."""
    return DataLoader(TensorDataset(inputs(kind, 48, start=0), torch.arange(48) % 4), batch_size=8)
