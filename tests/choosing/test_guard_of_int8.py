"""`AccuracyGuard` beside what quantizes: the worst layers stay float, the metric stays, and nothing else is touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_compress import (
    AccuracyGuard,
    CompressionError,
    NoEffectWarning,
    PostTrainingQuantization,
    QuantizationAwareTraining,
    load_compressed,
)
from lightning_compress.cli import main
from lightning_compress.quantization import convert
from tests.choosing.nets import PLAIN, Labelled, Right
from tests.support.data import TinyData
from tests.support.ddp import run_ranks
from tests.support.modules import Classifier, quiet_trainer
from tests.support.oracles import assert_same_state, snapshot

pytestmark = pytest.mark.filterwarnings("ignore:The quantized model is far from the float one")


class Counting(TensorDataset):
    """Counts the samples that are read of it."""

    count = 0

    def __getitem__(self, index: Any) -> Any:
        self.count += 1
        return super().__getitem__(index)


def test(module: Any, data: Any, guard: AccuracyGuard | None, scheme: Any = PLAIN, **options: Any) -> Any:
    ptq = PostTrainingQuantization(scheme, calibration_batches=8)
    trainer = quiet_trainer(callbacks=[ptq, *([guard] if guard else [])], **options)
    [metrics] = trainer.test(module, data, verbose=False)
    return metrics, ptq


test.__test__ = False  # type: ignore[attr-defined]


def in_int8(ptq: PostTrainingQuantization) -> dict[str, Any]:
    record = convert.record_of(ptq.quantized_model)
    assert record is not None
    return record


@pytest.mark.parametrize("inference_mode", [True, False])
def test_the_layer_that_breaks_it_stays_float(inference_mode: bool) -> None:
    module, data = Right(), Labelled()
    before = snapshot(module)
    assert test(module, data, None)[0]["test_acc"] < 0.5
    guard = AccuracyGuard("val_acc", max_drop=0.01)
    metrics, ptq = test(module, data, guard, inference_mode=inference_mode)
    assert metrics["test_acc"] >= 0.99
    assert in_int8(ptq)["units"][0]["floats"] == ["4"] and in_int8(ptq)["floats"] == {"net.4": "excluded"}
    assert_same_state(before, snapshot(module))
    notes = guard.report_notes()
    assert "val_acc is 1 in float" in notes[0] and "`net.4` in float (+" in notes[1] and "3 evaluations" in notes[-1]
    quiet_trainer(max_epochs=1).fit(module, data)  # the float model trains on


def test_what_keeps_its_metric_is_all_int8() -> None:
    guard = AccuracyGuard("val_acc", max_drop=0.01)
    metrics, ptq = test(Right(outliers=False), Labelled(), guard)
    assert metrics["test_acc"] >= 0.99 and not in_int8(ptq)["floats"]
    assert guard.report_notes()[-1] == "AccuracyGuard: 2 evaluations"


def test_a_loss_may_rise_by_so_much() -> None:
    metrics, _ = test(Right(), Labelled(), AccuracyGuard("val_loss", max_drop=0.05, mode="min"))
    [floats] = quiet_trainer().test(Right(), Labelled(), verbose=False)
    assert abs(metrics["test_loss"] - floats["test_loss"]) < 0.05


def test_costs_no_more_evaluations_than_it_says_and_no_test_data() -> None:
    data, guard = Labelled(), AccuracyGuard("val_acc", max_drop=0.01)
    data.parts = [Counting(*part.tensors) for part in data.parts]
    test(Right(), data, None)
    without = [part.count for part in data.parts]
    test(Right(), data, guard)
    assert guard.report_notes()[-1] == "AccuracyGuard: 3 evaluations"
    # It is calibrated once more.
    assert [part.count for part in data.parts] == [3 * without[0], 3 * 800, 2 * without[2]] and without[1] == 0


class Spiked(Labelled):
    """One sample of training is an outlier, so that all activations have too wide a range, and weights don't."""

    def calibration_dataloader(self) -> DataLoader[Any]:
        x, y = self.parts[0].tensors
        return DataLoader(TensorDataset(torch.cat([x[:1] * 1e4, x[1:]]), y), batch_size=50)


def test_layers_go_back_to_another_scheme() -> None:
    guard = AccuracyGuard("val_acc", max_drop=0.01, fallback="int8_weight_only")
    metrics, ptq = test(Right(outliers=False), Spiked(), guard)
    assert metrics["test_acc"] >= 0.99
    layers = in_int8(ptq)["layers"]
    assert layers and {layer["scheme"]["name"] for layer in layers} == {"int8_weight_only"}


def test_few_bits_are_guarded_too() -> None:
    guard = AccuracyGuard("val_acc", max_drop=0.01)
    metrics, ptq = test(Right(), Labelled(), guard, "int4_weight_only")
    assert metrics["test_acc"] >= 0.98
    assert in_int8(ptq)["layers"]


class Hopeless(Right):
    """Is right only in float: each layer has outliers of its own, and little else."""

    def __init__(self) -> None:
        super().__init__()
        scale = torch.logspace(0, 6, 16)
        self.register_buffer("scale", scale)
        self.net[0].weight.data /= scale
        scale = torch.logspace(0, 4, 48)
        self.net[0].weight.data *= scale[:, None]
        self.net[0].bias.data *= scale
        self.net[2].weight.data /= scale
        self.net[4].weight.data *= scale[:, None]
        self.net[4].bias.data *= scale
        self.net[6].weight.data /= scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x * self.scale)


def test_an_error_names_the_layers_and_leaves_the_model_as_it_was() -> None:
    module = Hopeless()
    before = snapshot(module)
    with pytest.raises(CompressionError) as raised:
        test(module, Labelled(), AccuracyGuard("val_acc", max_drop=0.005))
    assert "`max_drop` must be one that int8_static can keep. Received: max_drop=0.005. With all but `" in str(
        raised.value
    )
    assert "the layers that change the outputs most are `net." in str(raised.value)
    assert_same_state(before, snapshot(module))
    assert convert.record_of(module) is None
    [metrics] = quiet_trainer().test(module, Labelled(), verbose=False)
    assert metrics["test_acc"] > 0.99


def test_forty_images_prove_no_point() -> None:
    module = Right()
    with pytest.raises(CompressionError, match="`max_drop` must be one that 40 samples of validation can prove"):
        test(module, Labelled(validation=40, batch_size=10), AccuracyGuard("val_acc", max_drop=0.01))
    assert convert.record_of(module) is None


def test_without_validation_data_there_is_no_guard() -> None:
    module, data = Right(), Labelled()
    module.calibration_dataloader = data.train_dataloader
    with pytest.raises(CompressionError, match="`val_dataloader` must be there to guard a metric"):
        test(module, data.test_dataloader(), AccuracyGuard("val_acc", max_drop=0.01))


def test_a_guard_of_nothing_says_so() -> None:
    with pytest.warns(NoEffectWarning, match="AccuracyGuard: no callback of this Trainer can be guarded"):
        quiet_trainer(callbacks=[AccuracyGuard("val_acc", max_drop=0.5)]).test(Classifier(), TinyData(), verbose=False)


@pytest.mark.parametrize("stage", ["validate", "predict"])
def test_validate_and_predict_are_guarded_too(stage: str) -> None:
    class Predicts(Right):
        def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self(batch[0])

    ptq, data = PostTrainingQuantization(PLAIN, calibration_batches=8), Labelled()
    data.predict_dataloader = data.test_dataloader
    trainer = quiet_trainer(callbacks=[ptq, AccuracyGuard("val_acc", max_drop=0.01)])
    getattr(trainer, stage)(Predicts(), datamodule=data)
    assert in_int8(ptq)["floats"] == {"net.4": "excluded"}


# Beside training for int8: when the fit ends.


def fit(module: Any, guard: AccuracyGuard, folder: Path | None = None) -> Any:
    callbacks = [QuantizationAwareTraining(), guard]
    trainer = quiet_trainer(max_epochs=1, callbacks=callbacks)
    trainer.fit(module, Labelled())
    if folder is not None:
        trainer.save_checkpoint(folder / "int8.ckpt")
    return trainer


@pytest.mark.parametrize("max_drop", [0.01, pytest.param(0.99, marks=pytest.mark.slow)])
def test_training_for_int8_is_guarded_when_it_is_converted(max_drop: float, tmp_path: Path) -> None:
    module, guard = Right(), AccuracyGuard("val_acc", max_drop=max_drop)
    trainer = fit(module, guard, tmp_path)
    record = convert.record_of(module)
    assert record is not None and record["form"] == "converted"
    assert record["floats"] == ({"net.4": "excluded"} if max_drop == 0.01 else {})
    [metrics] = trainer.test(module, Labelled(), verbose=False)
    assert (metrics["test_acc"] >= 0.99) == (max_drop == 0.01)
    x = Labelled().parts[2][:20][0]
    loaded = load_compressed(tmp_path / "int8.ckpt", Right()).eval()
    assert torch.equal(loaded(x), module.eval()(x))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, Labelled())


def test_what_no_form_keeps_ends_the_fit_with_a_float_model() -> None:
    module = Hopeless()
    with pytest.raises(CompressionError, match="`max_drop` must be one that int8_static can keep"):
        fit(module, AccuracyGuard("val_acc", max_drop=0.005))
    assert convert.record_of(module) is None


class Unlike(Labelled):
    """Each rank would decide by data of its own."""

    def val_dataloader(self) -> DataLoader[Any]:
        first = torch.distributed.get_rank() * 400
        return DataLoader(Subset(self.parts[1], range(first, first + 400)), batch_size=25)


def on_two_ranks() -> dict[str, Any]:
    ptq, guard = PostTrainingQuantization(PLAIN, calibration_batches=8), AccuracyGuard("val_acc", max_drop=0.01)
    trainer = quiet_trainer(devices=2, strategy="ddp", callbacks=[ptq, guard])
    trainer.test(Right(), Unlike(), verbose=False)
    return {
        "floats": in_int8(ptq)["floats"],
        "notes": guard.report_notes(),
        "acc": trainer.callback_metrics["test_acc"],
    }


@pytest.mark.slow
def test_all_ranks_decide_alike() -> None:
    first, second = run_ranks(on_two_ranks)
    assert first["floats"] == second["floats"] == {"net.4": "excluded"} and first["acc"] >= 0.99
    falls = [[note.partition(": ")[2].rpartition("): ")[2] for note in rank["notes"]] for rank in (first, second)]
    assert falls[0] == falls[1]


def test_from_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        """
model: {class_path: tests.choosing.nets.Right}
data: {class_path: tests.choosing.nets.Labelled}
trainer:
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  callbacks:
    - class_path: PostTrainingQuantization
      init_args:
        scheme: {class_path: StaticInt8, init_args: {equalize: false, smooth: false}}
        calibration_batches: 8
    - class_path: AccuracyGuard
      init_args: {monitor: val_acc, max_drop: 0.01}
"""
    )
    main(["test", "--config", str(config)])
    assert "1.0" in capsys.readouterr().out
