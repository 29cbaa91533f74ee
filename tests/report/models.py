"""Models and a Lightning module for the report's tests, and the torch.ao conversion that stands in for quantization."""

from __future__ import annotations

import warnings

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class ConvNet(nn.Module):
    """A convolution, a depthwise one and a linear layer, with BatchNorm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(8, 4)

    def forward(self, image: Tensor) -> Tensor:
        features = self.depthwise(torch.relu(self.norm(self.conv(image))))
        return self.head(self.dropout(features.mean((2, 3))))


# On 3x8x8: 8 maps of 8x8 with 3*9 products, 8 maps of 6x6 with 9, and the head.
CONV_NET_MACS = 8 * 64 * 27 + 8 * 36 * 9 + 8 * 4
CONV_NET_PARAMETERS = (8 * 27 + 8) + (8 + 8) + (8 * 9 + 8) + (8 * 4 + 4)


def int8(model: nn.Module, example: Tensor) -> nn.Module:
    """Convert with torch's own FX flow."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = prepare_fx(model.eval(), get_default_qconfig_mapping("x86"), (example,))
        prepared(example)
        return convert_fx(prepared)


def images(count: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, 3, 8, 8, generator=generator), torch.randint(0, 4, (count,), generator=generator)


class Classifier(L.LightningModule):
    """Trains `ConvNet`; ``converted`` takes the network's place when a callback sets it."""

    def __init__(self, *, example: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net: nn.Module = ConvNet()
        if example:
            self.example_input_array = torch.zeros(2, 3, 8, 8)

    def forward(self, image: Tensor) -> Tensor:
        return self.net(image)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)

    def loader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(*images()), batch_size=8)

    train_dataloader = val_dataloader = test_dataloader = loader
