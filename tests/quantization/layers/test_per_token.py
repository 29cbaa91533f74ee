"""Which dynamic layers get a scale for each token: those that a batch shows to need one, and no others."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_compress import DynamicInt8, PostTrainingQuantization, Targets, quantize
from lightning_compress.modules.routing import with_forms
from lightning_compress.quantization.convert import record_of
from lightning_compress.quantization.layers.linear import DynamicProduct
from lightning_compress.quantization.plan import explain
from tests.support.modules import quiet_trainer


def per_token(model: nn.Module) -> list[bool]:
    return [module.per_token for module in with_forms(model) if isinstance(module, DynamicProduct)]


def chosen(model: nn.Module) -> list[str]:
    return [layer["path"] for layer in (record_of(model) or {})["layers"] if layer["scheme"]["per_token"]]


class Uneven(nn.Module):
    """Its second layer sees tokens of very different magnitudes, the first and third none."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.second(x * torch.logspace(-3, 3, x.shape[1])[:, None])
        return self.third(nn.functional.layer_norm(x, (32,), eps=1e-12))


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0))


@torch.no_grad()
def test_a_batch_shows_which_layers_need_it() -> None:
    model, x = Uneven().eval(), torch.randn(4, 12, 16)
    int8 = quantize(model, "int8_dynamic", calibration=[x])
    assert chosen(int8) == ["second"]
    assert per_token(int8) == [False, True, False]
    fast = quantize(model, DynamicInt8(per_token=False), calibration=[x])
    assert cosine(model(x), fast(x)) < 0.9 and cosine(model(x), int8(x)) > 0.985
    [line] = [line for line in explain(record_of(int8) or {}) if "for each token" in line]
    assert line.startswith("`second`: a scale for each token")


@pytest.mark.parametrize("scheme", ["int8_dynamic", DynamicInt8(per_token=False)], ids=str)
def test_without_a_batch_or_a_need_or_where_it_is_fixed_one_scale_serves_all(scheme: Any) -> None:
    model, x = Uneven().eval(), torch.randn(4, 12, 16)
    assert chosen(quantize(model, scheme)) == []
    assert chosen(quantize(model, scheme, calibration=[x[:, 5:7]])) == []
    if scheme != "int8_dynamic":
        assert chosen(quantize(model, scheme, calibration=[x])) == []


def test_only_layers_that_leave_it_open_are_switched() -> None:
    model, x = Uneven().eval(), torch.randn(4, 12, 16)
    overrides = {"second": DynamicInt8(per_token=False)}
    assert chosen(quantize(model, "int8_dynamic", calibration=[x], overrides=overrides)) == []  # no other helps


def test_inside_of_a_traced_unit() -> None:
    model, x = Uneven().eval(), torch.randn(4, 12, 16)
    int8 = quantize(model, calibration=[x], overrides={"second": "int8_dynamic"}, targets=Targets(include=["second"]))
    assert chosen(int8) == ["second"]
    assert per_token(int8) == [True]


def test_losses_and_outputs_without_floats_decide_nothing() -> None:
    class Loss(Uneven):
        def calibration_step(self, batch: Tensor) -> Tensor:
            return self(batch).argmax(-1)

    model, x = Loss().eval(), torch.randn(4, 12, 16)
    # What the code calls in the step counts, not what it makes of it.
    assert chosen(quantize(model, "int8_dynamic", calibration=[x])) == ["second"]


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Uneven()

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.net(batch)

    def test_dataloader(self) -> Any:
        return DataLoader([torch.randn(4, 12, 16)], batch_size=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("offered", [True, False])
def test_post_training_quantization_looks_where_calibration_data_are_offered(offered: bool) -> None:
    module, ptq = Module(), PostTrainingQuantization("int8_dynamic")
    if offered:
        module.calibration_dataloader = module.test_dataloader
    quiet_trainer(callbacks=[ptq]).test(module, verbose=False)
    assert ptq.quantized_model is not None
    assert chosen(ptq.quantized_model) == ["net.second"] * offered
    assert sum("`net.second`: a scale for each token" in note for note in ptq.report_notes()) == offered


def test_quantize_names_them_unless_they_were_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    model, x = Uneven().eval(), torch.randn(4, 12, 16)
    quantize(model, DynamicInt8(per_token=True), calibration=[x])
    assert caplog.text == ""
    quantize(model, "int8_dynamic", calibration=[x])
    assert "`second`: a scale for each token" in caplog.text
