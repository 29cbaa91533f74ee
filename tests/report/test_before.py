"""The row before has metrics, with their origin, if they were measured on these weights and on the same data."""

from __future__ import annotations

import copy
import random
from typing import Any

import lightning as L
import numpy
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_compress import PostTrainingQuantization, QuantizationAwareTraining, ScheduledPruning
from lightning_compress.errors import CompressionError
from lightning_compress.report import CompressionReport
from lightning_compress.report.compare import Comparison
from tests.report.models import Classifier, images
from tests.report.test_callback import SwapForTest, report, trainer

pytestmark = [
    # A loader of three batches is what these tests want, and one that draws numbers.
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling enabled"),
]


def metrics(callback: CompressionReport) -> dict[str, dict[str, float]]:
    assert callback.comparison is not None
    return {row.name: row.metrics for row in callback.comparison.rows}


def origins(callback: CompressionReport) -> dict[str, dict[str, str]]:
    assert isinstance(callback.comparison, Comparison)
    return {row.name: row.origins for row in callback.comparison.rows}


def seasoned(**settings: Any) -> Classifier:
    """A classifier whose BatchNorm has seen data."""
    model = Classifier(**settings)
    model.net(images()[0])
    return model


@pytest.mark.parametrize("stage", ["test", "validate"])
def test_an_evaluation_before_fit_is_the_metric_before(tmp_path, stage: str) -> None:
    callback, model = report(), seasoned()
    run = trainer(tmp_path, callback, ScheduledPruning(sparsity=0.5))
    name = "test_acc" if stage == "test" else "val_acc"
    before = getattr(run, stage)(model, verbose=False)[0][name]
    run.fit(model)
    after = getattr(run, stage)(model, verbose=False)[0][name]
    assert metrics(callback)["before"] == {name: pytest.approx(before)}
    assert metrics(callback)["after"][name] == pytest.approx(after)
    words = {"test": "test", "validate": "validation"}[stage]
    assert origins(callback)["before"] == {name: f"{words} before fit"}
    assert origins(callback)["after"][name] == words
    assert callback.comparison is not None
    assert callback.comparison["after"].metric_changes[name] == pytest.approx(after - before)


def test_a_metric_of_other_weights_is_none_of_the_row_before(tmp_path) -> None:
    callback, model = report(), seasoned()
    run = trainer(tmp_path, callback)
    run.test(model, verbose=False)
    with torch.no_grad():
        model.net.head.bias.add_(1.0)
    run.fit(model)
    assert metrics(callback)["before"] == {}


def test_a_metric_of_other_data_is_left_out_with_a_note(tmp_path) -> None:
    callback, model = report(), seasoned()
    trainer(tmp_path, callback, limit_test_batches=1).test(model, verbose=False)
    run = trainer(tmp_path, callback)
    run.fit(model)
    run.test(model, verbose=False)
    assert metrics(callback)["before"] == {} and "test_acc" in metrics(callback)["after"]
    assert callback.comparison is not None
    assert "test_acc" not in callback.comparison["after"].metric_changes
    [note] = [note for note in callback.comparison.notes if "other data" in note]
    assert "8 samples and not 24" in note


def test_an_untrained_network_is_called_so(tmp_path) -> None:
    callback, model = report(), Classifier()
    run = trainer(tmp_path, callback)
    run.test(model, verbose=False)
    run.fit(model)
    assert origins(callback)["before"] == {"test_acc": "test before fit, untrained"}


@pytest.mark.parametrize("first", [True, False])
def test_the_float_model_beside_the_quantized_one_is_the_row_before(tmp_path, first: bool) -> None:
    callback, ptq = report(), PostTrainingQuantization("int8_static", compare=True)
    run = trainer(tmp_path, *([callback, ptq] if first else [ptq, callback]))
    logged = run.test(seasoned(), verbose=False)[0]
    assert metrics(callback) == {
        "before": {"test_acc": pytest.approx(logged["float/test_acc"])},
        "after": {"test_acc": pytest.approx(logged["test_acc"])},
    }
    assert origins(callback)["before"] == {"test_acc": "float beside quantized in test"}
    # The weights were measured: a fit that starts from them knows it.
    model = seasoned()
    run.test(model, verbose=False)
    trainer(tmp_path, callback, limit_val_batches=0).fit(model)
    assert origins(callback)["before"] == {"test_acc": "float beside quantized in test before fit"}


def test_after_a_fit_the_float_model_is_the_row_after(tmp_path) -> None:
    callback = report()
    run = trainer(tmp_path, PostTrainingQuantization("int8_static", compare=True), callback)
    model = seasoned()
    run.fit(model)
    run.test(model, verbose=False)
    found = metrics(callback)
    assert list(found) == ["before", "after", "tested"]
    assert "test_acc" in found["after"] and "test_acc" in found["tested"]
    assert not [name for row in found.values() for name in row if "float/" in name]


def test_without_a_test_the_last_validation_of_fit_is_the_metric_after(tmp_path) -> None:
    callback = report()
    trainer(tmp_path, callback, max_epochs=3, check_val_every_n_epoch=2).fit(seasoned())
    assert origins(callback)["after"] == {"val_acc": "last validation of fit, at step 6 of 9"}
    callback = report()
    trainer(tmp_path, callback, QuantizationAwareTraining()).fit(seasoned())
    assert origins(callback)["after"] == {"val_acc": "last validation of fit, prepared and not yet converted"}


class Watching(Classifier):
    """A module whose validation leaves traces of every kind, if it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(4, average="micro")
        self.outputs: list[Tensor] = []
        self.validations = 0
        self.register_buffer("seen", torch.zeros(()))

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        torch.rand(()), random.random(), numpy.random.rand()
        logits = self(batch[0])
        self.accuracy(logits, batch[1])
        self.log("val_acc", self.accuracy)
        self.outputs.append(logits.argmax(1) == batch[1])
        self.seen += 1

    def on_validation_epoch_end(self) -> None:
        assert self.trainer.sanity_checking is False
        self.log("val_own", torch.cat(self.outputs).float().mean())
        self.outputs.clear()
        self.validations += 1


class Counts(L.Callback):
    def __init__(self) -> None:
        self.validations = 0

    def on_validation_start(self, *args: Any) -> None:
        self.validations += 1


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("generator", [False, True], ids=["", "generator of the loader"])
def test_validate_before_is_the_validation_and_leaves_no_trace(tmp_path, first: bool, generator: bool) -> None:
    states, traces, found = [], [], {}
    for asked in (False, True):
        torch.manual_seed(5), random.seed(5), numpy.random.seed(5)
        model, counts = Watching(), Counts()
        model.net(images()[0])
        start, shuffled = copy.deepcopy(model), torch.Generator().manual_seed(1) if generator else None
        data = TensorDataset(*images())
        train = DataLoader(data, 8, shuffle=True, generator=shuffled)
        val = DataLoader(data, 8, sampler=torch.utils.data.RandomSampler(data, generator=shuffled))
        callback = report(validate_before=asked)
        callbacks = [callback, ScheduledPruning(sparsity=0.5)][:: 1 if first else -1]
        run = trainer(tmp_path, *callbacks, counts, num_sanity_val_steps=0, max_epochs=2)
        run.fit(model, train, val)
        states.append({**model.state_dict(), "random": torch.get_rng_state()})
        traces.append((model.validations, model.outputs, counts.validations, random.random(), numpy.random.rand()))
        if asked:
            found = metrics(callback)["before"]
            assert set(origins(callback)["before"].values()) == {"validation before fit"}
            expected = trainer(tmp_path).validate(start, val, verbose=False)[0]
            assert found == pytest.approx(expected) and set(found) == {"val_acc", "val_own"}
    assert traces[0] == traces[1]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_validate_before_counts_all_batches_and_several_loaders(tmp_path) -> None:
    class Two(Classifier):
        def val_dataloader(self) -> Any:
            return [self.loader(), DataLoader(TensorDataset(*images(8)), batch_size=8)]

        def validation_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
            super().validation_step(batch, batch_idx)

    callback, model = report(validate_before=True), Two()
    expected = trainer(tmp_path).validate(model, verbose=False)
    trainer(tmp_path, callback, num_sanity_val_steps=2).fit(model)
    assert metrics(callback)["before"] == pytest.approx({**expected[0], **expected[1]})


def test_validate_before_of_a_module_without_validation_is_a_note(tmp_path) -> None:
    class Plain(Classifier):
        validation_step = L.LightningModule.validation_step
        val_dataloader = L.LightningModule.val_dataloader

    callback = report(validate_before=True)
    with pytest.warns(UserWarning, match="^CompressionReport: before: no metrics: "):
        trainer(tmp_path, callback).fit(Plain())
    assert callback.comparison is not None and metrics(callback)["before"] == {}
    assert [note for note in callback.comparison.notes if note.startswith("before: no metrics")]


def test_validate_before_in_several_processes_is_a_note(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(L.Trainer, "world_size", 2)
    callback = report(validate_before=True)
    callback._start(None)
    with pytest.raises(CompressionError, match=r"one process. Received: .*=2. Call trainer.validate before fit"):
        callback._validate(trainer(tmp_path), Classifier())


def test_rows_are_timed_together_when_all_are_there(tmp_path) -> None:
    callback, model = report(), seasoned()
    run = trainer(tmp_path, callback, SwapForTest())
    run.fit(model)
    assert callback.comparison is not None
    turns = [{one.turns for one in row.measurement.latency} for row in callback.comparison.rows]
    assert len(turns[0]) == 1 and turns[0] == turns[1]
    run.test(model, verbose=False)
    again = [{one.turns for one in row.measurement.latency} for row in callback.comparison.rows]
    assert [len(row.measurement.latency) for row in callback.comparison.rows] == [2, 2, 2]
    assert again[0] == again[1] == again[2] != turns[0]


def test_the_original_shares_its_memory_while_it_is_kept(tmp_path) -> None:
    callback, model = report(), seasoned()
    trainer(tmp_path, callback).fit(model)
    kept = dict(callback._rows.models["before"].named_parameters())
    assert kept
    for name, parameter in model.named_parameters():
        assert kept[name].data_ptr() == parameter.data_ptr(), name
