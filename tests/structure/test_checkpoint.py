"""What a checkpoint says about the structure of a module, and how modules are wrapped for it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_compress import CompressionError, ScheduledPruning, load_compressed, quantize
from lightning_compress.modules.routing import routed_modules
from lightning_compress.structure import checkpoint
from tests.support.data import TinyData
from tests.support.modules import Classifier, quiet_trainer
from tests.support.oracles import assert_same_state, snapshot


class WithHooks(Classifier):
    """Has checkpoint hooks of its own."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = 7

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.mine = checkpoint["mine"]


def test_the_users_own_checkpoint_hooks_still_run(tmp_path: Path) -> None:
    module = WithHooks()
    trainer = quiet_trainer(callbacks=[ScheduledPruning(sparsity=0.5)])
    trainer.fit(module, TinyData())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["mine"] == 7
    fresh = WithHooks()
    quiet_trainer(callbacks=[ScheduledPruning(sparsity=0.5)]).test(
        fresh, TinyData(), ckpt_path=tmp_path / "a.ckpt", verbose=False, weights_only=True
    )
    assert fresh.mine == 7


def test_attach_and_detach_leave_the_instance_as_it_was() -> None:
    module = WithHooks()
    before = set(vars(module))
    checkpoint.attach(module)
    checkpoint.attach(module)
    assert set(vars(module)) - before == {"on_save_checkpoint", "on_load_checkpoint"}
    checkpoint.detach(module)
    checkpoint.detach(module)
    assert set(vars(module)) == before
    assert type(module).on_save_checkpoint is WithHooks.on_save_checkpoint


def test_a_copy_of_an_attached_module_has_hooks_of_its_own() -> None:
    module = Classifier()
    checkpoint.attach(module)
    twin = copy.deepcopy(module)
    assert vars(twin)["on_save_checkpoint"].args[0] is twin
    checkpoint.detach(twin)
    assert "on_save_checkpoint" in vars(module)


def test_a_checkpoint_of_plain_lightning_loads(tmp_path: Path) -> None:
    module = Classifier()
    trainer = quiet_trainer()
    trainer.fit(module, TinyData())
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    loaded = load_compressed(str(tmp_path / "plain.ckpt"), Classifier())
    assert_same_state(module, loaded)


@pytest.mark.parametrize("path_type", [str, Path])
def test_a_path_may_be_a_string_or_a_path(path_type: Any, tmp_path: Path) -> None:
    torch.save({"state_dict": nn.Linear(2, 2).state_dict()}, tmp_path / "a.ckpt")
    load_compressed(path_type(tmp_path / "a.ckpt"), nn.Linear(2, 2))


@pytest.mark.parametrize("content", ["missing", "text", "tensor", "no state", "shape", "key", "surplus"])
def test_a_load_that_fails_changes_nothing(content: str, tmp_path: Path) -> None:
    path, net = tmp_path / "bad.ckpt", nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    state = snapshot(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)))
    if content == "text":
        path.write_text("no checkpoint")
    elif content != "missing":
        torch.save(
            {
                "tensor": torch.zeros(1),
                "no state": {"weights": state},
                "shape": {"state_dict": {**state, "1.bias": torch.zeros(3)}},
                "key": {"state_dict": {key: value for key, value in state.items() if key != "1.bias"}},
                "surplus": {"state_dict": {**state, "2.bias": torch.zeros(3)}},
            }[content],
            path,
        )
    before = snapshot(net)
    with pytest.raises(CompressionError, match=r"`path` must .* Received: path='.*bad\.ckpt'"):
        load_compressed(str(path), net)
    assert_same_state(before, net)


@pytest.mark.parametrize("scheme", ["int8_static", "int8_dynamic"])
def test_an_entry_that_names_a_missing_module_is_refused(scheme: str, tmp_path: Path) -> None:
    from lightning_compress.quantization import convert

    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    int8 = quantize(net, scheme, calibration=[torch.randn(8, 4)])
    record = copy.deepcopy(convert.record_of(int8))
    assert record is not None
    record["layers" if scheme == "int8_dynamic" else "units"][0]["path"] = "nowhere"
    checkpoint = {"state_dict": int8.state_dict(), "lightning_compress": {"version": 1, "quantization": record}}
    torch.save(checkpoint, tmp_path / "a.ckpt")
    other = copy.deepcopy(net)
    before = snapshot(other)
    with pytest.raises(CompressionError, match="'nowhere'"):
        load_compressed(str(tmp_path / "a.ckpt"), other)
    assert_same_state(before, other)
    assert not routed_modules(other)


@pytest.mark.parametrize("scheme", ["int8_static", "int8_dynamic"])
def test_a_post_training_quantized_model_saves_and_loads_while_it_is_tested(scheme: str, tmp_path: Path) -> None:
    # Q23: the converted weights with their recipe, readable with weights_only=True.
    from lightning.pytorch.callbacks import Callback

    from lightning_compress import PostTrainingQuantization

    class Saves(Callback):
        def on_test_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(tmp_path / "int8.ckpt")
            data = TinyData()
            data.setup("test")
            self.expected = pl_module(data.test.tensors[0])

    saves, module, data = Saves(), Classifier(), TinyData()
    quiet_trainer(callbacks=[PostTrainingQuantization(scheme), saves]).test(module, data, verbose=False)
    loaded = load_compressed(str(tmp_path / "int8.ckpt"), Classifier())
    data.setup("test")
    assert torch.equal(loaded.eval()(data.test.tensors[0]), saves.expected)
