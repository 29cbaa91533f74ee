"""`ChannelPruning` calibrates unless told otherwise, and does without where it can't."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, default_collate

from lightning_compress import ChannelPruning, CompressionError, Linear, OneShot, Steps, Window
from lightning_compress.channels import remove_in_fit
from lightning_compress.channels.compensate import last_fit
from tests.support.data import TinyData
from tests.support.fits import fit
from tests.support.modules import Classifier
from tests.support.oracles import same_random_state

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
WITHOUT = "ChannelPruning doesn't calibrate: weights alone say which channels leave"


def half(**settings: Any) -> ChannelPruning:
    return ChannelPruning(**{"channels": 0.5, "round_to": 1, **settings})


def kept(pruning: ChannelPruning) -> list[list[int]]:
    return [[*plan.kept["body.weight"][0].tolist()] for plan in pruning.plans]


@pytest.mark.parametrize(("samples", "batch_size", "seen"), [(50, 8, 50), (1000, 8, 256), (1000, 100, 300)])
def test_it_measures_on_so_many_samples_and_fits_to_them(samples: int, batch_size: int, seen: int) -> None:
    pruning = half()
    _, module = fit(pruning, data=TinyData(samples, batch_size))
    found = last_fit(module)
    assert found is not None and found.fitted == ("head",)
    assert found.samples + found.held_out == seen
    assert len(pruning.plans) == 1 and module.body.out_features == 16


def test_what_a_limit_leaves_out_of_the_fit_stays_out() -> None:
    _, module = fit(half(), data=TinyData(), limit_train_batches=2)
    found = last_fit(module)
    assert found is not None and found.samples + found.held_out == 16


class Stream(IterableDataset[Any]):
    """Gives each sample once: a second reader would leave the fit without."""

    def __init__(self) -> None:
        data = TinyData()
        data.setup("fit")
        self.samples, self.readers = data.train, 0

    def __iter__(self) -> Iterator[Any]:
        self.readers += 1
        assert self.readers == 1
        yield from (self.samples[number] for number in range(len(self.samples)))


def test_a_stream_is_read_by_the_fit_alone() -> None:
    pruning = half()
    with pytest.warns(UserWarning, match=f"{WITHOUT}.*is a stream.*Define `calibration_dataloader"):
        _, module = fit(pruning, data=DataLoader(Stream(), 8), max_steps=6, max_epochs=-1)
    assert last_fit(module) is None and module.body.out_features == 16


def test_a_stream_with_data_to_calibrate_on_is_calibrated() -> None:
    class Module(Classifier):
        def calibration_dataloader(self) -> Any:
            return loader()

    _, module = fit(half(), module=Module(), data=DataLoader(Stream(), 8), max_steps=6, max_epochs=-1)
    assert last_fit(module) is not None


class OnlyTrained(Classifier):
    """Has no step of evaluation that takes a batch of its training, nor a forward that does."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()

    validation_step = L.LightningModule.validation_step  # type: ignore[assignment]
    test_step = L.LightningModule.test_step  # type: ignore[assignment]
    predict_step = L.LightningModule.predict_step  # type: ignore[assignment]

    def forward(self, x: Tensor, *, gain: float) -> Tensor:
        return super().forward(x) * gain

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0], gain=1.0), batch[1])


@pytest.mark.parametrize("schedule", [OneShot(), Linear()], ids=["at once", "in rounds"])
def test_what_no_step_takes_is_said_once_and_weights_decide(schedule: Any) -> None:
    settings = {"schedule": schedule, "window": Window(0.1, 0.6)}
    pruning, weights = half(**settings), half(calibration_batches=0, importance="l1", **settings)
    with pytest.warns(UserWarning, match=f"{WITHOUT}.*The module must run one batch.*calibration_batches=0") as said:
        _, module = fit(pruning, module=OnlyTrained(), data=loader())
    assert len([one for one in said if WITHOUT in str(one.message)]) == 1
    _, other = fit(weights, module=OnlyTrained(), data=loader())  # without a warning: one would be an error
    assert kept(pruning) == kept(weights) != []
    torch.testing.assert_close(module.state_dict(), other.state_dict(), rtol=0, atol=0)


def loader() -> DataLoader[Any]:
    data = TinyData()
    data.setup("fit")
    return data.train_dataloader()


def as_user_dict(items: Any) -> Any:
    """What tokenizers of `transformers` collate to is one, which torch's pytrees don't know."""
    x, y = default_collate(items)
    return UserDict(x=x, y=y)


@dataclass
class Fields:
    x: Tensor
    y: Tensor


def as_fields(items: Any) -> Any:
    return Fields(*default_collate(items))


class Packed(Classifier):
    """Takes batches of a class of the user's."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(_unpacked(batch), batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(_unpacked(batch), batch_idx)


def _unpacked(batch: Any) -> Any:
    return (batch.x, batch.y) if isinstance(batch, Fields) else (batch["x"], batch["y"])


@pytest.mark.parametrize("collate", [as_user_dict, as_fields])
def test_samples_are_counted_and_taken_apart_in_any_container(collate: Any) -> None:
    data = TinyData(1000)
    data.setup("fit")
    both = []
    for options in ({}, {"collate_fn": collate}):
        torch.manual_seed(0)
        module = Packed() if options else Classifier()
        fit(half(), module=module, data=DataLoader(data.train, 100, **options))
        both.append((last_fit(module), module.state_dict()))
    (found, weights), (other, same) = both
    assert found is not None and (found.samples, found.held_out) == (240, 60) and other == found
    torch.testing.assert_close(weights, same, rtol=0, atol=0)


class Noisy(Classifier):
    """Draws in evaluation too, as a variational autoencoder does, or one that masks patches."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.randn_like(x))


class SameState(ChannelPruning):
    def _remove(self, *args: Any) -> None:
        with same_random_state():
            super()._remove(*args)


def test_what_draws_in_evaluation_is_fitted_to_the_same_draws() -> None:
    _, module = fit(SameState(channels=0.5, round_to=1), module=Noisy(), data=TinyData(200, 8))
    found = last_fit(module)
    assert found is not None and found.fitted == ("head",) and found.after.cosine > found.before.cosine


def fails(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("Tried to allocate 20 GiB")


@pytest.mark.parametrize("step", ["output_changes", "fitted_narrow"])
def test_a_calibration_that_breaks_doesnt_break_the_fit(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remove_in_fit, step, fails)
    with pytest.warns(UserWarning, match=f"{WITHOUT}.*Tried to allocate 20 GiB"):
        trainer, module = fit(half())
    assert last_fit(module) is None and module.body.out_features == 16
    assert trainer.callback_metrics["val_loss"].isfinite()
    with pytest.raises(torch.OutOfMemoryError):  # it was asked for
        fit(half(calibration_batches=5))


def test_batches_that_are_asked_for_must_be_there() -> None:
    with pytest.raises(CompressionError, match="The module must run one batch"):
        fit(half(calibration_batches=5), module=OnlyTrained(), data=loader())


def test_a_penalty_on_weights_ranks_by_weights_and_needs_time() -> None:
    with pytest.raises(CompressionError, match=r"`schedule` must take time with `regularization`.*Steps\(\[0.0, 1.0"):
        half(regularization=1e-3)
    pruning = half(regularization=1e-3, schedule=Steps([0.0, 1.0], [0.0, 1.0]))
    assert not pruning.recipe.importance.needs_batches
    _, module = fit(pruning)
    assert last_fit(module) is not None
