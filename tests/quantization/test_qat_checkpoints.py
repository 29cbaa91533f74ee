"""`QuantizationAwareTraining` and checkpoints: files hold float keys, and everything comes back from them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from torch import nn

from lightning_compress import (
    CompressionError,
    QuantizationAwareTraining,
    ScheduledPruning,
    Window,
    load_compressed,
    quantize,
    save_compressed,
)
from lightning_compress.quantization.convert import convert_, forget_
from tests.quantization.prepared import At, fake_quantizers, int8_layers
from tests.quantization.test_qat import observers
from tests.quantization.test_qat_fits import attributes
from tests.support import fits
from tests.support.data import TinyData
from tests.support.fits import every_epoch, read_checkpoint, resume
from tests.support.foreign import FOREIGN
from tests.support.modules import Classifier, ZooModule, quiet_trainer
from tests.support.oracles import (
    assert_different_state,
    assert_float_keys,
    assert_same_state,
    snapshot,
)
from tests.support.zoo import ZOO, Row

pytestmark = [
    # Checkpoints are read by another ModelCheckpoint, in another folder, than the one that wrote them.
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory:UserWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),  # torch, reading a quantized tensor
]


def qat(**kwargs: Any) -> QuantizationAwareTraining:
    return QuantizationAwareTraining(**{"window": Window(0.25), **kwargs})


fit = partial(fits.fit, max_epochs=4)


@pytest.mark.parametrize("others", ["alone", "pruning", "pruning after", "ema", "ema before"])
def test_resumed_equals_uninterrupted(others: str, tmp_path: Path) -> None:
    def callbacks() -> list[Callback]:
        return {
            "alone": lambda: [qat()],
            "pruning": lambda: [ScheduledPruning(sparsity=0.8), qat()],
            "pruning after": lambda: [qat(), ScheduledPruning(sparsity=0.8)],
            "ema": lambda: [qat(), EMAWeightAveraging(decay=0.8)],
            "ema before": lambda: [EMAWeightAveraging(decay=0.8), qat()],
        }[others]()

    (_, whole), (_, resumed) = resume(lambda **files: fit(*callbacks(), **files), tmp_path, 0, 1, 2)
    assert read_checkpoint(tmp_path / "whole/epoch=3.ckpt")["lightning_compress"]["ranges"]
    assert int8_layers(whole) and int8_layers(resumed)
    x = torch.randn(16, 16)
    assert torch.equal(whole.eval()(x), resumed.eval()(x))


def test_different_epochs_differ(tmp_path: Path) -> None:
    fit(qat(), folder=tmp_path / "whole")
    files = [read_checkpoint(tmp_path / f"whole/epoch={epoch}.ckpt") for epoch in range(4)]
    assert "ranges" not in files[0]["lightning_compress"]
    for earlier, later in pairwise(files[1:]):
        assert_different_state(earlier["state_dict"], later["state_dict"])
        assert_different_state(earlier["lightning_compress"]["ranges"], later["lightning_compress"]["ranges"])


QUICK = ("conv_bn_relu", "residual", "attention", "lstm", "shared")
ROWS = [*(pytest.param(row, marks=[pytest.mark.slow] * (row.name not in QUICK)) for row in ZOO), *FOREIGN]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_checkpoints_hold_float_keys_and_bring_the_prepared_and_the_int8_form_back(row: Row, tmp_path: Path) -> None:
    # Q5.
    module = ZooModule(row)
    trainer = quiet_trainer(
        max_epochs=1,
        enable_checkpointing=True,
        callbacks=[QuantizationAwareTraining(convert=False), every_epoch(tmp_path)],
    )
    trainer.fit(module)
    checkpoint = read_checkpoint(tmp_path / "epoch=0.ckpt")
    assert_float_keys(checkpoint, ZooModule(row))
    assert list(checkpoint["state_dict"]) == list(ZooModule(row).state_dict())
    ZooModule(row).load_state_dict(checkpoint["state_dict"], strict=True)
    loaded = load_compressed(str(tmp_path / "epoch=0.ckpt"), ZooModule(row))
    args, kwargs = row.inputs(3)
    module.eval(), loaded.eval()
    assert_same_state({"output": module(*args, **kwargs)}, {"output": loaded(*args, **kwargs)})
    assert_same_state(module, loaded)
    convert_(module), forget_(module)
    save_compressed(module, str(tmp_path / "int8.ckpt"))
    again = load_compressed(
        str(tmp_path / "int8.ckpt"), ZooModule(replace(row, architecture=lambda: row.build(1)))
    ).eval()
    assert int8_layers(again)
    assert_same_state({"output": module(*args, **kwargs)}, {"output": again(*args, **kwargs)})


@pytest.mark.parametrize("weights_only", [False, True], ids=["full", "weights only"])
@pytest.mark.parametrize("average", [False, True], ids=["plain", "ema"])
def test_every_checkpoint_loads_strictly_without_us(weights_only: bool, average: bool, tmp_path: Path) -> None:
    # P13, N8.
    others = [EMAWeightAveraging(decay=0.5)] if average else []
    trainer = quiet_trainer(
        max_epochs=3,
        enable_checkpointing=True,
        callbacks=[qat(), *others, every_epoch(tmp_path, save_weights_only=weights_only)],
    )
    trainer.fit(Classifier(), TinyData())
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) == 3
    for path in files:
        checkpoint = read_checkpoint(path)
        assert_float_keys(checkpoint, Classifier())
        if "current_model_state" in checkpoint:
            assert_float_keys({"state_dict": checkpoint["current_model_state"]}, Classifier())
        Classifier().load_state_dict(checkpoint["state_dict"], strict=True)
        assert_same_state(checkpoint["state_dict"], Classifier.load_from_checkpoint(path, weights_only=True))
        quiet_trainer().test(Classifier(), TinyData(), ckpt_path=path, verbose=False, weights_only=True)


@pytest.mark.parametrize("weights_only", [False, True], ids=["full", "weights only"])
def test_a_prepared_file_is_validated_fake_quantized_and_tested_in_int8(weights_only: bool, tmp_path: Path) -> None:
    # Q4, promise 9.
    trainer = quiet_trainer(
        max_epochs=2,
        enable_checkpointing=True,
        callbacks=[qat(), every_epoch(tmp_path, save_weights_only=weights_only)],
    )
    trained = Classifier()
    trainer.fit(trained, TinyData())
    in_memory = quiet_trainer(callbacks=[qat()]).test(trained, TinyData(), verbose=False)
    path = tmp_path / "epoch=1.ckpt"
    module, data = Classifier(), TinyData()
    trainer = quiet_trainer(callbacks=[qat()])
    fake: list[int] = []
    watch = At(on_validation_batch_end=lambda t, m: fake.append(len(fake_quantizers(m)) - 100 * len(int8_layers(m))))
    quiet_trainer(callbacks=[qat(), watch]).validate(module, data, ckpt_path=path, verbose=False, weights_only=True)
    assert fake and min(fake) > 0
    assert trainer.test(module, data, ckpt_path=path, verbose=False, weights_only=True) == in_memory
    assert int8_layers(module)
    fresh = Classifier()
    predictions = quiet_trainer(callbacks=[qat()]).predict(fresh, data, ckpt_path=path, weights_only=True)
    assert int8_layers(fresh)
    data.setup("test")
    torch.testing.assert_close(torch.cat(predictions), module.eval()(data.test.tensors[0]))  # in other batches


def test_after_a_fit_test_and_test_of_the_best_and_fit_again(tmp_path: Path) -> None:
    # Q4, Q6.
    module, data = Classifier(), TinyData()
    best = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=1)
    trainer = quiet_trainer(max_epochs=3, enable_checkpointing=True, callbacks=[qat(window=Window()), best])
    trainer.fit(module, data)
    assert int8_layers(module)
    trainer.test(module, data, verbose=False)
    trainer.test(module, data, ckpt_path="best", verbose=False)
    assert int8_layers(module)
    trainer.validate(module, data, ckpt_path="best", verbose=False)
    assert fake_quantizers(module)
    trainer.predict(module, data, ckpt_path="best")
    assert int8_layers(module)
    trainer.fit_loop.max_epochs = 5
    module.train()  # as after every evaluation of a loaded file in Lightning
    trainer.fit(module, data)
    assert int8_layers(module)
    trainer.test(module, data, ckpt_path="best", verbose=False)


def test_the_monitored_metric_is_that_of_the_saved_prepared_model(tmp_path: Path) -> None:
    saved: dict[str, float] = {}

    class Records(ModelCheckpoint):
        def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
            super()._save_checkpoint(trainer, filepath)
            saved[filepath] = float(trainer.callback_metrics["val_loss"])

    quiet_trainer(
        max_epochs=3,
        enable_checkpointing=True,
        callbacks=[qat(), Records(tmp_path, filename="{epoch}", monitor="val_loss", save_top_k=-1)],
    ).fit(Classifier(), TinyData())
    assert len(saved) == 3
    for path, metric in saved.items():
        module = Classifier()
        loss = quiet_trainer(callbacks=[qat()]).validate(
            module, TinyData(), ckpt_path=path, verbose=False, weights_only=True
        )
        assert loss[0]["val_loss"] == pytest.approx(metric, rel=1e-6)


def test_a_file_from_before_the_window_is_float_and_says_so(tmp_path: Path) -> None:
    fit(qat(window=Window(0.5)), folder=tmp_path)
    module = Classifier()
    with pytest.warns(UserWarning, match="saved before quantization began; they run as float"):
        quiet_trainer(callbacks=[qat()]).test(
            module, TinyData(), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False, weights_only=True
        )
    assert not fake_quantizers(module) and not int8_layers(module)


def converted_file(folder: Path) -> Path:
    module = Classifier()
    trainer = quiet_trainer(max_epochs=2, callbacks=[qat()])
    trainer.fit(module, TinyData())
    trainer.save_checkpoint(folder / "int8.ckpt")
    return folder / "int8.ckpt"


def test_a_converted_file_is_for_test_predict_and_load_compressed(tmp_path: Path) -> None:
    # Q23.
    path, data = converted_file(tmp_path), TinyData()
    read_checkpoint(path)  # weights_only=True
    loaded = load_compressed(str(path), Classifier())
    assert int8_layers(loaded)
    tested, predicted = Classifier(), Classifier()
    metrics = quiet_trainer(callbacks=[qat()]).test(tested, data, ckpt_path=path, verbose=False, weights_only=True)
    assert metrics == quiet_trainer().test(loaded, data, verbose=False)
    quiet_trainer(callbacks=[qat()]).predict(predicted, data, ckpt_path=path, weights_only=True)
    x = torch.randn(5, 16)
    assert torch.equal(loaded.eval()(x), tested.eval()(x)) and torch.equal(loaded(x), predicted.eval()(x))
    assert loaded.state_dict()["body.weight"].dtype == torch.int8


def test_training_from_a_converted_file_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    path, module = converted_file(tmp_path), Classifier()
    before, had = snapshot(module), attributes(module)
    with pytest.raises(
        CompressionError, match="`ckpt_path` must be a float or a prepared checkpoint.*saved during training"
    ):
        quiet_trainer(max_epochs=3, callbacks=[qat()]).fit(module, TinyData(), ckpt_path=path, weights_only=True)
    assert_same_state(before, module)
    assert attributes(module) == had


@pytest.mark.filterwarnings("ignore:.*must be float to go on")
def test_training_a_model_whose_float_weights_are_gone_is_refused(tmp_path: Path) -> None:
    module = load_compressed(str(converted_file(tmp_path)), Classifier())
    with pytest.raises(CompressionError, match="must be float to train.*float weights.*are gone"):
        quiet_trainer(callbacks=[qat()]).fit(module, TinyData())
    assert int8_layers(module)
    assert module.eval()(torch.zeros(2, 16)).shape == (2, 4)


def test_load_compressed_gives_a_prepared_model_that_trains_on_with_its_observers(tmp_path: Path) -> None:
    fit(qat(), folder=tmp_path, max_epochs=2)
    module = load_compressed(str(tmp_path / "epoch=1.ckpt"), Classifier())
    expected = observers(module)
    assert expected
    seen: list[Any] = []
    start = At(on_train_start=lambda t, m: seen.append(observers(m)))
    quiet_trainer(callbacks=[qat(window=Window()), start]).fit(module, TinyData())
    assert_same_state(expected, seen[0])
    assert int8_layers(module)


@pytest.mark.parametrize("content", ["missing", "text", "other model", "missing module", "newer", "missing key"])
@pytest.mark.parametrize("kind", ["prepared", "converted"])
@pytest.mark.parametrize("way", ["load_compressed", "test"])
def test_a_load_that_fails_leaves_the_model_bit_identical(way: str, kind: str, content: str, tmp_path: Path) -> None:
    if kind == "prepared":
        fit(qat(), folder=tmp_path, max_epochs=2)
        path = tmp_path / "epoch=1.ckpt"
    else:
        path = converted_file(tmp_path)
    checkpoint = read_checkpoint(path)
    module: Any = Classifier()
    if content == "missing":
        path.unlink()
    elif content == "text":
        path.write_text("nothing")
    elif content == "other model":
        module = Classifier(hidden=8)
    elif content == "missing module":

        class Other(Classifier):
            def __init__(self) -> None:
                super().__init__()
                self.trunk = self.body
                del self.body

        module = Other()
    elif content == "newer":
        checkpoint["lightning_compress"]["version"] = 2
        torch.save(checkpoint, path)
    else:
        key = next(key for key in checkpoint["state_dict"] if "head" in key)
        del checkpoint["state_dict"][key]
        torch.save(checkpoint, path)
    before, had = snapshot(module), attributes(module)
    if way == "load_compressed":
        with pytest.raises(CompressionError, match="`path`|version|no such module"):
            load_compressed(str(path), module)
    else:
        with pytest.raises(Exception) as caught:
            quiet_trainer(callbacks=[qat()]).test(module, TinyData(), ckpt_path=path, verbose=False, weights_only=True)
        assert not isinstance(caught.value, (AttributeError, AssertionError))
    assert_same_state(before, module)
    assert attributes(module) == had


def test_quantize_of_a_trained_model_saves_nothing_of_ours_into_the_float_model(tmp_path: Path) -> None:
    _, module = fit(folder=tmp_path, max_epochs=1)
    before = attributes(module)
    quantize(module, calibration=[(torch.randn(8, 16),)])
    assert attributes(module) == before


def test_test_without_the_callback_right_after_a_fit_runs_int8() -> None:
    module = Classifier()
    trainer = quiet_trainer(callbacks=[qat(window=Window())])
    trainer.fit(module, TinyData())
    ours = trainer.test(module, TinyData(), verbose=False)
    assert quiet_trainer().test(module, TinyData(), verbose=False) == ours
    assert int8_layers(module)


def test_load_compressed_into_a_plain_torch_module(tmp_path: Path) -> None:
    # The network alone, without Lightning, as a server loads it.
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    torch.save({"state_dict": net.state_dict()}, tmp_path / "plain.ckpt")
    other = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    load_compressed(str(tmp_path / "plain.ckpt"), other)
    assert_same_state(net, other)
