"""What a dry run sees beside calls: a layer with whose weight others compute stays float, and the rest is int8."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import PostTrainingQuantization, QuantizationAwareTraining, quantize
from lightning_compress.modules.call_log import record_calls
from lightning_compress.quantization.convert import record_of
from tests.support.modules import quiet_trainer


class Asks(nn.Module):
    """Asks a layer for its type before it calls it, as many language models do, in code that can't be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.isnan().any():
            raise ValueError("control flow")
        return self.second(self.first(x.to(self.first.weight.dtype)).relu())


class Reader(nn.Module):
    """Computes with a layer's weight beside the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu()) * self.first.weight.mean()


class Deep(nn.Module):
    """Reads a weight of a block that could be traced as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.second = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.block(x)) * torch.linalg.norm(self.block[0].weight)


class Regularized(nn.Module):
    """Reads its weights while it trains, for a penalty."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.penalty = nn.Linear(8, 8), nn.Linear(8, 4), torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.penalty = self.first.weight.square().sum()
        return self.second(self.first(x).relu())


class Module(L.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        penalty = sum(module.weight.abs().sum() for module in self.modules() if isinstance(module, nn.Linear))
        return F.cross_entropy(self.net(batch[0]), batch[1]) + 1e-4 * penalty

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.randn(16, 8), torch.randint(4, (16,))), 8)

    test_dataloader = calibration_dataloader = train_dataloader


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize(
    ("net", "float_layers", "units"),
    [
        (Asks, {}, ["net.first", "net.second"]),
        (Reader, {"net.first": "no static int8 kernel for this Linear as it is used here"}, ["net"]),
        (Deep, {"net.block.0": "no static int8 kernel for this Linear as it is used here"}, ["net"]),
        (Regularized, {}, ["net"]),
    ],
)
def test_a_layer_whose_weight_is_read_stays_float_and_the_rest_is_int8(
    net: Any, float_layers: dict[str, str], units: list[str], trains: bool
) -> None:
    module = Module(net())
    callback = QuantizationAwareTraining() if trains else PostTrainingQuantization(keep=True)
    trainer = quiet_trainer(callbacks=[callback])
    if trains:
        trainer.fit(module)
    trainer.test(module, verbose=False)
    record = record_of(module)
    assert record is not None
    assert [unit["path"] for unit in record["units"]] == units
    layers = {path: reason for path, reason in record["floats"].items() if "not as a whole" not in reason}
    assert layers == float_layers


def test_torchs_own_transformer_reads_weights_for_a_path_that_is_switched_off() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).eval()
    int8 = quantize(nn.Sequential(layer, nn.Linear(16, 4)), calibration=[torch.randn(4, 5, 16)])
    record = record_of(int8)
    assert record is not None
    assert "read" not in " ".join(record["floats"].values()) and int8(torch.randn(2, 5, 16)).shape == (2, 5, 4)


def test_a_dry_run_leaves_parameters_as_they_are_even_after_an_error() -> None:
    model = Reader()
    before = {path: module._parameters for path, module in model.named_modules()}
    log = record_calls(model.eval(), lambda: model(torch.ones(2, 8)))
    assert log.readers == {"first": {""}}
    with pytest.raises(ZeroDivisionError):
        record_calls(model, lambda: 1 / 0)
    assert all(module._parameters is before[path] for path, module in model.named_modules())


class Traces(nn.Module):
    """Has its part traced when it is first called, as a quantized unit that was copied does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 2), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.export.export(self.inner, (x,)).module()(x)


def test_a_module_that_is_traced_within_the_run_is_no_reader() -> None:
    model, x = Traces().eval(), torch.ones(1, 2)
    with torch.no_grad():
        log = record_calls(model, lambda: model(x))
        assert torch.equal(model(x), model.inner(x))
    assert not log.readers and type(model.inner[0].weight) is nn.Parameter
