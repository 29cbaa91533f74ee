"""Rounds in a fit that measure and fit on its own data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from torch import Tensor

from lightning_compress import ChannelPruning, CompressionError, OneShot, Steps, Window, load_compressed
from lightning_compress.channels.compensate import last_fit
from tests.support.data import TinyData
from tests.support.fits import fit
from tests.support.modules import Classifier
from tests.support.oracles import assert_same_state, snapshot


def shrink(**settings: Any) -> ChannelPruning:
    """Half of the channels leave after step 8, and what stays is fitted."""
    window = Window(8, 12, unit="step")
    defaults = {"channels": 0.5, "round_to": 1, "schedule": OneShot(), "window": window, "calibration_batches": 5}
    return ChannelPruning(**{**defaults, **settings})


class Outputs(Callback):
    """What the module puts out for samples that no fit gets, before and after the removal."""

    def __init__(self) -> None:
        self.x = torch.randn(200, 16, generator=torch.Generator().manual_seed(5))
        self.seen: dict[int, Tensor] = {}

    @torch.no_grad()
    def see(self, module: Any) -> None:
        was = module.training
        self.seen[module.body.out_features] = module.eval()(self.x)
        module.train(was)

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.see(pl_module)


def loss_of_agreement(callback: ChannelPruning) -> float:
    outputs = Outputs()
    fit(callback, outputs, module=Classifier(lr=0.0), max_steps=9, max_epochs=-1)
    whole, narrow = outputs.seen[32], outputs.seen[16]
    return float((whole - narrow).square().sum() / (whole - whole.mean(0)).square().sum())


def test_outputs_stay_nearer_to_the_whole_models_than_without() -> None:
    window = Window(8, 9, unit="step")
    assert loss_of_agreement(shrink(window=window)) < 0.6 * loss_of_agreement(
        shrink(calibration_batches=0, window=window)
    )


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_every_precision_fits(precision: Any) -> None:
    callback, module = shrink(), Classifier()
    fit(callback, module=module, max_steps=12, max_epochs=-1, precision=precision)
    found = last_fit(module)
    assert found is not None
    assert found.fitted
    assert found.after.cosine > found.before.cosine


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_the_report_says_what_was_fitted_to_what_also_after_a_resume(tmp_path: Path) -> None:
    callback = shrink()
    _, module = fit(callback, folder=tmp_path)
    (note,) = [note for note in callback.report_notes() if "fitted" in note]
    assert "1 of 1 layers behind removed channels were fitted to 32 samples of the train loader; on 8 others" in note
    assert str(last_fit(module)) in note
    again = shrink()
    fit(again, folder=tmp_path / "again", ckpt_path=tmp_path / "epoch=1.ckpt", max_epochs=3)
    assert note in again.report_notes()
    assert not any("fitted" in note for note in shrink(calibration_batches=0).report_notes())


def test_a_calibration_dataloader_is_named() -> None:
    class Data(TinyData):
        def calibration_dataloader(self) -> Any:
            return self.val_dataloader()

    callback = shrink()
    fit(callback, data=Data())
    assert any("samples of `calibration_dataloader`" in note for note in callback.report_notes())


def test_a_file_holds_the_record_as_plain_data_and_comes_back(tmp_path: Path) -> None:
    trainer, module = fit(shrink(schedule=Steps([0.0, 1.0], [0.5, 1.0])), folder=tmp_path)
    torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
    loaded = load_compressed(tmp_path / "epoch=1.ckpt", Classifier())
    assert_same_state(snapshot(loaded), snapshot(module))
    assert last_fit(loaded) == last_fit(module) is not None
    tested = Classifier()
    trainer.test(tested, TinyData(), ckpt_path=tmp_path / "epoch=1.ckpt", verbose=False)
    assert_same_state(snapshot(tested), snapshot(module))
    assert last_fit(tested) == last_fit(module)


def test_averages_move_along() -> None:
    average = EMAWeightAveraging(decay=0.5)
    _, module = fit(shrink(), average)
    copied = average._average_model.module  # type: ignore[union-attr]
    assert copied.body.out_features == module.body.out_features == 16
    x = torch.randn(50, 16)
    with torch.no_grad():
        apart = (copied.eval()(x) - module.eval()(x)).square().mean() / module(x).var()
    assert apart < 0.2


def test_an_error_in_the_calibration_leaves_module_and_optimizer_as_they_were() -> None:
    class Data(TinyData):
        def calibration_dataloader(self) -> Any:
            return []

    before: dict[str, Any] = {}

    class Before(Callback):
        def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            before.update(weights=snapshot(pl_module))

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            before.update(after=snapshot(pl_module))

    module = Classifier(lr=0.0)
    module.norm.momentum = 0.0
    with pytest.raises(CompressionError, match="`calibration_dataloader` must give at least one batch"):
        fit(shrink(), Before(), module=module, data=Data())
    assert_same_state(before["weights"], before["after"])
    assert module.body.out_features == 32
