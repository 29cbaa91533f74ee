"""Checkpoints of a module that loses channels: each loads wherever it is wanted, or nothing changes."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn

from lightning_compress import (
    ChannelPruning,
    CompressionError,
    Linear,
    ScheduledPruning,
    Targets,
    Window,
    load_compressed,
    plan_removal,
    remove_channels_,
    save_compressed,
)
from tests.support import fits
from tests.support.data import TinyData
from tests.support.fits import read_checkpoint
from tests.support.modules import Classifier, quiet_trainer
from tests.support.oracles import assert_same_state, hooks, snapshot

pytestmark = pytest.mark.filterwarnings(
    "ignore:The dirpath has changed", "ignore:Be aware that when using `ckpt_path`", "ignore:Checkpoint directory"
)
EPOCHS = 3
WIDTHS = {0: 32, 1: 24, 2: 16}


def shrink(**settings: Any) -> ChannelPruning:
    """A quarter of the channels leaves in the second epoch, a quarter in the third."""
    window = Window(3, 17, unit="step", every_n_steps=7)
    return ChannelPruning(**{"channels": 0.5, "round_to": 1, "schedule": Linear(), "window": window, **settings})


fit = partial(fits.fit, max_epochs=EPOCHS)


KINDS: dict[str, Any] = {
    "whole": {},
    "weights": {"save_weights_only": True},
    "averaged": {},
}


@pytest.fixture(scope="module", params=KINDS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Classifier]:
    """A folder of checkpoints after each epoch, and the module as the fit left it."""
    folder = tmp_path_factory.mktemp(request.param)
    averages = [EMAWeightAveraging(decay=0.9)] if request.param == "averaged" else []
    save = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, **KINDS[request.param])
    return folder, fit(shrink(), *averages, save)[1]


def by_hand(path: Path, epoch: int) -> tuple[float, Tensor]:
    """The loss and the predictions on the test data of a module that was built with the checkpoint's width."""
    twin = Classifier(hidden=WIDTHS[epoch])
    twin.load_state_dict(read_checkpoint(path)["state_dict"])
    data = TinyData()
    data.setup("test")
    x, y = data.test.tensors
    with torch.no_grad():
        logits = twin.eval()(x)
    return F.cross_entropy(logits, y).item(), logits


def models(folder: Path, module: Classifier) -> dict[str, Classifier]:
    """Modules of every width that may meet a checkpoint."""
    return {
        "fresh": Classifier(),
        "after the fit": copy.deepcopy(module),
        "loaded narrower": load_compressed(folder / "epoch=2.ckpt", Classifier()),
        "loaded wider": load_compressed(
            folder / "epoch=0.ckpt", load_compressed(folder / "epoch=1.ckpt", Classifier())
        ),
    }


@pytest.mark.parametrize("epoch", WIDTHS)
def test_every_checkpoint_loads_into_every_module(epoch: int, saved: tuple[Path, Classifier]) -> None:
    folder, module = saved
    path = folder / f"epoch={epoch}.ckpt"
    loss, logits = by_hand(path, epoch)
    for name, loaded in models(folder, module).items():
        parameters = dict(loaded.named_parameters())
        trainer = quiet_trainer(callbacks=[shrink()])
        [metrics] = trainer.test(loaded, TinyData(), ckpt_path=path, verbose=False, weights_only=True)
        assert metrics["test_loss"] == pytest.approx(loss, rel=1e-6), name
        [again] = trainer.test(loaded, TinyData(), verbose=False)
        assert again == metrics, name
        assert loaded.body.out_features == loaded.norm.num_features == loaded.head.in_features == WIDTHS[epoch]
        assert all(after is parameters[key] for key, after in loaded.named_parameters())
        trainer.validate(loaded, TinyData(), ckpt_path=path, verbose=False)
    predicted = quiet_trainer(callbacks=[shrink()]).predict(Classifier(), TinyData(), ckpt_path=path)
    torch.testing.assert_close(torch.cat(predicted), logits)
    loaded = load_compressed(path, Classifier())
    assert_same_state(loaded.state_dict(), read_checkpoint(path)["state_dict"])
    assert hooks(loaded) == []


@pytest.mark.parametrize("epoch", WIDTHS)
def test_a_fit_goes_on_from_every_checkpoint(epoch: int, saved: tuple[Path, Classifier]) -> None:
    folder, _ = saved
    path = folder / f"epoch={epoch}.ckpt"
    module = load_compressed(path, Classifier())
    assert module.body.out_features == WIDTHS[epoch]
    pruning = shrink(window=Window(1, 4, unit="step"))
    trainer, _ = fit(pruning, module=module, max_epochs=1)
    # A budget is a fraction of the original, whatever had left before.
    assert module.body.out_features == 16 and trainer.callback_metrics["remaining_channels"] == 0.5


def test_the_best_may_be_wider_than_the_last(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, monitor="epoch", mode="min", filename="{epoch}")
    trainer, module = fit(shrink(), save, module=Logs())
    assert module.body.out_features == 16
    [first] = trainer.test(module, TinyData(), ckpt_path="best", verbose=False)
    assert module.body.out_features == 32
    assert first["test_loss"] == pytest.approx(by_hand(tmp_path / "epoch=0.ckpt", 0)[0], rel=1e-6)
    [second] = trainer.test(Logs(), TinyData(), ckpt_path="best", verbose=False)
    assert first == second


class Logs(Classifier):
    def on_train_epoch_end(self) -> None:
        self.log("epoch", float(self.current_epoch))


@pytest.mark.parametrize("every", [2, 3])
def test_a_monitored_metric_is_that_of_the_saved_weights(every: int, tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=-1, filename="{step}-{val_loss:.7f}")
    fit(save, shrink(), val_check_interval=every)
    paths = list(tmp_path.glob("*.ckpt"))
    data = TinyData()
    data.setup("fit")
    x, y = data.val.tensors
    widths = set()
    for path in paths:
        state = read_checkpoint(path)["state_dict"]
        widths.add(len(state["body.weight"]))
        twin = Classifier(hidden=len(state["body.weight"]))
        twin.load_state_dict(state)
        with torch.no_grad():
            loss = F.cross_entropy(twin.eval()(x), y)
        assert loss.item() == pytest.approx(float(path.stem.partition("val_loss=")[2]), abs=1e-6)
    assert widths == {32, 24, 16}


# Loading without the fit's callback.


def test_another_callback_of_ours_loads_it_too(saved: tuple[Path, Classifier]) -> None:
    path = saved[0] / "epoch=2.ckpt"
    module = Classifier()
    quiet_trainer(callbacks=[ScheduledPruning(sparsity=0.5)]).test(module, TinyData(), ckpt_path=path, verbose=False)
    assert module.body.out_features == 16


@pytest.mark.parametrize("bare", [False, True])
def test_a_plain_state_dict_loads_by_its_shapes(bare: bool, tmp_path: Path) -> None:
    _, module = fit(shrink())
    torch.save(module.state_dict() if bare else {"state_dict": module.state_dict()}, tmp_path / "plain.pt")
    loaded = load_compressed(tmp_path / "plain.pt", Classifier())
    assert_same_state(loaded, module)
    assert (loaded.body.out_features, loaded.norm.num_features, loaded.head.in_features) == (16, 16, 16)


class Scaled(nn.Module):
    """A layer of one's own: what follows from a narrower weight isn't known."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Attentive(Classifier):
    """Four heads, a norm that is computed by one's own layer, and a buffer that no checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.scaled = Scaled(32)
        self.register_buffer("slope", torch.linspace(-1, 1, 32), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(-1, (1, 16))
        x = (x + self.attention(x, x, x, need_weights=False)[0]).flatten(1)
        return self.head(self.scaled(self.norm(self.body(x)) + self.slope).relu())


def test_attributes_and_buffers_that_no_state_dict_holds_follow_too(tmp_path: Path) -> None:
    wide = tmp_path / "wide.ckpt"
    module = Attentive()
    save_compressed(module, wide)
    slope = module.slope.clone()
    trainer, _ = fit(shrink(scope="layer"), module=module)
    assert module.attention.num_heads == 2 and module.slope.shape == module.scaled.scale.shape == (16,)
    assert torch.isin(module.slope, slope).all()
    trainer.save_checkpoint(tmp_path / "narrow.ckpt")
    x = torch.randn(5, 16)
    again = load_compressed(tmp_path / "narrow.ckpt", Attentive())
    assert torch.equal(again.eval()(x), module.eval()(x))
    # And back: nothing but the model's own file knows the whole buffer.
    load_compressed(wide, again)
    assert again.attention.num_heads == 4 and torch.equal(again.slope, slope)
    assert torch.equal(again(x), load_compressed(wide, Attentive()).eval()(x))


def test_shapes_alone_arent_enough_for_a_layer_of_ones_own(tmp_path: Path) -> None:
    _, module = fit(shrink(scope="layer", targets=Targets(include=["body"])), module=Attentive())
    torch.save({"state_dict": module.state_dict()}, tmp_path / "plain.pt")
    fresh = Attentive()
    before = snapshot(fresh)
    with pytest.raises(CompressionError, match="scaled.scale.*in a Scaled.*save_compressed"):
        load_compressed(tmp_path / "plain.pt", fresh)
    assert_same_state(before, snapshot(fresh))


# Loads that fail.


def spoil(state: dict[str, Any], how: str) -> None:
    if how == "a key is missing":
        del state["state_dict"]["norm.weight"]
    elif how == "a key too many":
        state["state_dict"]["more"] = torch.zeros(1)
    elif how == "another shape":
        state["state_dict"]["head.weight"] = torch.zeros(4, 15)
    elif how == "a newer version":
        state["lightning_compress"]["version"] = 99
    else:
        state["lightning_compress"]["channels"]["shapes"]["body.weight"][0] = [33, 16]


FAULTS = ["a key is missing", "a key too many", "another shape", "a newer version", "built otherwise"]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    trainer, _ = fit(shrink())
    path = tmp_path_factory.mktemp("good") / "good.ckpt"
    trainer.save_checkpoint(path)
    return path


@pytest.mark.parametrize("way", ["load_compressed", "test", "fit"])
@pytest.mark.parametrize("how", FAULTS)
@pytest.mark.parametrize("narrow", [False, True], ids=["into a whole one", "into a narrow one"])
def test_a_load_that_fails_changes_nothing(narrow: bool, how: str, way: str, good: Path, tmp_path: Path) -> None:
    state = read_checkpoint(good)
    spoil(state, how)
    torch.save(state, tmp_path / "bad.ckpt")
    module = load_compressed(good, Classifier()) if narrow else Classifier()
    before, parameters = snapshot(module), dict(module.named_parameters())
    attributes = set(vars(module))
    with pytest.raises(CompressionError, match="must (have version|fit Classifier|hold a checkpoint of this model)"):
        if way == "load_compressed":
            load_compressed(tmp_path / "bad.ckpt", module)
        elif way == "test":
            quiet_trainer(callbacks=[shrink()]).test(module, TinyData(), ckpt_path=tmp_path / "bad.ckpt")
        else:
            fit(shrink(), module=module, ckpt_path=tmp_path / "bad.ckpt")
    assert_same_state(before, snapshot(module))
    assert all(one is parameters[name] for name, one in module.named_parameters())
    assert set(vars(module)) == attributes and hooks(module) == []
    width = 16 if narrow else 32
    assert module.body.out_features == module.norm.num_features == module.head.in_features == width
    assert_same_state(load_compressed(good, module).state_dict(), read_checkpoint(good)["state_dict"])


# Copies, parts, and what was cut before.


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_says_what_it_lost_wherever_it_is_saved(copied: Any, tmp_path: Path) -> None:
    _, module = fit(shrink(scope="layer"), module=Attentive())
    twin = copied(module)
    module.body.weight.data.zero_()  # nothing is shared
    expected = snapshot(twin)
    save_compressed(twin, tmp_path / "saved.pt")
    trainer = quiet_trainer(max_epochs=1, enable_checkpointing=True)
    trainer.fit(twin, TinyData())  # with no callback of ours
    trainer.save_checkpoint(tmp_path / "fitted.ckpt")
    assert_same_state(expected, snapshot(load_compressed(tmp_path / "saved.pt", Attentive())))
    assert_same_state(twin, load_compressed(tmp_path / "fitted.ckpt", Attentive()))


@pytest.mark.parametrize("last", [0, 9, 12])
def test_what_an_error_leaves_can_be_saved(last: int, tmp_path: Path) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step > last:
                raise RuntimeError("stopped")

    module = Classifier()
    with pytest.raises(RuntimeError, match="stopped"):
        fit(shrink(), Stop(), module=module)
    save_compressed(module, tmp_path / "saved.pt")
    assert_same_state(load_compressed(tmp_path / "saved.pt", Classifier()), module)
    assert module.body.out_features == (24 if last else 32)


class Nested(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
        del self.body, self.norm, self.head

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def cut_the_part(module: Nested) -> None:
    remove_channels_(module.net, plan_removal(module.net, torch.zeros(2, 16), channels=0.75, round_to=1))


@pytest.mark.parametrize("first", [True, False], ids=["part first", "whole first"])
def test_a_part_that_was_cut_by_itself_is_saved_right(first: bool, tmp_path: Path) -> None:
    module = Nested()
    if first:
        cut_the_part(module)
    trainer, _ = fit(shrink(), module=module)
    if not first:
        cut_the_part(module)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    expected = snapshot(module)
    assert_same_state(expected, snapshot(load_compressed(tmp_path / "saved.ckpt", Nested())))
    trainer.test(module, TinyData(), ckpt_path=tmp_path / "saved.ckpt", verbose=False)
    assert_same_state(expected, snapshot(module))


def test_a_part_is_saved_and_loaded_by_itself(tmp_path: Path) -> None:
    _, module = fit(shrink(), module=Nested())
    save_compressed(module.net, tmp_path / "part.pt")
    assert_same_state(load_compressed(tmp_path / "part.pt", Nested().net), module.net)


def test_a_wider_file_loaded_into_the_module_of_a_callback_is_a_new_start(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    pruning = shrink(channels=None, macs=0.5)
    _, module = fit(pruning, save)
    load_compressed(tmp_path / "epoch=0.ckpt", module)
    fit(pruning, module=module)
    assert module.body.out_features == 16


def test_resuming_with_another_budget_says_so(tmp_path: Path) -> None:
    fit(shrink(), ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1))
    with pytest.warns(UserWarning, match="written with other settings"):
        fit(shrink(channels=0.25), ckpt_path=tmp_path / "epoch=2.ckpt", max_epochs=4)
