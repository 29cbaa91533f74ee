"""Promise 20: where a module takes longer for the channels that have left it, the log and the report say so."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

from lightning_compress import ChannelPruning, Linear, Window
from lightning_compress.channels import speed
from lightning_compress.channels.speed import slower_than_whole
from lightning_compress.modules import latency
from tests.support.data import TinyData
from tests.support.modules import Classifier, quiet_trainer
from tests.support.oracles import assert_same_state, snapshot

SLOWER = "slower than whole here: a batch takes 2.00 times as long"


def widths(model: nn.Module) -> list[int]:
    return [layer.out_features for layer in model.modules() if isinstance(layer, nn.Linear)]


@pytest.mark.parametrize("ratio", [2.0, 1.04, 0.5])
@pytest.mark.parametrize("schedule", [None, Linear()], ids=["at once", "in rounds"])
def test_it_is_said_once_when_the_last_channels_have_left(
    ratio: float, schedule: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    module, asked = Classifier(), list[tuple[list[int], list[int]]]()
    before = widths(module)

    def ratios(whole: nn.Module, narrow: nn.Module, run: Any, **limits: Any) -> tuple[float, ...]:
        run(narrow)
        run(whole)
        asked.append((widths(whole), widths(narrow)))
        return (ratio,) * 3

    monkeypatch.setattr(speed, "round_ratios", ratios)
    options = {} if schedule is None else {"schedule": schedule, "window": Window(0.1, 0.7, every_n_steps=1)}
    callback = ChannelPruning(channels=0.5, calibration_batches=0, **options)
    with caplog.at_level(logging.INFO):
        quiet_trainer(max_epochs=3, callbacks=[callback]).fit(module, TinyData())
    assert asked == [(before, widths(module))] and widths(module) != before
    assert caplog.text.count(SLOWER) == (ratio == 2.0) == sum(SLOWER in note for note in callback.report_notes())
    assert ("slower" in caplog.text) == (ratio == 2.0)


def test_a_fit_is_the_same_with_and_without_it(monkeypatch: pytest.MonkeyPatch):
    found = []
    for timed in (speed.round_ratios, latency.round_ratios):
        torch.manual_seed(0)
        monkeypatch.setattr(speed, "round_ratios", timed)
        module = Classifier()
        quiet_trainer(max_epochs=2, callbacks=[ChannelPruning(macs=0.5)]).fit(module, TinyData())
        found.append(snapshot(module))
    assert_same_state(*found)


def test_what_does_not_run_is_not_timed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(speed, "round_ratios", latency.round_ratios)

    def run(model: nn.Module) -> None:
        raise RuntimeError("it wants something else")

    assert slower_than_whole(nn.Linear(2, 2), run) == ""
