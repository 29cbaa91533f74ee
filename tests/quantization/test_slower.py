"""Promise 20: where the quantized form takes longer than the float one, the log and the report say so."""

from __future__ import annotations

import copy
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_compress import CompressionReport, PostTrainingQuantization, QuantizationAwareTraining, quantize
from lightning_compress.modules import latency
from lightning_compress.quantization import convert
from lightning_compress.quantization.quantize import slower_than_float
from tests.conftest import QUANTIZE
from tests.support.data import TinyData
from tests.support.modules import Classifier, quiet_trainer
from tests.support.oracles import assert_same_state, hooks, same_random_state, snapshot


class Clock:
    """Time that passes in forward alone: `quantized` seconds in a quantized module, else one."""

    def __init__(self, quantized: float) -> None:
        self.now, self.quantized, self.calls = 0.0, quantized, 0

    def tick(self, module: nn.Module) -> None:
        self.calls += 1
        self.now += self.quantized if convert.form_name(module) == "converted" else 1.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Clock:
    clock = Clock(request.param)
    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(QUANTIZE, "round_ratios", latency.round_ratios)
    CLOCKS.append(clock)
    return clock


CLOCKS: list[Clock] = []


class Timed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_tracing() and type(x) is Tensor:
            CLOCKS[-1].tick(self)
        return self.net(x)


class TimedClassifier(Classifier):
    """Counts in its step, which isn't traced."""

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        CLOCKS[-1].tick(self)
        return super().validation_step(batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> Any:
        CLOCKS[-1].tick(self)
        return super().test_step(batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        CLOCKS[-1].tick(self)
        return super().predict_step(batch, batch_idx)


SLOW, FAST, NOISE = 2.0, 0.5, 1.04
EACH = pytest.mark.parametrize("clock", [SLOW, FAST, NOISE], indirect=True, ids=["slow", "fast", "noise"])


def said(lines: Any) -> list[str]:
    return [line for line in lines if "slower than float here: a batch takes 2.00 times as long" in line]


@EACH
@pytest.mark.parametrize("scheme", ["int8_dynamic", "int8_weight_only"])
def test_quantize_says_so(clock: Clock, scheme: str, caplog: pytest.LogCaptureFixture) -> None:
    model, x = Timed(), torch.randn(8, 16)
    state, modes = snapshot(model), [module.training for module in model.modules()]
    with caplog.at_level(logging.WARNING, logger="lightning_compress"):
        quantize(model, scheme, calibration=[x])
    assert len(said(caplog.text.splitlines())) == (clock.quantized == SLOW)
    assert ("slower" in caplog.text) == (clock.quantized == SLOW)
    assert_same_state(state, model)
    assert [module.training for module in model.modules()] == modes and hooks(model) == []


@EACH
@pytest.mark.parametrize("stage", ["test", "validate", "predict"])
@pytest.mark.parametrize("scheme", ["int8_static", "int8_dynamic", "int4_weight_only"])
def test_post_training_quantization_says_so(
    clock: Clock, scheme: str, stage: str, caplog: pytest.LogCaptureFixture
) -> None:
    module, data, ptq = TimedClassifier(), TinyData(), PostTrainingQuantization(scheme)
    before = snapshot(module)
    with caplog.at_level(logging.INFO):
        getattr(quiet_trainer(callbacks=[ptq]), stage)(
            module, data, **({} if stage == "predict" else {"verbose": False})
        )
    slow = clock.quantized == SLOW
    assert len(said(ptq.report_notes())) == slow and len(said(caplog.text.splitlines())) == slow
    assert_same_state(before, module)
    assert ptq._floats is None


@EACH
def test_training_says_so_when_it_converts(clock: Clock) -> None:
    module, qat = TimedClassifier(), QuantizationAwareTraining()
    quiet_trainer(callbacks=[qat]).fit(module, TinyData())
    assert convert.form_name(module) == "converted"
    assert len(said(qat.report_notes())) == (clock.quantized == SLOW)
    assert qat._batch is None


def test_the_report_shows_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(QUANTIZE, "round_ratios", lambda *_, **__: (2.0,) * 3)
    report = CompressionReport(str(tmp_path), picture=False, max_seconds=0.01)
    ptq = PostTrainingQuantization("int8_dynamic")
    quiet_trainer(callbacks=[ptq, report]).test(Classifier(), TinyData(), verbose=False)
    assert len(said((tmp_path / "report.md").read_text().splitlines())) == 1


@pytest.mark.parametrize("clock", [SLOW], indirect=True)
def test_a_slow_model_is_called_a_few_times_only(clock: Clock) -> None:
    model, x = Timed(), torch.randn(8, 16)
    int8 = quantize(model, "int8_dynamic")
    CLOCKS[-1].calls = 0
    assert said([slower_than_float(model, int8, lambda module, batch: module(batch), x)])
    assert CLOCKS[-1].calls == 2 * 4  # a second each; what is quick is called more often
    CLOCKS[-1].quantized, CLOCKS[-1].calls = 1e-4, 0
    slower_than_float(model, int8, lambda module, batch: CLOCKS[-1].tick(int8), x)
    assert CLOCKS[-1].calls == 2 * 21
    CLOCKS[-1].calls = 0
    slower_than_float(model, int8, lambda module, batch: CLOCKS[-1].tick(int8), x, fixed_rounds=True)
    assert CLOCKS[-1].calls == 2 * 4


def test_single_slow_rounds_are_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 2)
    for ratios, expected in [((0.9, 1.0, 5.0, 5.0), False), ((1.2, 1.1, 1.3), True), ((0.9, 1.2, 1.2, 1.2, 1.2), True)]:
        monkeypatch.setattr(QUANTIZE, "round_ratios", lambda *_, ratios=ratios, **__: ratios)
        assert bool(slower_than_float(model, model, lambda *_: None, None)) == expected


def test_what_cannot_be_run_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QUANTIZE, "round_ratios", latency.round_ratios)

    def run(model: nn.Module, batch: Any) -> Any:
        raise ValueError("a user's")

    assert slower_than_float(nn.Linear(2, 2), nn.Linear(2, 2), run, torch.ones(2)) == ""


@pytest.mark.parametrize("clock", [SLOW], indirect=True)
def test_nothing_is_drawn_and_nothing_changes(clock: Clock) -> None:
    class Restless(Timed):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(16)
            self.seen: list[float] = []

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(np.random.rand() + random.random())
            return super().forward(self.norm(x + torch.rand_like(x)))

    model, x = Restless().train(), torch.randn(8, 16)
    twin, batch = copy.deepcopy(model), x.clone()
    with same_random_state():
        quantize(model, "int8_dynamic", calibration=[x])
    assert_same_state(twin, model)
    assert model.seen == [] and model.training and torch.equal(batch, x)
