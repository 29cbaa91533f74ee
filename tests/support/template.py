"""A module in the way of the most used template: the network, the optimizer and more are its hyperparameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn


class Net(nn.Module):
    """Layers in a container of its own, which no callback of ours sees as such."""

    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, hidden), nn.BatchNorm1d(hidden), nn.ReLU())
        self.head = nn.Linear(hidden, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Encoder:
    """Knows labels; a class of the project, as those of pytorch-forecasting are."""

    def __init__(self) -> None:
        self.classes = {"a": 0, "b": 1}


@dataclass
class Settings:
    width: int = 3


def scaled(x: Tensor) -> Tensor:
    """A function among the hyperparameters."""
    return x


SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


class LitTemplate(L.LightningModule):
    """Its hyperparameters hold the network itself."""

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[..., torch.optim.Optimizer] = SGD,
        loss: nn.Module | None = None,
        parts: Any = None,
        encoder: Any = None,
        settings: Any = None,
        kind: type = Encoder,
        transform: Callable[[Tensor], Tensor] = scaled,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = net
        self.loss = loss or nn.CrossEntropyLoss()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.hparams.transform(x))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.loss(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.hparams.optimizer(params=self.parameters())


def lit_template() -> LitTemplate:
    """With all that such projects put there; several hold the network's own layers."""
    net = Net()
    parts = {"body": net.body, "layers": [net.head, (net.body[0],)]}
    return LitTemplate(net, loss=nn.CrossEntropyLoss(), parts=parts, encoder=Encoder(), settings=Settings())
