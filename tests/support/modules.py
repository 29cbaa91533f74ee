"""LightningModules for the tests, deterministic, and a Trainer that keeps quiet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.support.zoo import Inputs, Row


def quiet_trainer(**kwargs: Any) -> L.Trainer:
    """A CPU Trainer that writes and prints nothing; `kwargs` override."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return L.Trainer(**{"accelerator": "cpu", "devices": 1, "max_epochs": 1, **quiet, **kwargs})


def float_leaves(output: Any) -> Iterator[Tensor]:
    """Every floating-point tensor in a tree of tuples, lists, dicts and dataclasses."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from float_leaves(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from float_leaves(value)
    elif is_dataclass(output):
        yield from float_leaves(vars(output))


class ZooModule(L.LightningModule):
    """Trains any row of the zoo: every float output is pulled towards one."""

    def __init__(self, row: Row) -> None:
        super().__init__()
        self.row = row
        self.net = row.build()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.net(*args, **kwargs)

    def step(self, batch: Inputs) -> Tensor:
        args, kwargs = batch
        return sum((leaf - 1).square().mean() for leaf in float_leaves(self(*args, **kwargs)))

    def training_step(self, batch: Inputs, batch_idx: int) -> Tensor:
        return self.step(batch)

    def validation_step(self, batch: Inputs, batch_idx: int) -> None:
        self.log("val_loss", self.step(batch), batch_size=4)

    def test_step(self, batch: Inputs, batch_idx: int) -> None:
        self.log("test_loss", self.step(batch), batch_size=4)

    def loader(self, batches: int = 4, first_seed: int = 0) -> DataLoader[Inputs]:
        """A loader of whole batches, (args, kwargs) each."""
        return DataLoader([self.row.inputs(first_seed + i) for i in range(batches)], batch_size=None)

    def train_dataloader(self) -> DataLoader[Inputs]:
        return self.loader()

    def val_dataloader(self) -> DataLoader[Inputs]:
        return self.loader(batches=2, first_seed=100)

    def test_dataloader(self) -> DataLoader[Inputs]:
        return self.loader(batches=2, first_seed=200)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Classifier(L.LightningModule):
    """Layers directly on the LightningModule, for (x, y) batches of `TinyData` or `DigitsData`."""

    def __init__(self, features: int = 16, hidden: int = 32, classes: int = 4, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.flatten = nn.Flatten()
        self.body = nn.Linear(features, hidden)
        self.norm = nn.BatchNorm1d(hidden)
        self.head = nn.Linear(hidden, classes)
        self.lr = lr

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(self.flatten(x))).relu())

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        x, y = batch
        logits = self(x)
        self.log(f"{stage}_loss", F.cross_entropy(logits, y), batch_size=len(x))
        self.log(f"{stage}_acc", (logits.argmax(-1) == y).float().mean(), batch_size=len(x))

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "test")

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class ManualClassifier(Classifier):
    """Manual optimization with two optimizers, which step in turn in every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        body = [*self.body.parameters(), *self.norm.parameters()]
        return [torch.optim.SGD(body, lr=self.lr, momentum=0.9), torch.optim.Adam(self.head.parameters(), lr=0.01)]


class KeywordClassifier(L.LightningModule):
    """`forward` takes keywords, and batches are dicts with a key that `forward` doesn't know."""

    def __init__(self, vocabulary: int = 20, classes: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 16)
        self.body = nn.Linear(16, 32)
        self.head = nn.Linear(32, classes)

    def forward(self, ids: Tensor, mask: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        x = self.body(self.embedding(ids)).relu()
        x = x.mean(1) if mask is None else (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return self.head(x) * scale

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(ids=batch["ids"], mask=batch["mask"]), batch["label"])

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx), batch_size=len(batch["ids"]))

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.training_step(batch, batch_idx), batch_size=len(batch["ids"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
