"""How far int8 is from float: against a computation by hand, and where a user reads of it."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_compress import PostTrainingQuantization, QuantizationAwareTraining, StaticInt8, Targets, quantize
from lightning_compress.modules.agreement import Agreement, outputs_of
from lightning_compress.quantization.agreement import BATCHES
from lightning_compress.quantization.convert import record_of
from lightning_compress.quantization.plan import explain
from tests.quantization.test_quantize import modes
from tests.support.data import TinyData
from tests.support.modules import Classifier, quiet_trainer
from tests.support.oracles import assert_same_state, snapshot


def by_hand(expected: list[Tensor], got: list[Tensor]) -> tuple[float, float]:
    """The least cosine of a batch, and the share of rows whose largest element is the same."""
    cosines, same = [], []
    for a, b in zip(expected, got, strict=True):
        x, y = (tensor.detach().double().numpy() for tensor in (a, b))
        cosines.append((x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum()))
        same += (x.argmax(1) == y.argmax(1)).tolist()
    return min(cosines), float(np.mean(same))


def test_cosine_and_classes_are_those_computed_by_hand() -> None:
    expected = [torch.randn(n, 5) for n in (8, 3)]
    got = [x + torch.randn_like(x) for x in expected]
    agreement = Agreement.of([[x] for x in expected], [[x] for x in got])
    cosine, same = by_hand(expected, got)
    assert agreement.cosine == pytest.approx(cosine, abs=1e-5) and agreement.same_class == pytest.approx(same)
    assert 0 < same < 1 and agreement.batches == 2
    assert str(agreement) == (f"cosine {cosine:.4f}, the same largest output for {same:.1%} of samples (2 batches)")


@pytest.mark.parametrize(
    "output", [torch.randn(4, 1), torch.randn(4, 3, 5), torch.randn(6)], ids=lambda x: str(x.shape)
)
def test_outputs_that_are_no_matrices_have_no_classes(output: Tensor) -> None:
    agreement = Agreement.of([[output]], [[output * 2]])
    assert agreement.cosine == pytest.approx(1.0) and agreement.same_class is None
    assert str(agreement) == "cosine 1.0000 (1 batches)"


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 4))


def test_a_quantized_model_knows_how_far_it_is_from_float(caplog: pytest.LogCaptureFixture) -> None:
    model, batches = net(), [torch.randn(8, 16) for _ in range(BATCHES + 3)]
    int8 = quantize(model, calibration=batches)
    seen = batches[:BATCHES]
    cosine, same = by_hand([model.eval()(x) for x in seen], [int8.eval()(x) for x in seen])
    record = record_of(int8) or {}
    assert record["agreement"] == {
        "cosine": pytest.approx(cosine, abs=1e-5),
        "same_class": pytest.approx(same),
        "batches": BATCHES,
    }
    assert explain(record)[0] == f"agreement with float: {Agreement(**record['agreement'])}"


@pytest.mark.parametrize("scheme", ["int8_dynamic", "int4_weight_only", "gptq"])
def test_other_schemes_know_it_where_they_see_batches(scheme: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 4 bits of so small a network are far off
        record = record_of(quantize(net(), scheme, calibration=[torch.randn(8, 16)])) or {}
        assert 0.8 < record["agreement"]["cosine"] < 1
        if scheme != "gptq":
            assert "agreement" not in (record_of(quantize(net(), scheme)) or {})


class Counts(nn.Linear):
    """Counts its calls in a buffer, and draws."""

    def __init__(self) -> None:
        super().__init__(16, 4)
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


def test_measuring_changes_nothing() -> None:
    model, x = nn.Sequential(nn.Dropout(0.5), Counts(), nn.BatchNorm1d(4)).train(), torch.randn(8, 16)
    model[0].eval()
    before, given, mode = snapshot(model), x.clone(), modes(model)
    with torch.random.fork_rng():
        state = torch.get_rng_state()
        outputs = outputs_of(model, [x, x], lambda model, batch: model(batch.add_(1)))
        assert torch.equal(torch.get_rng_state(), state)
    assert_same_state(before, model)
    assert torch.equal(x, given) and modes(model) == mode
    [[first], [second]] = outputs
    assert torch.equal(first, second) and torch.equal(first, model.eval()(x + 1))


# Far from float.


class Outlier(nn.Module):
    """The input of one layer has an outlier of 1e4, which nothing reads behind it: its codes are of that range."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.outlier, self.last = nn.Linear(16, 16), nn.Linear(17, 16, bias=False), nn.Linear(16, 4)
        with torch.no_grad():
            self.outlier.weight[:, 16] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        return self.last(self.outlier(torch.cat([hidden, torch.full_like(hidden[:, :1], 1e4)], 1)).tanh())


FAR = (
    r"The quantized model is far from the float one: cosine .*Rounding changes most what "
    r"`{path}`(, `{others}\w+`)* give. Exclude such layers in `targets`, calibrate with "
    r"StaticInt8\(observer='histogram'\), or train it so \(QuantizationAwareTraining\)."
)
PLAIN = StaticInt8(smooth=False, equalize=False)


@pytest.mark.parametrize("nested", [False, True])
def test_the_warning_names_the_layer_that_is_worst(nested: bool) -> None:
    model, x = Outlier(), torch.randn(32, 16)
    prefix = "1.1." if nested else ""
    if nested:
        model = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Flatten(), model))
    with pytest.warns(UserWarning, match=FAR.format(path=f"{prefix}outlier", others=prefix)):
        int8 = quantize(model, PLAIN, calibration=[x])
    assert (record_of(int8) or {})["agreement"]["cosine"] < 0.98


def test_the_remedy_helps() -> None:
    model, x = Outlier(), torch.randn(32, 16)
    int8 = quantize(model, PLAIN, calibration=[x], targets=Targets(exclude=["outlier"]))
    assert (record_of(int8) or {})["agreement"]["cosine"] > 0.99


class Far(Classifier):
    def __init__(self) -> None:
        super().__init__()
        del self.body, self.norm, self.head
        self.net = Outlier()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [line for entry in caplog.records for line in entry.getMessage().splitlines() if "agreement with" in line]


def test_a_trainer_warns_logs_and_reports_it(caplog: pytest.LogCaptureFixture) -> None:
    ptq = PostTrainingQuantization(PLAIN)
    with caplog.at_level(logging.INFO), pytest.warns(UserWarning, match=FAR.format(path=r"net.outlier", others="net.")):
        quiet_trainer(callbacks=[ptq]).test(Far(), TinyData(), verbose=False)
    agreement = Agreement(**(record_of(ptq.quantized_model) or {})["agreement"])
    assert agreement.cosine < 0.98 and agreement.batches > 1
    assert len(said(caplog)) == 1 and str(agreement) in said(caplog)[0]
    assert [note for note in ptq.report_notes() if "agreement" in note] == [f"agreement with float: {agreement}"]


def test_what_was_trained_is_compared_with_itself_in_float(caplog: pytest.LogCaptureFixture) -> None:
    qat = QuantizationAwareTraining()
    module: Any = Classifier()
    with caplog.at_level(logging.INFO):
        quiet_trainer(max_epochs=2, callbacks=[qat]).fit(module, TinyData())
    agreement = Agreement(**(record_of(module) or {})["agreement"])
    assert 0.98 < agreement.cosine < 1 and agreement.same_class is not None
    assert len(said(caplog)) == 1 and str(agreement) in said(caplog)[0]
    assert [note for note in qat.report_notes() if "agreement" in note] == [f"agreement with float: {agreement}"]
