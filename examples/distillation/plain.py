"""Trains without a teacher, which is what distillation has to beat, for the examples of this folder."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional

warnings.filterwarnings("ignore", ".*(does not have many workers|logging interval)")  # hints for larger fits
torch.set_num_threads(1)  # these networks are too small to share


class Alone(L.LightningModule):
    """An ordinary LightningModule: a network, a loss and an optimizer."""

    def __init__(self, network: nn.Module, loss: Callable[..., Tensor] = functional.cross_entropy) -> None:
        super().__init__()
        self.network = network
        self.loss = loss

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        return self.loss(self(inputs), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def fit(module: L.LightningModule, batches: Any, epochs: int, *callbacks: L.Callback) -> None:
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, batches)
    module.eval()
