"""What every public callback promises, whatever it does."""

from __future__ import annotations

import copy
import itertools
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_compress import CompressionError, QuantizationAwareTraining, load_compressed, merge_adapters
from lightning_compress.cli import main
from lightning_compress.quantization import convert
from tests.contracts.rows import PUBLIC, ROWS, Row
from tests.support import fits
from tests.support.data import TinyData
from tests.support.fits import read_checkpoint, resume
from tests.support.modules import Classifier, ManualClassifier, quiet_trainer
from tests.support.oracles import assert_float_keys, assert_same_state, hooks, snapshot

EPOCHS = 2
each_row = pytest.mark.parametrize("row", ROWS, ids=str)
fit = partial(fits.fit, max_epochs=EPOCHS)


def test_every_public_callback_has_a_row() -> None:
    assert PUBLIC
    assert {type(row.make()) for row in ROWS} == set(PUBLIC)


# The runs under comparison save in folders of their own, and are read by Trainers that save nothing.
other_folder = pytest.mark.filterwarnings(
    "ignore:The dirpath has changed", "ignore:Be aware that when using `ckpt_path`"
)


@each_row
@other_folder
def test_resumed_equals_uninterrupted(row: Row, tmp_path: Path) -> None:
    resume(lambda **files: fit(row.make(), max_epochs=3, **files), tmp_path, 0, 1)


def assert_adapted(state: dict[str, Any], keys: list[str]) -> None:
    """One layer has 4-bit codes under its own key, what makes floats of them beside it, and adapters."""
    beside = {key.removeprefix("body.") for key in state.keys() - set(keys)}
    assert beside == {"lora_A", "lora_B", "weight_scale_codes", "weight_scale_offset", "weight_scale_step"}
    assert [key for key in state if key in keys] == keys and state["body.weight"].dtype == torch.uint8


@each_row
@other_folder
@pytest.mark.parametrize("weights_only", [False, True], ids=["whole", "weights only"])
def test_a_checkpoint_holds_just_the_users_keys(row: Row, weights_only: bool, tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, save_weights_only=weights_only, save_last=True, every_n_train_steps=4)
    fit(row.make(), save)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    plain, keys = Classifier(), list(Classifier().state_dict())
    if row.narrows:
        plain = load_compressed(tmp_path / "last.ckpt", plain)
        assert plain.body.out_features < Classifier().body.out_features
    elif row.adapts:
        # The one exception to the float keys of promise 9.
        assert_adapted(checkpoint["state_dict"], keys)
        plain = merge_adapters(load_compressed(tmp_path / "last.ckpt", plain))
        floats = {key: checkpoint["state_dict"][key] for key in keys if key != "body.weight"}
        checkpoint["state_dict"] = {**plain.state_dict(), **floats}
        assert_same_state(checkpoint["state_dict"], plain)
    else:
        assert list(Classifier.load_from_checkpoint(tmp_path / "last.ckpt").state_dict()) == keys
    assert_float_keys(checkpoint, plain)
    assert list(checkpoint["state_dict"]) == keys
    plain.load_state_dict(checkpoint["state_dict"])
    load_compressed(tmp_path / "last.ckpt", Classifier())
    for stage in ("validate", "test", "predict"):
        getattr(quiet_trainer(callbacks=[row.make()]), stage)(
            Classifier(), TinyData(), ckpt_path=tmp_path / "last.ckpt"
        )


@each_row
def test_draws_nothing_from_the_global_generators(row: Row) -> None:
    states = []
    for callbacks in ([], [row.make()]):
        trainer, module = fit(*callbacks)
        states.append(torch.get_rng_state())
        trainer.test(module, TinyData(), verbose=False)
        states.append(torch.get_rng_state())
    fit_plain, test_plain, fit_ours, test_ours = states
    assert torch.equal(fit_plain, fit_ours)
    assert torch.equal(test_plain, test_ours)


# What a module that lost channels carries on: whatever saves it later must still say so.
NARROWER = {"_removed_channels", "on_save_checkpoint", "on_load_checkpoint"}


@each_row
def test_leaves_nothing_behind(row: Row) -> None:
    trainer, module = fit(row.make())
    plain = fit()[1]
    trainer.test(module, TinyData(), verbose=False)
    if isinstance(row.make(), QuantizationAwareTraining):
        return  # it leaves an int8 model, on purpose
    if row.adapts:
        module = merge_adapters(module)
    assert hooks(module) == []
    assert vars(module).keys() == vars(plain).keys() | (NARROWER if row.narrows else set())
    assert list(module.state_dict()) == list(plain.state_dict())
    assert all(not optimizer._optimizer_step_post_hooks for optimizer in trainer.optimizers)


class Stop(Callback):
    """Raises in the middle of a fit."""

    def __init__(self, error: BaseException, step: int = 9) -> None:
        self.error, self.step = error, step

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise self.error


@each_row
@pytest.mark.parametrize("error", [RuntimeError("stopped"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_an_exception_leaves_a_plain_module(row: Row, error: BaseException) -> None:
    module = Classifier()
    with pytest.raises((RuntimeError, SystemExit, KeyboardInterrupt)):
        fit(row.make(), Stop(error), module=module)
    if row.adapts:  # what it trained so far stays, and can be merged
        module = merge_adapters(module)
    assert hooks(module) == []
    assert vars(module).keys() <= vars(fit(max_epochs=1)[1]).keys() | (NARROWER if row.narrows else set())
    assert list(module.state_dict()) == list(Classifier().state_dict())
    fit(row.make(), module=module)


@each_row
def test_fits_twice_and_a_second_model(row: Row) -> None:
    callback = row.make()
    trainer, module = fit(callback)
    fit(callback, module=module)
    _, other = fit(callback)
    trainer, fresh = fit(row.make())
    assert_same_state(other, fresh)
    trainer.test(fresh, TinyData(), verbose=False)


@each_row
@other_folder
@pytest.mark.filterwarnings("ignore:QuantizationAwareTraining. the fit ended before", "ignore:Checkpoint directory")
def test_a_fit_whose_epochs_are_over_does_nothing(row: Row, tmp_path: Path) -> None:
    trainer, module = fit(row.make(), folder=tmp_path)
    before = snapshot(module)
    _, resumed = fit(row.make(), ckpt_path=tmp_path / f"epoch={EPOCHS - 1}.ckpt")
    assert_same_state(before, snapshot(resumed))
    trainer.fit(module, TinyData())
    assert_same_state(before, snapshot(module))
    untrained = fit(row.make(), max_epochs=0)[1]
    if not row.adapts:  # adapters are there from the start
        assert_same_state(snapshot(fit(max_epochs=0)[1]), snapshot(untrained))


@each_row
def test_non_targets_stay_bit_identical(row: Row) -> None:
    module = Classifier(lr=0.0)
    before = snapshot(module)
    fit(row.make(), module=module)
    if isinstance(row.make(), QuantizationAwareTraining):
        return  # the int8 model has other tensors; that its parameters are the same objects is tested in its room
    if row.narrows:
        return  # that what stays keeps its values is tested in its room
    after = snapshot(module)
    others = {key for key in before if key.endswith("bias") or key == "norm.weight"} - {*row.changes}
    assert others
    assert_same_state({key: before[key] for key in others}, {key: after[key] for key in others})


@each_row
def test_deepcopy_and_pickle(row: Row) -> None:
    callback = row.make()
    fit(callback)
    for twin in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert type(twin) is type(callback)
        assert twin.state_key == callback.state_key
        fit(twin)
    fit(copy.deepcopy(row.make()))


@each_row
def test_trains_with_manual_optimization_and_bf16_and_accumulation(row: Row) -> None:
    if row.manual:
        fit(row.make(), module=ManualClassifier())
    else:
        with pytest.raises(CompressionError, match="`automatic_optimization` must be True"):
            fit(row.make(), module=ManualClassifier())
    fit(row.make(), precision="bf16-mixed")
    fit(row.make(), accumulate_grad_batches=3)


pairs = [
    pair
    for pair in itertools.permutations(ROWS, 2)
    if not ("qat" in {row.name for row in pair} and any(row.name.startswith("ptq") for row in pair))
    and not any(all(row.name.startswith(kind) for row in pair) for kind in ("ptq", "channels"))
    # It is refused beside what needs float weights: see test_qlora.py.
    and not (any(row.adapts for row in pair) and {row.name for row in pair}.isdisjoint({"report", "distillation"}))
]


# One order of each pair in the quick run, now the one and now the other.
quick = {frozenset(map(str, pair)): " ".join(map(str, pair[:: (-1) ** number])) for number, pair in enumerate(pairs)}
ordered = [
    pytest.param(pair, marks=[pytest.mark.slow] * (" ".join(map(str, pair)) != quick[frozenset(map(str, pair))]))
    for pair in pairs
]


@pytest.mark.filterwarnings("ignore:AccuracyGuard. what ChannelPruning takes at once can't be held")
@pytest.mark.filterwarnings("ignore:QuantizationAwareTraining. these weights were saved before quantization began")
@pytest.mark.parametrize("pair", ordered, ids=lambda pair: " then ".join(map(str, pair)))
def test_pairs_compose_in_any_order(pair: tuple[Row, Row], tmp_path: Path) -> None:
    trainer, module = fit(*(row.make() for row in pair), folder=tmp_path)
    trainer.test(module, TinyData(), verbose=False)
    checkpoint = read_checkpoint(tmp_path / f"epoch={EPOCHS - 1}.ckpt")
    plain = Classifier()
    if any(row.narrows for row in pair):
        plain = load_compressed(tmp_path / f"epoch={EPOCHS - 1}.ckpt", plain)
        assert plain.body.out_features < Classifier().body.out_features
        convert.revert_(plain, "float")  # beside quantization it comes prepared
    if any(row.adapts for row in pair):
        assert_adapted(checkpoint["state_dict"], list(plain.state_dict()))
    else:
        assert_float_keys(checkpoint, plain)
    trainer.test(module, TinyData(), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)


@pytest.mark.parametrize(
    ("row", "settings", "words"),
    [pytest.param(row, *bad, id=f"{row}-{index}") for row in ROWS for index, bad in enumerate(row.bad)],
)
def test_bad_settings_are_refused_in_the_constructor(row: Row, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(CompressionError, match=words):
        type(row.make())(**settings)


@each_row
def test_yaml_round_trip(row: Row, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    config.write_text(
        yaml.safe_dump(
            {
                "model": {"class_path": "tests.support.modules.Classifier"},
                "data": {"class_path": "tests.support.data.TinyData"},
                "trainer": {"max_epochs": 1, "accelerator": "cpu", "callbacks": [row.yaml], **quiet},
            }
        )
    )
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(config), "--print_config"])
    printed = capsys.readouterr().out
    assert str(row.yaml["class_path"]) in printed
    (tmp_path / "again.yaml").write_text(printed)
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(tmp_path / "again.yaml"), "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(printed)
    main(["fit", "--config", str(tmp_path / "again.yaml")])


class Modes(Callback):
    """Notes which modules train when training starts."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.seen = {path: inner.training for path, inner in pl_module.named_modules()}


@each_row
@other_folder
@pytest.mark.filterwarnings("ignore:Found [12] module")  # in eval mode: that is the test
def test_evaluation_puts_every_modules_mode_back(row: Row, tmp_path: Path) -> None:
    fit(row.make(), folder=tmp_path)
    module = Classifier()
    module.norm.eval()
    before = {path: inner.training for path, inner in module.named_modules()}
    quiet_trainer(callbacks=[row.make()]).test(module, TinyData(), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    modes = Modes()
    fit(row.make(), modes, module=module)
    assert {path: modes.seen[path] for path in before} == before
