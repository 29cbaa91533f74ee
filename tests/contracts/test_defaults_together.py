"""Callbacks with their defaults in one fit, in any order and of any length: quantization waits for the last cut."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from torch import nn

from lightning_compress import (
    ChannelPruning,
    CompressionReport,
    Distillation,
    Linear,
    QuantizationAwareTraining,
    ScheduledPruning,
    Window,
)
from lightning_compress.quantization import convert
from tests.support.data import TinyData
from tests.support.fits import fit
from tests.support.modules import Classifier

PRUNE: dict[str, Callable[[], Callback]] = {
    "zeros": lambda: ScheduledPruning(sparsity=0.5),
    "channels": lambda: ChannelPruning(macs=0.5),
    "int8": QuantizationAwareTraining,
}
too_short = pytest.mark.filterwarnings("ignore:(QuantizationAwareTraining|ScheduledPruning). training stopped")


def trained() -> Classifier:
    torch.manual_seed(0)
    return fit(module=Classifier(), max_epochs=3)[1]


def float_form(module: Any) -> Any:
    twin = copy.deepcopy(module)
    convert.revert_(twin, "float")
    return twin.eval()


def agreement(module: Any) -> float:
    """How many of the classes that the int8 model names are those of its float weights."""
    data = TinyData()
    data.setup("fit")
    x = data.train.tensors[0]
    with torch.no_grad():
        return float((module(x).argmax(1) == float_form(module)(x).argmax(1)).float().mean())


@too_short
@pytest.mark.parametrize("length", [{"max_steps": 1}, {"max_steps": 2}, {"max_epochs": 3}], ids=str)
@pytest.mark.parametrize("order", [("int8", "channels", "zeros"), ("zeros", "channels", "int8")], ids=" ".join)
def test_defaults_combine_in_fits_of_any_length(
    order: tuple[str, ...], length: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    module = trained()
    macs = module.body.weight.numel() + module.head.weight.numel()
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        trainer, _ = fit(*(PRUNE[name]() for name in order), module=module, **length)
    assert convert.form_name(module) == "converted"
    kept = float_form(module)
    assert kept.body.weight.numel() + kept.head.weight.numel() <= 0.55 * macs
    weights = [kept.body.weight, kept.head.weight]
    zeros, total = sum(int((one == 0).sum()) for one in weights), sum(one.numel() for one in weights)
    if length != {"max_steps": 1}:  # its masks are due at the step after the cut
        assert zeros == round(0.5 * total)
    assert agreement(module) >= 0.9
    said = [record.getMessage() for record in caplog.records if "trained with fake-quantizers" in record.getMessage()]
    assert len(said) == (trainer.global_step < 20)


@pytest.mark.parametrize("order", list(itertools.permutations(PRUNE)), ids=" ".join)
def test_every_order_gives_the_same_shapes(order: tuple[str, ...]) -> None:
    module = trained()
    fit(*(PRUNE[name]() for name in order), module=module, max_epochs=1)
    assert convert.form_name(module) == "converted"
    assert float_form(module).body.out_features == 16


@pytest.mark.filterwarnings("ignore:.*teacher")  # it isn't trained
def test_defaults_combine_with_an_average_a_teacher_and_a_report() -> None:
    torch.manual_seed(3)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    for first in (True, False):
        report = CompressionReport(directory="report", picture=False, max_seconds=0.01)
        others = [EMAWeightAveraging(decay=0.5), Distillation(teacher), report]
        module, ours = trained(), [make() for make in PRUNE.values()]
        trainer, _ = fit(*([*others, *ours] if first else [*ours, *others]), module=module)
        assert convert.form_name(module) == "converted" and float_form(module).body.out_features == 16
        trainer.test(module, TinyData(), verbose=False)


@pytest.mark.parametrize(
    "channels", [Window(0.2, 0.8), Window(0, 10, unit="step"), Window(0, 1, unit="epoch")], ids=str
)
def test_quantization_waits_for_an_explicit_window_of_channels(channels: Window) -> None:
    prepared: list[int] = []

    class When(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            prepared.extend([trainer.global_step] * (convert.form_name(pl_module) == "prepared" and not prepared))

    qat = QuantizationAwareTraining()
    fit(qat, ChannelPruning(macs=0.5, schedule=Linear(), window=channels), When())
    last = {"fit": 12, "step": 10, "epoch": 7}[channels.unit]
    assert prepared == [last]
    # Its fractions count from there.
    assert (qat.bounds.start, qat.bounds.end) == (last, 14)


def test_it_does_not_wait_for_channels_that_have_left_before() -> None:
    module, channels = Classifier(), ChannelPruning(macs=0.5)
    fit(channels, module=module)
    qat = QuantizationAwareTraining()
    fit(channels, qat, module=module)
    assert qat.bounds.start == 0
    assert convert.form_name(module) == "converted" and float_form(module).body.out_features == 16


@too_short
def test_channels_that_leave_until_the_end_leave_a_calibrated_int8_model(caplog: pytest.LogCaptureFixture) -> None:
    module = trained()
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        channels = ChannelPruning(macs=0.5, schedule=Linear(), window=Window(0.0, 1.0))
        fit(channels, QuantizationAwareTraining(), module=module)
    assert convert.form_name(module) == "converted" and agreement(module) >= 0.9
    assert any(
        "only 0 optimizer steps were trained with fake-quantizers" in each.getMessage() for each in caplog.records
    )
