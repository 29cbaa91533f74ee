"""Networks for `test_dependents`, and the oracle of silence: what reads a pruned unit may be any number.

The activation after the norms is a tanh: a ReLU would hide shifts below zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

IMAGES = torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(3))
LABELS = torch.arange(16) % 4


def rough(model: nn.Module) -> nn.Module:
    """Every parameter and statistic away from its default, so that none is silent by chance."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.add_(noise.abs() if "running_var" in name else 0.5 * noise)
    return model


def assert_silent(model: nn.Module, gone: Tensor, *readers: Tensor, run: Callable[[nn.Module], Tensor]) -> None:
    """`readers` are weights whose dimension 1 are the units' outputs, True in `gone` where pruned."""
    assert 0 < int(gone.sum()) < len(gone)
    model.eval()
    before = run(model)
    with torch.no_grad():
        for reader in readers:
            reader[:, gone] = 100 * torch.randn(reader[:, gone].shape)
        after = run(model)
        torch.testing.assert_close(before, after, rtol=0, atol=0)
        # So that the comparison can't pass because nobody reads these weights.
        readers[0][:, ~gone] += 1
    assert not torch.equal(before, run(model))


def gone_rows(weight: Tensor, dim: int = 0) -> Tensor:
    return (weight == 0).movedim(dim, 0).flatten(1).all(1)


class Net(L.LightningModule):
    """Trains `self.logits(x)`; not an `nn.Sequential`, so that what follows what is seen by running it only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.next = nn.Conv2d(8, 6, 3)
        self.head = nn.Linear(6, 4)

    def middle(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.next(self.middle(x).tanh()).mean((2, 3)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(IMAGES, LABELS), batch_size=8)


def forward(model: nn.Module) -> Tensor:
    return model(IMAGES)


class InPlace(Net):
    def middle(self, x: Tensor) -> Tensor:
        return nn.functional.relu_(self.bn(self.conv(x)))


class TwoNorms(Net):
    """Two BatchNorms read one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.BatchNorm2d(8)

    def middle(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) - 2 * self.other(y)


class Instance(Net):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.InstanceNorm2d(8, affine=True)  # type: ignore[assignment]


class Grouped(Net):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.deep = nn.Conv2d(8, 8, 3, groups=4, padding=1)

    def middle(self, x: Tensor) -> Tensor:
        return self.bn(self.deep(self.conv(x)))


class InnerSequential(Net):
    """The BatchNorm stands in a Sequential of its own, away from its convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.Sequential(nn.Sequential(nn.BatchNorm2d(8)), nn.ReLU(inplace=True))  # type: ignore[assignment]


class ActivationBetween(Net):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def middle(self, x: Tensor) -> Tensor:
        return self.bn(self.act(self.conv(x)))


class Shared(Net):
    """One BatchNorm over two convolutions: its channel is silent only where both have lost the unit."""

    def __init__(self) -> None:
        super().__init__()
        self.twin = nn.Conv2d(3, 8, 3)

    def middle(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.bn(self.twin(x.flip(1)))


class TiedRows(nn.Module):
    """One weight, two layers, and each has a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.next = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, 0, 0]
        return self.next(self.first(x).tanh()) + self.next(self.second(x.flip(1)).tanh())
