"""Training for int8 begins as calibration does, with equalized weights, where that is asked for.

And if nothing holds weights of the old scale.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_compress import (
    Distillation,
    EMATeacher,
    LogitMSE,
    QuantizationAwareTraining,
    StaticInt8,
    Window,
    quantize,
)
from tests.support.modules import quiet_trainer
from tests.support.oracles import assert_same_state, snapshot


class Uneven(L.LightningModule):
    """Its channels have ranges from 0.1 to 10 between two layers. It trains at a rate of zero."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(1, 16, 3), nn.Conv2d(16, 4, 3)
        self.net = nn.Sequential(self.first, nn.ReLU(), self.second, nn.Flatten())
        scales = torch.logspace(-1, 1, 16)
        with torch.no_grad():
            self.first.weight *= scales.view(-1, 1, 1, 1)
            self.first.bias *= scales
            self.second.weight /= scales.view(1, -1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch).square().mean()

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(1)), 16)  # type: ignore[arg-type]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.0)


X = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(2))


def error(model: nn.Module, expected: Tensor) -> float:
    with torch.no_grad():
        return float((model.eval()(X) - expected).norm() / expected.norm())


MOVES = StaticInt8(equalize=True, smooth=True)


def fit(module: Uneven, *others: Any, scheme: StaticInt8 = MOVES, **settings: Any) -> Uneven:
    quiet_trainer(max_epochs=2, callbacks=[*others, QuantizationAwareTraining(scheme, **settings)]).fit(module)
    return module


def test_by_default_the_users_parameters_keep_their_values() -> None:
    module = fit(Uneven(), scheme=StaticInt8(), convert=False)
    assert_same_state(Uneven(), module)


def test_moved_layers_that_are_called_alone_compute_what_they_computed() -> None:
    module, plain = fit(Uneven(), convert=False), Uneven()
    torch.testing.assert_close(module.first(X), plain.first(X), rtol=1e-4, atol=1e-4)
    module = fit(Uneven())
    assert error(module.first, plain.first(X).detach()) < 0.02


def test_training_for_int8_begins_where_calibration_does() -> None:
    module = Uneven()
    with torch.no_grad():
        expected = module(X)
    calibrated = error(quantize(module.net.eval(), calibration=[*module.train_dataloader()]), expected)
    trained, raw = error(fit(Uneven()), expected), error(fit(Uneven(), scheme=StaticInt8()), expected)
    assert trained < 1.5 * calibrated < raw / 2


def test_the_float_function_stays() -> None:
    module = fit(Uneven(), convert=False)
    plain = Uneven()
    with torch.no_grad():
        expected = plain(X)
        plain.load_state_dict({name: value for name, value in module.state_dict().items() if name in snapshot(plain)})
    assert error(plain, expected) < 1e-5
    assert not torch.equal(plain.first.weight, Uneven().first.weight)


def test_layers_keep_their_mean_range_so_that_one_learning_rate_serves_them_as_before() -> None:
    def means(module: Uneven) -> Tensor:
        ranges = module.first.weight.abs().amax((1, 2, 3)), module.second.weight.abs().amax((0, 2, 3))
        return torch.stack([channels.log().mean().exp() for channels in ranges]).detach()

    module = Uneven()
    with torch.no_grad():
        module.second.weight *= 30
    before = means(module)
    fit(module, convert=False)
    torch.testing.assert_close(means(module), before, rtol=1e-3, atol=0)


@pytest.mark.filterwarnings("ignore:.*teacher.*")
@pytest.mark.parametrize(
    ("others", "settings"),
    [
        ((), {"window": Window(0.5)}),
        ((EMAWeightAveraging(decay=0.5),), {}),
        ((Distillation(EMATeacher(), [LogitMSE()]),), {}),
    ],
    ids=["momenta", "an average", "a mean teacher"],
)
def test_weights_keep_their_scale_where_something_holds_them(others: tuple[Any, ...], settings: Any) -> None:
    module = fit(Uneven(), *others, **settings, convert=False)
    torch.testing.assert_close(module.first.weight, Uneven().first.weight, rtol=1e-6, atol=0)


def test_mixed_precision_is_equalized_too() -> None:
    module = Uneven()
    quiet_trainer(
        max_epochs=1, precision="bf16-mixed", callbacks=[QuantizationAwareTraining(MOVES, convert=False)]
    ).fit(module)
    assert not torch.equal(module.first.weight, Uneven().first.weight)


def test_frozen_weights_stay_as_they_are() -> None:
    module = Uneven()
    module.second.requires_grad_(False)
    before = snapshot(module.second)
    fit(module, convert=False)
    assert_same_state(before, snapshot(module.second))
