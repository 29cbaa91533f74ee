"""Files and averages of a model that trains in few bits."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, StochasticWeightAveraging
from torch import Tensor

from lightning_compress import (
    CompressionError,
    ScheduledPruning,
    Window,
    load_compressed,
)
from tests.quantization.few_bits_fits import packed, qat, rounded, trained_in_few_bits
from tests.quantization.lora.fits import At, Net, fit, mlp
from tests.support.data import TinyData
from tests.support.fits import read_checkpoint, resume
from tests.support.modules import Classifier, quiet_trainer
from tests.support.oracles import (
    assert_different_state,
    assert_float_keys,
    assert_same_state,
    snapshot,
)

pytestmark = [
    # Checkpoints are read by another ModelCheckpoint, in another folder, than the one that wrote them.
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory:UserWarning"),
]

# Checkpoints.


OTHERS = {
    "alone": lambda: [],
    "ema": lambda: [EMAWeightAveraging(decay=0.9)],
    "pruning": lambda: [ScheduledPruning(sparsity=0.5)],
}


@pytest.mark.parametrize("others", ["alone", "ema"])
@pytest.mark.parametrize("weights_only", [False, True], ids=["whole", "weights only"])
def test_every_checkpoint_holds_float_keys_and_loads_strictly_without_us(
    others: str, weights_only: bool, tmp_path: Path
) -> None:
    _, module = fit(
        qat(4, 8, window=Window(0.4)), *OTHERS[others](), folder=tmp_path, save_weights_only=weights_only, max_epochs=3
    )
    assert list(packed(module)) == ["body"]
    for epoch in range(3):
        path = tmp_path / f"epoch={epoch}.ckpt"
        checkpoint = read_checkpoint(path)
        assert list(checkpoint["state_dict"]) == list(Classifier().state_dict())
        assert_float_keys(checkpoint, Classifier())
        if "current_model_state" in checkpoint:
            assert_float_keys({"state_dict": checkpoint["current_model_state"]}, Classifier())
        assert_same_state(checkpoint["state_dict"], Classifier.load_from_checkpoint(path, weights_only=True))
        quiet_trainer().test(Classifier(), TinyData(), ckpt_path=path, verbose=False, weights_only=True)
        loaded = load_compressed(path, Classifier())
        assert trained_in_few_bits(loaded) == ([] if epoch == 0 else ["body"])


@pytest.mark.parametrize("others", OTHERS)
def test_resumed_equals_uninterrupted(others: str, tmp_path: Path) -> None:
    def run(**files: Any) -> Any:
        return fit(qat(3, 8, window=Window(0.4)), *OTHERS[others](), max_epochs=3, **files)[1]

    whole, resumed = resume(run, tmp_path, 0, 1)
    assert_same_state(snapshot(whole), snapshot(resumed))
    assert list(packed(resumed)) == ["body"]
    files = [read_checkpoint(tmp_path / f"whole/epoch={epoch}.ckpt")["state_dict"] for epoch in range(3)]
    for earlier, later in pairwise(files):
        assert_different_state(earlier, later)


@pytest.mark.parametrize("weights_only", [False, True], ids=["whole", "weights only"])
def test_a_prepared_file_is_converted_for_test_and_predict_and_validated_as_it_is(
    weights_only: bool, tmp_path: Path
) -> None:
    _, trained = fit(qat(2, 8), folder=tmp_path, save_weights_only=weights_only, max_epochs=3)
    data, path = TinyData(), tmp_path / "epoch=2.ckpt"
    expected = quiet_trainer().test(trained, data, verbose=False)
    fresh = Classifier()
    trainer = quiet_trainer(callbacks=[qat(2, 8)])
    assert trainer.test(fresh, data, ckpt_path=path, verbose=False, weights_only=True) == expected
    assert list(packed(fresh)) == ["body"]
    other = Classifier()
    predictions = torch.cat(
        quiet_trainer(callbacks=[qat(2, 8)]).predict(other, data, ckpt_path=path, weights_only=True)
    )
    torch.testing.assert_close(predictions, trained.eval()(data.test.tensors[0]), rtol=1e-5, atol=1e-6)
    third = Classifier()
    loss = quiet_trainer(callbacks=[qat(2, 8)]).validate(third, data, ckpt_path=path, verbose=False, weights_only=True)
    assert trained_in_few_bits(third) == ["body"] and not packed(third)
    converted = quiet_trainer().validate(trained, data, verbose=False)
    assert loss[0]["val_loss"] == pytest.approx(converted[0]["val_loss"], rel=1e-5)


def test_a_converted_file_comes_back_and_is_not_trained(tmp_path: Path) -> None:
    trainer, module = fit(qat(4, 8))
    trainer.save_checkpoint(tmp_path / "int4.ckpt")
    loaded = load_compressed(tmp_path / "int4.ckpt", Classifier())
    x = torch.randn(4, 16)
    assert torch.equal(loaded.eval()(x), module.eval()(x))
    assert_same_state(module, loaded)
    with pytest.raises(CompressionError, match="`ckpt_path` must be a float or a prepared checkpoint"):
        fit(qat(4, 8), folder=tmp_path, ckpt_path=tmp_path / "int4.ckpt", max_epochs=3)


def test_load_compressed_gives_a_prepared_model_that_trains_on(tmp_path: Path) -> None:
    fit(qat(4, 8), folder=tmp_path, max_epochs=3)
    module = load_compressed(tmp_path / "epoch=2.ckpt", Classifier())
    assert trained_in_few_bits(module) == ["body"]
    fit(qat(4, 8), module=module)
    assert list(packed(module)) == ["body"]


def test_a_fresh_module_that_never_ran_converts_alike(tmp_path: Path) -> None:
    # Nothing but the weights decides the codes.
    _, trained = fit(qat(3, 8), folder=tmp_path, max_epochs=3)
    [expected] = packed(trained).values()
    fresh = Classifier()
    quiet_trainer(callbacks=[qat(3, 8)]).test(
        fresh, TinyData(), ckpt_path=tmp_path / "epoch=2.ckpt", verbose=False, weights_only=True
    )
    [got] = packed(fresh).values()
    assert_same_state(expected.tensors(), got.tensors())


def test_resuming_with_other_bits_says_so(tmp_path: Path) -> None:
    fit(qat(4, 8), folder=tmp_path, max_epochs=1)
    with pytest.raises((CompressionError, UserWarning), match="other settings|scheme"):
        fit(qat(2, 8), folder=tmp_path, ckpt_path=tmp_path / "epoch=0.ckpt", max_epochs=2)


# Averages.


@pytest.mark.parametrize("first", [True, False], ids=["QAT first", "QAT last"])
@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_the_average_of_the_float_weights_is_what_is_converted(first: bool, decay: float) -> None:
    callbacks: list[Callback] = [qat(4, 8), EMAWeightAveraging(decay=decay)]
    values: list[Tensor] = []
    note = At(on_train_batch_end=lambda t, m: values.append(m.net[0].weight.detach().clone()))
    module = Net(mlp(24, 4))
    fit(*(callbacks if first else reversed(callbacks)), note, module=module)
    average = values[0]
    for value in values[1:]:
        average = decay * average + (1 - decay) * value
    [weight] = packed(module).values()
    got, expected = weight(), rounded(average, 4, 8)
    # A value at the middle of two codes may fall to either side.
    assert ((got - expected).abs() < 1e-5).float().mean() > 0.99
    torch.testing.assert_close(got, average, rtol=0, atol=float(average.abs().max()) / 7)


@pytest.mark.parametrize("first", [True, False], ids=["QAT first", "QAT last"])
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step", "ignore:Swapping scheduler")
def test_with_stochastic_weight_averaging(first: bool) -> None:
    module = Net(mlp(24, 4))
    callbacks: list[Callback] = [qat(4, 8), StochasticWeightAveraging(0.01, swa_epoch_start=2)]
    starts: list[Tensor] = []
    note = At(on_train_epoch_start=lambda t, m: starts.append(m.net[0].weight.detach().clone()))
    fit(*(callbacks if first else reversed(callbacks)), note, module=module, max_epochs=4)
    [weight] = packed(module).values()
    expected = rounded(torch.stack(starts[1:4]).mean(0), 4, 8)
    assert ((weight() - expected).abs() < 1e-5).float().mean() > 0.98
