"""The ways of batches through a module's own steps, and what these call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_compress import CompressionError
from lightning_compress.modules.call_log import record_calls
from lightning_compress.probe import data_feed, example_calls, is_own, observe_steps, shape_feed, to_module
from lightning_compress.silent_copy import make_probe
from tests.support.data import TinyData
from tests.support.modules import Classifier, ManualClassifier, quiet_trainer


class InTraining(Callback):
    """Does something at the start of the first training batch."""

    def __init__(self, action: Callable[[pl.Trainer, Any, Any], Any]) -> None:
        self.action = action
        self.result: Any = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, *_: Any) -> None:
        self.result = self.action(trainer, pl_module, batch)


def in_training(module: pl.LightningModule, action: Callable[[pl.Trainer, Any, Any], Any]) -> Any:
    callback = InTraining(action)
    quiet_trainer(max_steps=1, callbacks=[callback]).fit(module, TinyData())
    return callback.result


def names(feed: Any) -> list[str]:
    return [way.__name__ for way in feed.ways]


class Calibrated(Classifier):
    def calibration_step(self, batch: Any) -> Any:
        return self(batch[0])


class Steps(Classifier):
    """Its test and its validation can't run; its prediction takes a loader's index too."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        raise ValueError("no labels.")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Calls no layer."""

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 1) -> Tensor:
        assert dataloader_idx == 0
        return self(batch.pop(0))


def test_the_ways_of_data_and_those_of_shapes_have_their_order() -> None:
    def ways(trainer: pl.Trainer, module: Any, batch: Any) -> list[list[str]]:
        shapes = [shape_feed(trainer, module, "test", train=train) for train in (True, False)]
        return [names(feed) for feed in (data_feed(trainer, module, "predict"), *shapes)]

    steps = ["test_step", "validation_step", "predict_step"]
    assert in_training(Classifier(), ways) == [
        ["predict_step", "test_step", "validation_step", "forward"],
        [*steps, "training_step", "forward"],
        [*steps, "forward"],
    ]
    assert in_training(ManualClassifier(), ways)[1] == [*steps, "forward", "training_step"]
    calibrated: Any = Calibrated()
    calibrated.example_input_array = torch.ones(1, 16)
    assert in_training(calibrated, ways) == [
        ["calibration_step"],
        ["calibration_step", "training_step", "example_input_array", "forward"],
        ["calibration_step", "example_input_array", "forward"],
    ]


def test_the_first_way_that_brings_a_batch_to_the_layers_is_chosen() -> None:
    def choose(trainer: pl.Trainer, module: Any, batch: Any) -> tuple[Any, ...]:
        probe = make_probe(trainer, module)
        feed = data_feed(trainer, probe, "test")
        batches = list(feed.choose(probe, iter([batch, batch])))
        output = feed(probe, batches[0])
        return str(feed), len(batches), [len(part) for part in batches], output.shape

    said, count, parts, shape = in_training(Steps(), choose)
    assert said == (
        "batches go through `predict_step`; not by `test_step` (ValueError: no labels.); not by `validation_step` "
        "(it calls no layer)"
    )
    assert (count, parts, shape) == (2, [2, 2], (8, 4))  # a step that empties its batch has one of its own


def test_where_no_way_works_each_is_named_with_what_was_wrong() -> None:
    class Bare(Steps):
        def predict_step(self, batch: Any, *_: Any) -> None:
            raise KeyError("ids")

        def forward(self, batch: Any) -> Any:
            raise KeyError("mask")

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.body(batch[0]).sum()

    def choose(trainer: pl.Trainer, module: Any, batch: Any) -> None:
        probe = make_probe(trainer, module)
        with pytest.raises(
            CompressionError, match=r"`test_step`: .*no labels; .*`predict_step`: .*ids.*`forward`.*mask"
        ):
            data_feed(trainer, probe, "test").choose(probe, iter([batch]))
        assert list(data_feed(trainer, probe, "test").choose(probe, iter(()))) == []

    in_training(Bare(), choose)


def test_a_step_that_reads_one_sample_of_a_bare_tensor_is_no_way() -> None:
    def choose(trainer: pl.Trainer, module: Any, batch: Any) -> list[str]:
        probe = make_probe(trainer, module)
        feed = data_feed(trainer, probe, "test")
        list(feed.choose(probe, iter([batch[0]])))
        return names(feed)

    assert in_training(Classifier(), choose) == ["forward"]


def test_steps_are_observed_on_a_float_copy_and_move_nothing() -> None:
    def observe(trainer: pl.Trainer, module: Any, batch: Any) -> Any:
        before, state = {key: value.clone() for key, value in module.state_dict().items()}, torch.get_rng_state()
        logs = observe_steps(trainer, module, batch, 0, record_calls)
        assert all(value.equal(before[key]) for key, value in module.state_dict().items())
        assert torch.equal(torch.get_rng_state(), state) and module.training
        return [sorted(log.callers) for log in logs]

    layers = ["body", "flatten", "head", "norm"]
    # The training step and an evaluation call the module's forward as a method, or the module itself.
    assert in_training(Classifier(), observe) == [["", *layers]] * 3
    assert in_training(ManualClassifier(), observe) == [["", *layers]] * 2


def test_calls_for_shapes_are_those_of_a_step_or_of_the_example() -> None:
    def calls(trainer: pl.Trainer, module: Any, batch: Any) -> Any:
        return example_calls(trainer, make_probe(trainer, module), batch, "test")

    [(path, (args, kwargs))] = in_training(Classifier(), calls).items()
    assert path == "" and args[0].shape == (8, 16) and kwargs == {}

    class Encoder(Classifier):
        """Its steps don't call its forward."""

        def evaluate(self, batch: Any, stage: str) -> None:
            self.head(self.norm(self.body(batch[0])))

    assert list(in_training(Encoder(), calls)) == ["body", "norm", "head"]
    with pytest.raises(CompressionError, match="`training_step`: no batch was seen"):
        in_training(Classifier(), lambda trainer, module, _: calls(trainer, module, None))
    module: Any = Classifier()
    module.example_input_array = torch.ones(3, 16)
    [(args, _)] = in_training(module, lambda trainer, module, _: calls(trainer, module, None)).values()
    assert args[0].shape == (3, 16)


@pytest.mark.filterwarnings("ignore:You have overridden `on_after_batch_transfer`")
def test_a_loaders_batch_goes_through_the_hooks_that_are_the_users() -> None:
    class Data(TinyData):
        def loader(self, dataset: Dataset[tuple[Tensor, ...]]) -> DataLoader[tuple[Tensor, ...]]:
            return DataLoader(dataset, batch_size=4)

        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [2 * batch[0], *batch[1:]]

    class Doubles(Classifier):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0] + 1, *batch[1:]]

    callback = InTraining(lambda trainer, module, batch: to_module(trainer, module, [torch.ones(1, 16), torch.ones(1)]))
    quiet_trainer(max_steps=1, callbacks=[callback]).fit(Doubles(), Data())
    assert callback.result[0].unique().item() == 3
    assert is_own(Data(), "on_before_batch_transfer") and not is_own(Data(), "on_after_batch_transfer")
    assert not is_own(nn.Linear(1, 1), "test_step") and is_own(Classifier(), "test_step")
