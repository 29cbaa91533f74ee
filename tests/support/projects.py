"""Small modules of the kinds that public Lightning projects are: each brings its loaders and trains in a second."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytorch_lightning as older
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Accuracy, MeanMetric, MetricCollection

from tests.support.template import Encoder, Net


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def choose(below: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


class Loaders:
    """The same 32 samples for every stage, in batches of 8."""

    samples: Callable[[], Any]

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(type(self).samples(), batch_size=8)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class Steps(Loaders):
    """The steps of a module with one loss."""

    log: Callable[..., None]
    loss: Callable[[Any], Tensor]
    parameters: Callable[[], Any]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=8)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch), batch_size=8)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class HyperparametersModule(Steps, pl.LightningModule):
    """Takes its network, optimizer and an encoder from a configuration, and saves them as hyperparameters."""

    def __init__(self, net: nn.Module, optimizer: Callable[..., torch.optim.Optimizer], encoder: Encoder) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = net

    @staticmethod
    def samples() -> Any:
        return TensorDataset(draw(32, 16), choose(4, 32))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.hparams.optimizer(params=self.parameters())


class GAN(Loaders, pl.LightningModule):
    """Manual optimization with two optimizers; LeakyReLU in both networks."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.Linear(8, 32), nn.BatchNorm1d(32), nn.LeakyReLU(0.2), nn.Linear(32, 16), nn.Tanh()
        )
        self.discriminator = nn.Sequential(nn.Linear(16, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))

    @staticmethod
    def samples() -> Any:
        return TensorDataset(draw(32, 16).tanh(), choose(4, 32))

    def forward(self, z: Tensor) -> Tensor:
        return self.generator(z)

    def noise(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return batch[0][:, :8]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        for_generator, for_discriminator = self.optimizers()
        real, ones = batch[0], torch.ones(len(batch[0]), 1)
        self.toggle_optimizer(for_generator)
        loss = F.binary_cross_entropy_with_logits(self.discriminator(self(self.noise(batch))), ones)
        for_generator.zero_grad()
        self.manual_backward(loss)
        for_generator.step()
        self.untoggle_optimizer(for_generator)
        self.toggle_optimizer(for_discriminator)
        fake = self.discriminator(self(self.noise(batch)).detach())
        loss = F.binary_cross_entropy_with_logits(self.discriminator(real), ones)
        loss = loss + F.binary_cross_entropy_with_logits(fake, torch.zeros_like(ones))
        for_discriminator.zero_grad()
        self.manual_backward(loss)
        for_discriminator.step()
        self.untoggle_optimizer(for_discriminator)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.discriminator(self(self.noise(batch))).mean(), batch_size=8)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.discriminator(self(self.noise(batch))).mean(), batch_size=8)

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[Any]]:
        betas = (0.5, 0.999)
        networks = (self.generator, self.discriminator)
        return [torch.optim.Adam(one.parameters(), lr=1e-3, betas=betas) for one in networks], []


def twice(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class UNet(Steps, pl.LightningModule):
    """Transposed convolutions upwards, beside skip connections."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([twice(1, 4), twice(4, 8), twice(8, 16)])
        self.up = nn.ModuleList([nn.ConvTranspose2d(16, 8, 2, stride=2), nn.ConvTranspose2d(8, 4, 2, stride=2)])
        self.merge = nn.ModuleList([twice(16, 8), twice(8, 4)])
        self.last = nn.Conv2d(4, 3, 1)

    @staticmethod
    def samples() -> Any:
        return TensorDataset(draw(32, 1, 8, 8), choose(3, 32, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for index, block in enumerate(self.down):
            x = block(x if index == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        for up, merge, skip in zip(self.up, self.merge, skips[-2::-1], strict=True):
            x = merge(torch.cat([skip, up(x)], 1))
        return self.last(x)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


class Pair(NamedTuple):
    """A batch of a translation."""

    source: Tensor
    target: Tensor


class SequenceToSequence(Steps, pl.LightningModule):
    """An encoder and a decoder that is fed the target; batches are named tuples."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 16)
        self.encoder = nn.GRU(16, 24, batch_first=True)
        self.decoder = nn.GRU(16, 24, batch_first=True)
        self.head = nn.Linear(24, 12)

    @staticmethod
    def samples() -> Any:
        pairs = zip(choose(12, 32, 6), choose(12, 32, 5, seed=1), strict=True)
        return [Pair(*pair) for pair in pairs]

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        _, state = self.encoder(self.embedding(source))
        return self.head(self.decoder(self.embedding(target), state)[0])

    def loss(self, batch: Pair) -> Tensor:
        logits = self(batch.source, batch.target[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch.target[:, 1:].flatten())


class LengthsLSTM(nn.LSTM):
    """Takes lengths, as that of pytorch-forecasting does."""

    def forward(
        self, x: Tensor, hx: tuple[Tensor, Tensor] | None = None, lengths: Tensor | None = None, sort: bool = True
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return super().forward(x, hx)


class Forecast(NamedTuple):
    """What a forecasting network gives."""

    prediction: Tensor


class Forecasting(Steps, pl.LightningModule):
    """A dict in, a named tuple out, and a recurrent layer of its own between."""

    def __init__(self) -> None:
        super().__init__()
        self.prepare = nn.Linear(3, 16)
        self.rnn = LengthsLSTM(16, 16, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 2)

    @staticmethod
    def samples() -> Any:
        x, y = draw(32, 6, 3), draw(32, 6, 2, seed=1)
        return [({"history": x[index], "lengths": torch.tensor(6)}, y[index]) for index in range(32)]

    def forward(self, x: dict[str, Tensor]) -> Forecast:
        hidden, _ = self.rnn(F.elu(self.prepare(x["history"])), lengths=x["lengths"], sort=False)
        return Forecast(self.head(self.norm(hidden)))

    def loss(self, batch: tuple[dict[str, Tensor], Tensor]) -> Tensor:
        return F.mse_loss(self(batch[0]).prediction, batch[1])


class KeywordSpotting(Steps, older.LightningModule):
    """Depthwise and pointwise convolutions over a spectrogram, under the older name of Lightning's package."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1, groups=16),
            nn.Conv2d(16, 24, 1),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.classifier = nn.Linear(24, 5)

    @staticmethod
    def samples() -> Any:
        return TensorDataset(draw(32, 1, 12, 12), choose(5, 32))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


class Autoencoder(Steps, pl.LightningModule):
    """Has no forward: its step flattens the images, and calls encoder and decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
        self.decoder = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 64))

    @staticmethod
    def samples() -> Any:
        return TensorDataset(draw(32, 1, 8, 8), choose(4, 32))

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x = batch[0].view(len(batch[0]), -1)
        return F.mse_loss(self.decoder(self.encoder(x)), x)


class Measured(Steps, pl.LightningModule):
    """Logs metric objects, which are modules with states of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.metrics = nn.ModuleDict({"one": MetricCollection({"acc": Accuracy("multiclass", num_classes=4)})})
        self.mean = MeanMetric()

    @staticmethod
    def samples() -> Any:
        return TensorDataset(draw(32, 16), choose(4, 32))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        logits = self(batch[0])
        self.metrics["one"].update(logits, batch[1])
        loss = F.cross_entropy(logits, batch[1])
        self.mean.update(loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=8)
        self.log_dict(self.metrics["one"])
        self.log("mean", self.mean)


def templated() -> HyperparametersModule:
    return HyperparametersModule(Net(), partial(torch.optim.Adam, lr=1e-2), Encoder())


@dataclass(frozen=True)
class Project:
    """One kind.

    Attributes:
        build: a new module.
        package: Lightning's package that it is written with.
        weights_only: whether a file of it may be opened so.
    """

    build: Callable[[], Any]
    package: ModuleType = pl
    weights_only: bool = True


PROJECTS = {
    "hyperparameters": Project(templated, weights_only=False),
    "GAN": Project(GAN),
    "UNet": Project(UNet),
    "sequence to sequence": Project(SequenceToSequence),
    "forecasting": Project(Forecasting),
    "keyword spotting": Project(KeywordSpotting, older),
    "autoencoder": Project(Autoencoder),
    "metrics": Project(Measured),
}
