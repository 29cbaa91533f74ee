"""`AccuracyGuard` beside schedules: they are held, go on, and give up; channels leave in smaller rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_compress import (
    AccuracyGuard,
    ChannelPruning,
    CompressionError,
    Linear,
    NoEffectWarning,
    OneShot,
    QuantizationAwareTraining,
    ScheduledPruning,
    Window,
)
from lightning_compress.choosing.baseline import Baseline
from lightning_compress.quantization import convert
from tests.support import fits
from tests.support.data import TinyData
from tests.support.ddp import run_ranks
from tests.support.fits import resume
from tests.support.modules import Classifier, quiet_trainer

PER_EPOCH = 7
"""Optimizer steps, of `TinyData`."""


class Scripted(Classifier):
    """Its accuracy after each epoch is what the script says; the last value lasts."""

    def __init__(self, script: str = "") -> None:
        super().__init__()
        self.script = [float(value) for value in script.split()]

    def on_validation_epoch_end(self) -> None:
        value = self.script[min(self.current_epoch, len(self.script) - 1)]
        self.log("acc", 0.0 if self.trainer.sanity_checking else value)


class Sparsities(Callback):
    """Notes how sparse the model is, or how narrow, when each epoch ends."""

    def __init__(self) -> None:
        self.zeros: list[float] = []
        self.widths: list[int] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        weight = pl_module.body.weight
        self.zeros.append(round(float((weight == 0).float().mean()), 2))
        self.widths.append(len(weight))


def pruning(**kwargs: Any) -> ScheduledPruning:
    window = Window(1, 5, unit="epoch", every_n_steps=PER_EPOCH)
    return ScheduledPruning("l1_unstructured", 0.8, "layer", **{"schedule": Linear(), "window": window, **kwargs})


def guard(max_drop: float = 0.05, **kwargs: Any) -> AccuracyGuard:
    return AccuracyGuard("acc", max_drop=max_drop, **{"min_samples": 10, **kwargs})


def fit(*callbacks: Callback, script: str, **options: Any) -> Sparsities:
    seen = Sparsities()
    fits.fit(*callbacks, seen, module=Scripted(script), **{"max_epochs": 7, "num_sanity_val_steps": 0, **options})
    return seen


def test_without_a_fall_the_schedule_is_as_ever() -> None:
    free, guarded = fit(pruning(), script="0.9"), fit(pruning(), guard(), script="0.9 0.86 0.99 0.855")
    assert guarded.zeros == free.zeros == [0.0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8]


def test_it_is_held_and_what_is_left_takes_what_is_left_of_the_window() -> None:
    # After the second epoch it is too low, after the third it has recovered.
    held = fit(pruning(), guard(), script="0.9 0.84 0.9")
    # A fifth at the end of epoch 1; held at that of epoch 2; then 3/5 more in the two epochs that are left.
    assert held.zeros == [0.0, 0.2, 0.2, 0.5, 0.8, 0.8, 0.8]


def test_it_gives_up_at_the_windows_end_with_what_was_reached_and_says_so() -> None:
    with pytest.warns(UserWarning) as warned:
        held = fit(pruning(), guard(), script="0.9 0.9 0.8")
    assert held.zeros == [0.0, 0.2, 0.4, 0.4, 0.4, 0.4, 0.4]
    texts = [str(warning.message) for warning in warned]
    assert any(
        "ScheduledPruning: its window has ended at optimizer step 35, and a guard was against more: sparsity is 0.400, "
        "not 0.8." in text
        for text in texts
    )
    assert any(
        "acc ends at 0.8, and was 0.9 before compression: more than max_drop=0.05 below" in text for text in texts
    )


@pytest.mark.filterwarnings("ignore:AccuracyGuard. acc ends at nan")
def test_a_metric_that_is_no_number_holds() -> None:
    with pytest.warns(UserWarning, match="its window has ended"):
        assert fit(pruning(), guard(), script="0.9 nan").zeros[-1] == 0.2


def test_a_sanity_check_tells_nothing() -> None:
    held = fit(pruning(), guard(), script="0.9 0.84 0.9", num_sanity_val_steps=2)
    assert held.zeros == [0.0, 0.2, 0.2, 0.5, 0.8, 0.8, 0.8]


def test_less_may_be_better() -> None:
    held = fit(pruning(), guard(mode="min"), script="0.9 0.96 0.9")
    assert held.zeros == [0.0, 0.2, 0.2, 0.5, 0.8, 0.8, 0.8]


@pytest.mark.parametrize(
    ("settings", "script", "holds"),
    [
        ({"smoothing": 0.0}, "0.5 0.9 0.84", True),
        ({"smoothing": 0.5}, "0.5 0.9 0.84", False),  # 0.7 on average
        ({"baseline": 0.9}, "0.5 0.5 0.84", True),
        ({"baseline": 0.8}, "0.9 0.9 0.84", False),
    ],
)
def test_it_compares_with_what_was_before_or_was_given(settings: Any, script: str, holds: bool) -> None:
    later = pruning(window=Window(2, 5, unit="epoch", every_n_steps=PER_EPOCH))
    watched = guard(**settings)
    zeros = fit(later, watched, script=f"{script} 0.95").zeros
    assert (zeros[3] == zeros[2]) == holds and zeros[-1] == 0.8


def test_where_no_validation_came_before_it_makes_one() -> None:
    watched = guard()
    early = pruning(window=Window(0, 5, unit="epoch", every_n_steps=PER_EPOCH))
    assert fit(early, watched, script="0.9 0.8 0.9").zeros == [0.16, 0.32, 0.32, 0.56, 0.8, 0.8, 0.8]
    assert (
        watched.report_notes()[0] == "AccuracyGuard: acc is 0.9 before compression begins, by an evaluation of its own"
    )


def test_baseline_is_an_exponential_average() -> None:
    seen = Baseline("max", 0.1, 0.75)
    values = [0.2, 0.6, 0.4, 0.9]
    for value in values:
        seen.see(value)
    expected = 0.75**3 * 0.2 + 0.25 * (0.75**2 * 0.6 + 0.75 * 0.4 + 0.9)
    assert seen.value == pytest.approx(expected)


# Channels.


def channels(**kwargs: Any) -> ChannelPruning:
    window = Window(1, 5, unit="epoch", every_n_steps=PER_EPOCH)
    return ChannelPruning(**{"channels": 0.25, "round_to": 1, "schedule": Linear(), "window": window, **kwargs})


def test_a_round_that_costs_too_much_is_held_and_the_next_ones_are_half_as_large() -> None:
    free = fit(channels(), script="0.9")
    assert free.widths == [32, 26, 20, 14, 8, 8, 8]
    with pytest.warns(UserWarning, match="channels=0.25 was asked for, 0.625 is reached"):
        held = fit(channels(), guard(), script="0.9 0.8 0.9")
    # A quarter of the way, nothing, and then at most an eighth at a time.
    assert held.widths == [32, 26, 26, 23, 20, 20, 20]


@pytest.mark.filterwarnings("ignore:AccuracyGuard. acc ends at 0.8")
def test_a_round_that_cost_too_much_at_the_end_ends_the_window() -> None:
    with pytest.warns(UserWarning, match="ChannelPruning: its window has ended at optimizer step 35"):
        held = fit(channels(), guard(), script="0.9 0.9 0.9 0.8")
    assert held.widths == [32, 26, 20, 14, 14, 14, 14]


@pytest.mark.filterwarnings("ignore:ChannelPruning. its window has ended", "ignore:AccuracyGuard. acc ends at 0.8")
def test_quantization_that_waits_begins_when_channels_are_given_up() -> None:
    module = Scripted("0.9 0.8 0.8")
    window = Window(1, 3, unit="epoch", every_n_steps=PER_EPOCH)
    callbacks = [channels(window=window), QuantizationAwareTraining(), guard(max_drop=0.05, baseline=0.9)]
    quant = [callback for callback in callbacks if isinstance(callback, QuantizationAwareTraining)]
    quant[0].convert = False
    fits.fit(*callbacks, module=module, max_epochs=5, num_sanity_val_steps=0)
    assert module.body.out_features < 32 and convert.form_name(module) == "prepared"


# A checkpoint, ranks, and what is refused.


@pytest.mark.parametrize("kind", [pruning, channels])
@pytest.mark.filterwarnings(
    "ignore:.*its window has ended",
    "ignore:AccuracyGuard. acc ends at",
    "ignore:The dirpath has changed",
    "ignore:Be aware that when using",
)
def test_a_resumed_run_holds_what_the_uninterrupted_one_held(kind: Any, tmp_path: Path) -> None:
    def run(**files: Any) -> Any:
        module = Scripted("0.9 0.8 0.9 0.8 0.9")
        return fits.fit(kind(), guard(), module=module, max_epochs=6, num_sanity_val_steps=0, **files)

    resume(run, tmp_path, 0, 1, 2, 3)


@pytest.mark.filterwarnings("ignore:.*its window has ended", "ignore:AccuracyGuard. acc ends at")
def test_all_that_a_guard_knows_is_in_its_state() -> None:
    watched, other = guard(), guard()
    fit(pruning(), watched, script="0.9 0.9 0.8")
    other.load_state_dict(watched.state_dict())
    assert other.state_dict() == watched.state_dict()
    assert set(map(type, other.state_dict().values())) == {int, float, bool, list}


class Apart(Scripted):
    """Each rank sees an accuracy of its own, which falls in the second alone; they hold together by the mean."""

    def on_validation_epoch_end(self) -> None:
        fallen = self.global_rank == 1 and self.current_epoch == 2
        self.log("acc", 0.7 if fallen else 0.9)


def fit_apart() -> dict[str, Any]:
    watched, seen, module = guard(), Sparsities(), Apart("0.9")
    window = Window(2, 6, unit="epoch", every_n_steps=3)
    callbacks = [pruning(window=window), watched, seen]
    trainer = quiet_trainer(devices=2, strategy="ddp", max_epochs=7, callbacks=callbacks, num_sanity_val_steps=0)
    trainer.fit(module, TinyData(samples=48))
    return {"zeros": torch.tensor(seen.zeros), "weight": module.body.weight.detach(), "notes": watched.report_notes()}


@pytest.mark.slow
def test_all_ranks_hold_together() -> None:
    first, second = run_ranks(fit_apart)
    assert first["notes"] == second["notes"] and any("schedules are held" in note for note in first["notes"])
    assert torch.equal(first["weight"], second["weight"])
    zeros = first["zeros"].tolist()
    assert 0 < zeros[2] == zeros[3] < zeros[4] < zeros[5] == zeros[6] == pytest.approx(0.8)


def test_forty_images_prove_no_point_in_a_fit_either() -> None:
    with pytest.raises(CompressionError, match="`max_drop` must be one that 50 samples of validation can prove"):
        fit(pruning(), guard(0.01, min_samples=None), script="0.9")
    with pytest.raises(CompressionError, match="`min_samples` must be at most the samples of validation, 50"):
        fit(pruning(), guard(min_samples=60), script="0.9")


def test_a_metric_that_validation_does_not_log() -> None:
    with pytest.raises(CompressionError, match="`monitor` must be a metric that validation logs.*'accuracy'.*Nearest"):
        fit(pruning(), AccuracyGuard("accuracy", max_drop=0.05, min_samples=10), script="0.9")


def test_a_fit_without_validation() -> None:
    with pytest.raises(CompressionError, match="`val_dataloaders` must be there"):
        fit(pruning(), guard(), script="0.9", limit_val_batches=0)


def test_a_dry_run_of_a_fit_is_not_guarded() -> None:
    fits.fit(pruning(window=Window(0, 1)), guard(0.01, min_samples=None), module=Scripted("0.9"), fast_dev_run=True)


@pytest.mark.parametrize("make", [lambda: ChannelPruning(macs=0.5), lambda: pruning(schedule=OneShot())])
def test_that_nothing_can_be_held_which_goes_at_once_is_said(make: Any) -> None:
    with pytest.warns(NoEffectWarning, match=r"what \w+Pruning takes at once can't be held. Give it schedule=Linear"):
        fit(make(), guard(), script="0.9")
