"""Defaults lose nothing on an ordinary network: an MLP with BatchNorm on digits, at a constant learning rate.

`benchmarks/defaults.md` has many networks and settings; here stands what every change must keep.
"""

from __future__ import annotations

import functools

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import ChannelPruning, QuantizationAwareTraining, ScheduledPruning, plan_removal, prune_
from tests.support.modules import quiet_trainer


def mlp() -> nn.Sequential:
    """Most of its weights and arithmetic stand in the first layer, whose fan-in is the largest."""
    layers: list[nn.Module] = [nn.Upsample(size=28, mode="bilinear"), nn.Flatten()]
    for into, out in ((784, 64), (64, 128), (128, 64)):
        layers += [nn.Linear(into, out), nn.BatchNorm1d(out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 10))


class Digits(L.LightningModule):
    def __init__(self, lr: float) -> None:
        super().__init__()
        self.net, self.lr = mlp(), lr

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return functional.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.lr)


@functools.cache
def accuracy(lr: float, callback: type[Callback] | None = None, **settings: float | str) -> float:
    """Of three epochs from scratch, by the last weights."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images).float().view(-1, 1, 8, 8) / 16, torch.tensor(labels)
    torch.manual_seed(0)
    order, module = torch.randperm(len(x)), Digits(lr)
    train, test = (TensorDataset(x[part], y[part]) for part in (order[:1100], order[1100:]))
    trainer = quiet_trainer(max_epochs=3, callbacks=[callback(**settings)] if callback else [])
    trainer.fit(module, DataLoader(train, 32, shuffle=True, generator=torch.Generator().manual_seed(0)))
    return float(trainer.test(module, DataLoader(test, 697), verbose=False)[0]["accuracy"])


FITS: dict[str, tuple[float, float, type[Callback], dict[str, float]]] = {
    # Statistics that are frozen while weights still move at their full rate cost 7 points here.
    "quantization-aware training": (3e-3, 0.03, QuantizationAwareTraining, {}),
    # Ranked together, the second and third layer went to a tenth before the first lost half: 15 points.
    "channels": (3e-3, 0.05, ChannelPruning, {"macs": 0.5}),
    # By magnitude, the first layer had nothing left: 80 points.
    "zeros": (1e-3, 0.03, ScheduledPruning, {"sparsity": 0.9}),
}


@pytest.mark.parametrize("name", FITS)
def test_defaults_end_where_plain_training_ends(name: str) -> None:
    lr, most, callback, settings = FITS[name]
    assert accuracy(lr, callback, **settings) > accuracy(lr) - most


@pytest.mark.parametrize("macs", [0.5, 0.25])
def test_ranked_together_no_layer_keeps_less_than_its_floor(macs: float) -> None:
    torch.manual_seed(0)
    network, x = mlp().eval(), torch.rand(4, 1, 8, 8)
    with torch.no_grad():  # scores that spread less where the fan-in is larger, as they do in training
        for layer, spread in ((network[2], 0.01), (network[5], 3.0), (network[8], 3.0)):
            layer.weight *= 1 + spread * torch.rand(len(layer.weight), 1)
    even = plan_removal(network, x, macs=macs, scope="layer", round_to=1)
    share = {row.layers: row.after for row in even.rows}
    plan = plan_removal(network, x, macs=macs)
    assert all(row.after >= 0.75 * share[row.layers] - 1 for row in plan.rows), str(plan)


def test_a_global_budget_never_takes_a_layer_below_its_floor() -> None:
    torch.manual_seed(0)
    plan = plan_removal(mlp().eval(), torch.rand(4, 1, 8, 8), macs=0.5, scope="global", min_layer_channels=0.4)
    assert all(row.after >= 0.4 * row.before for row in plan.rows), str(plan)
    assert not plan.missed


def test_no_layer_is_emptied_for_its_fan_in() -> None:
    torch.manual_seed(0)  # torch draws weights from ±1/sqrt(fan-in): those of the last are the smallest
    network = nn.Sequential(nn.Conv2d(32, 32, 3, groups=32), nn.Conv2d(32, 96, 1), nn.Conv2d(96, 32, 1))
    masks = prune_(network, 0.8)
    assert all(mask.float().mean() > 0.1 for mask in masks.values())
