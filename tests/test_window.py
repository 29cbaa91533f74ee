from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from torch.utils.data import DataLoader, IterableDataset

from lightning_compress import CompressionError, Window
from lightning_compress.window import Bounds, fit_length
from lightning_compress.windowed_callback import WindowedCallback
from tests.support.data import TinyData
from tests.support.modules import Classifier, ManualClassifier, quiet_trainer


@given(
    st.floats(0, 1, exclude_max=True),
    st.one_of(st.none(), st.floats(0, 1)),
    st.integers(1, 10_000),
    st.integers(1, 100),
)
def test_bounds_of_a_fraction_are_never_empty_and_lie_within_the_fit(
    start: float, end: float | None, total: int, per_epoch: int
) -> None:
    assume(end is None or end > start)
    try:
        bounds = Window(start, end).bounds(total, per_epoch)
    except CompressionError:
        # Only where rounding brings the start to the fit's end: nothing would be left to act in.
        assert start * total > total - 1e-6 or (end is not None and (end - start) * total < 1e-5)
        return
    assert 0 <= bounds.start < bounds.end <= total
    assert bounds.start <= start * total + 1e-6
    assert bounds.end >= (1.0 if end is None else end) * total - 1e-6


@given(st.integers(0, 50), st.integers(1, 50), st.integers(1, 7), st.integers(0, 120))
def test_progress_is_none_before_then_rises_from_0_to_1(start: int, length: int, every: int, step: int) -> None:
    bounds = Bounds(start, start + length)
    progress = bounds.progress(step)
    if step < start:
        assert progress is None
        assert not bounds.is_due(step, every)
    else:
        assert progress == pytest.approx(min((step - start) / length, 1.0))
        following = bounds.progress(step + 1)
        assert following is not None and progress is not None and following >= progress
    assert bounds.progress(bounds.end) == 1.0


@given(st.integers(0, 50), st.integers(1, 50), st.integers(1, 60))
def test_acts_at_its_start_at_every_nth_step_and_always_at_its_end(start: int, length: int, every: int) -> None:
    bounds = Bounds(start, start + length)
    due = [step for step in range(start + length + 20) if bounds.is_due(step, every)]
    assert due == sorted({*range(start, start + length + 1, every), start + length})


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        (Window(), (0, 200)),
        (Window(0.1, 0.75), (20, 150)),
        (Window(0.7), (140, 200)),  # 0.7 * 200 is 139.99999999999997
        (Window(1, 2, unit="epoch"), (20, 40)),
        (Window(0.5, 1.5, unit="epoch"), (10, 30)),
        (Window(5, 17, unit="step"), (5, 17)),
        (Window(199, unit="step"), (199, 200)),
        (Window(0, 500, unit="step"), (0, 500)),  # may be longer than this fit: a resumed one goes on
    ],
)
def test_units(window: Window, expected: tuple[int, int]) -> None:
    bounds = window.bounds(total=200, per_epoch=20)
    assert (bounds.start, bounds.end) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": -0.1}, "`start` must be at least 0. Received: start=-0.1"),
        ({"start": math.nan}, "`start` must"),
        ({"start": math.inf, "unit": "step"}, "`start` must"),
        ({"start": 0.5, "end": 0.5}, "`end` must lie after start=0.5, or the window is empty. Received: end=0.5"),
        ({"start": 0.5, "end": 0.2}, "`end` must"),
        ({"end": math.nan}, "`end` must"),
        ({"start": 1.0}, r"`start` must lie in \[0, 1\] for unit='fit'. Received: start=1.0.*unit='step'"),
        ({"end": 30}, r"`end` must lie in \[0, 1\] for unit='fit'. Received: end=30"),
        ({"unit": "epochs"}, "`unit` must be 'fit', 'epoch' or 'step'. Received: unit='epochs'"),
        ({"every_n_steps": 0}, "`every_n_steps` must be at least 1"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(CompressionError, match=message):
        Window(**arguments)


@pytest.mark.parametrize(
    ("window", "total", "per_epoch", "message"),
    [
        (Window(), math.inf, math.inf, "known length.*unit='step'"),
        (Window(1, 2, unit="epoch"), math.inf, math.inf, "known length.*unit='step'"),
        (Window(5, unit="step"), math.inf, math.inf, "must have an end.*unit='step'"),
        (Window(1, unit="epoch"), math.inf, 10, "must have an end"),
        (Window(200, unit="step"), 200, 20, "must begin before the fit ends.*optimizer step 200.*200 optimizer steps"),
        (Window(10, 11, unit="epoch"), 200, 20, "must begin before the fit ends"),
    ],
)
def test_a_window_that_does_not_fit_is_refused(window: Window, total: float, per_epoch: float, message: str) -> None:
    with pytest.raises(CompressionError, match=message):
        window.bounds(total, per_epoch)


@pytest.mark.parametrize("window", [Window(5, 9, unit="step"), Window(2, 3, unit="epoch")], ids=["step", "epoch"])
def test_absolute_windows_need_only_their_own_unit(window: Window) -> None:
    bounds = window.bounds(math.inf, 4)
    assert (bounds.start, bounds.end) == ((5, 9) if window.unit == "step" else (8, 12))


# The length that is foreseen, against a count of the batches that made a step.


class Recorder(WindowedCallback):
    """Notes when it is told to act, and what was foreseen."""

    key = "recorder"

    def __init__(self, window: Window = Window()) -> None:  # noqa: B008
        super().__init__(window)
        self.acted: list[tuple[int, float]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.foreseen = fit_length(trainer)
        super().on_train_start(trainer, pl_module)

    def act(self, trainer: L.Trainer, pl_module: L.LightningModule, progress: float) -> None:
        self.acted.append((self._step, progress))


class Endless(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[Any]:
        data = TinyData()
        data.setup("fit")
        while True:
            yield from data.train


class Finite(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[Any]:
        data = TinyData()
        data.setup("fit")
        yield from data.train


FITS: dict[str, dict[str, Any]] = {
    "two epochs": {"max_epochs": 2},
    "accumulation, uneven": {"max_epochs": 2, "accumulate_grad_batches": 3},
    "accumulation beyond the epoch": {"max_epochs": 2, "accumulate_grad_batches": 20},
    "limit_train_batches": {"max_epochs": 2, "limit_train_batches": 5, "accumulate_grad_batches": 2},
    "limit_train_batches as a fraction": {"max_epochs": 3, "limit_train_batches": 0.5},
    "max_steps": {"max_epochs": -1, "max_steps": 9},
    "max_steps and max_epochs": {"max_epochs": 1, "max_steps": 50},
    "max_steps and accumulation": {"max_epochs": 5, "max_steps": 5, "accumulate_grad_batches": 3},
    "overfit_batches": {"max_epochs": 3, "overfit_batches": 2},
    "fast_dev_run": {"fast_dev_run": 3},
}


@pytest.mark.parametrize("name", FITS)
@pytest.mark.filterwarnings("ignore:You requested to overfit:UserWarning")
def test_the_foreseen_length_is_the_length(name: str) -> None:
    recorder = Recorder()
    trainer = quiet_trainer(callbacks=[recorder], **FITS[name])
    trainer.fit(Classifier(), TinyData())
    assert recorder.foreseen[0] == trainer.global_step == recorder._step > 0
    assert recorder.acted[0] == (0, 0.0)
    assert recorder.acted[-1] == (trainer.global_step, 1.0)


def test_gradient_accumulation_on_a_schedule() -> None:
    recorder = Recorder()
    schedule = GradientAccumulationScheduler({0: 1, 1: 3, 2: 7})
    trainer = quiet_trainer(max_epochs=4, callbacks=[recorder, schedule])
    trainer.fit(Classifier(), TinyData())
    assert recorder.foreseen == (7 + 3 + 1 + 1, 7)
    assert recorder._step == trainer.global_step == 12


@pytest.mark.parametrize("arguments", [{"max_epochs": 2}, {"max_epochs": -1, "max_steps": 10}], ids=["epochs", "steps"])
def test_two_optimizers_under_manual_optimization_count_once_a_batch(arguments: dict[str, Any]) -> None:
    recorder = Recorder()
    trainer = quiet_trainer(callbacks=[recorder], **arguments)
    trainer.fit(ManualClassifier(), TinyData())
    assert trainer.global_step == 2 * recorder._step
    assert recorder.foreseen[0] == recorder._step
    assert recorder.acted[-1][1] == 1.0


def test_the_extra_epoch_of_stochastic_weight_averaging_is_not_counted() -> None:
    recorder = Recorder()
    swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=0.5)
    # Classifier has BatchNorm, so SWA adds an epoch without steps at the end.
    trainer = quiet_trainer(max_epochs=4, callbacks=[recorder, swa])
    trainer.fit(Classifier(), TinyData())
    assert recorder.foreseen[0] == 4 * 7
    assert recorder.acted[-1] == (28, 1.0)


class Unsized(TinyData):
    def __init__(self, dataset: IterableDataset[Any]) -> None:
        super().__init__()
        self.unsized = dataset

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.unsized, batch_size=8)


@pytest.mark.parametrize("dataset", [Endless, Finite])
def test_a_loader_without_length_needs_max_steps_or_a_window_in_steps(dataset: type[IterableDataset[Any]]) -> None:
    loader = Unsized(dataset())
    recorder = Recorder()
    quiet_trainer(max_epochs=-1, max_steps=12, callbacks=[recorder]).fit(Classifier(), loader)
    assert (recorder.foreseen, recorder.acted[-1]) == ((12, math.inf), (12, 1.0))
    with pytest.raises(CompressionError, match="known length.*unit='step'"):
        quiet_trainer(max_epochs=1, callbacks=[Recorder()]).fit(Classifier(), loader)
    recorder = Recorder(Window(1, 3, unit="step"))
    quiet_trainer(max_epochs=1, limit_train_batches=5, callbacks=[recorder]).fit(Classifier(), loader)
    assert [step for step, _ in recorder.acted] == [1, 2, 3]


@pytest.mark.parametrize("every", [1, 2, 5])
def test_acts_at_the_steps_that_the_window_names(every: int) -> None:
    recorder = Recorder(Window(3, 12, unit="step", every_n_steps=every))
    quiet_trainer(max_epochs=3, callbacks=[recorder]).fit(Classifier(), TinyData())
    assert [step for step, _ in recorder.acted] == sorted({*range(3, 13, every), 12})


def test_training_that_stops_early_warns() -> None:
    class Stops(Classifier):
        def on_train_batch_end(self, *_: Any) -> None:
            self.trainer.should_stop = True

    with pytest.warns(
        UserWarning, match="Recorder: training stopped at optimizer step 1, before its window's end at 14"
    ):
        quiet_trainer(max_epochs=2, callbacks=[Recorder()]).fit(Stops(), TinyData())


def test_a_window_that_begins_after_the_fit_is_refused_before_training() -> None:
    module = Classifier()
    weight = module.body.weight.detach().clone()
    with pytest.raises(CompressionError, match="must begin before the fit ends"):
        quiet_trainer(callbacks=[Recorder(Window(7, unit="step"))]).fit(module, TinyData())
    assert torch.equal(weight, module.body.weight)
