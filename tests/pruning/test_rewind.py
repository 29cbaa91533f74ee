"""Rewinding: after every event the survivors are what they were at the point to go back to, bit for bit."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.optim import SGD, Adam, AdamW

from lightning_compress import CompressionError, Linear, OneShot, Rewind, ScheduledPruning, Steps, Window
from tests.support import fits
from tests.support.data import TinyData
from tests.support.modules import Classifier, quiet_trainer
from tests.support.oracles import assert_different_state, assert_same_state, count_zeros, snapshot

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
]

TOTAL = 16 * 32 + 32 * 4
PER_EPOCH = 7
ROUNDS = Steps([0.0, 0.5, 1.0], [0.5, 0.75, 1.0])
OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda parameters: SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "sgd without momentum": lambda parameters: SGD(parameters, lr=0.1),
    "adam": lambda parameters: Adam(parameters, lr=0.01, amsgrad=True),
    "adamw": lambda parameters: AdamW(parameters, lr=0.01),
}


class Net(Classifier):
    def __init__(self, optimizer: str = "sgd") -> None:
        super().__init__()
        self.optimizer = optimizer

    def configure_optimizers(self) -> Any:
        optimizer = OPTIMIZERS[self.optimizer](self.parameters())
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.9)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def pruner(to: float = 3, unit: Any = "step", **kwargs: Any) -> ScheduledPruning:
    arguments: dict[str, Any] = {
        "sparsity": 0.8,
        "schedule": ROUNDS,
        "window": Window(8, 20, unit="step"),
        "rewind": Rewind(to, unit),
    }
    return ScheduledPruning(**{**arguments, **kwargs})


def state_of(module: L.LightningModule, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All that training changes: parameters, buffers, and each parameter's optimizer state by its name."""
    moments = {name: dict(optimizer.state.get(parameter, {})) for name, parameter in module.named_parameters()}
    return {"module": snapshot(module), "moments": snapshot(moments)}


def unsigned(state: dict[str, Any]) -> dict[str, Any]:
    """With one kind of zero: what is pruned may be -0.0."""
    return {key: value + 0.0 if torch.is_floating_point(value) else value for key, value in state.items()}


class Watch(Callback):
    """The state at the point to go back to, and after each event (with the masks, before the next step)."""

    def __init__(self, pruning: ScheduledPruning, at: int) -> None:
        self.pruning, self.at = pruning, at
        self.steps, self.pruned = 0, 0
        self.point: dict[str, Any] = {}
        self.events: list[dict[str, Any]] = []
        self.just_before: list[dict[str, Any]] = []
        self.rates: list[float] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.at == 0:
            self.point = state_of(pl_module, trainer.optimizers[0])
        self.watch_steps(trainer.optimizers[0], pl_module)

    def watch_steps(self, optimizer: torch.optim.Optimizer, module: L.LightningModule) -> None:
        def after_step(*_: Any) -> None:
            self.before = state_of(module, optimizer)

        optimizer.register_step_post_hook(after_step)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.steps += 1
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        now = state_of(pl_module, trainer.optimizers[0])
        if self.steps == self.at:
            self.point = now
        pruned = sum(int((~mask).sum()) for mask in self.pruning.masks.values())
        if pruned > self.pruned:
            self.pruned = pruned
            self.events.append({**now, "masks": snapshot(self.pruning.masks), "step": self.steps})
            self.just_before.append(self.before)


fit = partial(fits.fit, max_epochs=4)


@pytest.mark.parametrize("to", [0, 3, 8])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_p2_n2_after_every_event_the_survivors_are_back_bit_for_bit(optimizer: str, to: int) -> None:
    # P2: they were never reset; N2: from the second rewind on the copy was trained itself.
    pruning = pruner(to)
    watch = Watch(pruning, to)
    _, module = fit(pruning, watch, module=Net(optimizer))
    assert [event["step"] for event in watch.events] == [8, 14, 20]
    counts = [sum(int((~mask).sum()) for mask in event["masks"].values()) for event in watch.events]
    assert counts == [256, 384, 512]
    for event in watch.events:
        expected, moments = dict(watch.point["module"]), dict(watch.point["moments"])
        for name, mask in event["masks"].items():
            expected[name] = expected[name].masked_fill(~mask, 0.0)
            for key in moments:
                if key.startswith(name) and isinstance(moments[key], torch.Tensor) and moments[key].shape == mask.shape:
                    moments[key] = moments[key].masked_fill(~mask, 0.0)
        assert_same_state(unsigned(expected), unsigned(event["module"]))
        assert_same_state(unsigned(moments), unsigned(event["moments"]))
    for earlier in watch.just_before[1:]:
        assert_different_state(watch.point["module"], earlier["module"])  # Training went on between the events.
    assert_different_state(watch.events[-1]["module"], module)


def test_w7_the_batchnorm_buffers_go_back_too() -> None:
    pruning = pruner(3)
    watch = Watch(pruning, 3)
    fit(pruning, watch, module=Net())
    for event, before in zip(watch.events, watch.just_before, strict=True):
        assert int(event["module"]["norm.num_batches_tracked"]) == 3
        assert int(before["module"]["norm.num_batches_tracked"]) > 5
        assert_same_state(watch.point["module"]["norm.running_var"], event["module"]["norm.running_var"])


def test_the_learning_rate_goes_its_way() -> None:
    pruning = pruner(3)
    watch = Watch(pruning, 3)
    fit(pruning, watch, module=Net())
    plain = Watch(ScheduledPruning(sparsity=0.1), 3)
    fit(plain.pruning, plain, module=Net())
    assert watch.rates == plain.rates and len(set(watch.rates)) > 4


def test_n2_what_is_kept_shares_no_memory_with_what_trains() -> None:
    pruning = pruner(2)
    pointers: list[set[int]] = []
    points: list[Any] = []

    class Looks(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            state = pruning.state_dict()["kept"]
            if state is not None:
                live = [*pl_module.state_dict().values()]
                live += [tensor for state_ in trainer.optimizers[0].state.values() for tensor in state_.values()]
                own = [*state["tensors"].values(), *(v for s in state["optimizers"][0] for v in s.values())]
                pointers.append({t.data_ptr() for t in own if torch.is_tensor(t)} & {t.data_ptr() for t in live})
                points.append(snapshot({"tensors": state["tensors"], "optimizers": state["optimizers"]}))

    fit(pruning, Looks(), module=Net("adam"))
    assert len(points) > 15 and not any(pointers)
    for later in points:
        assert_same_state(points[0], later)


POINTS: dict[str, tuple[Rewind, int]] = {
    "an epoch": (Rewind(1, "epoch"), 7),
    "a fraction": (Rewind(0.25, "fit"), 7),
    "an odd fraction": (Rewind(0.1, "fit"), 3),
    "initialization": (Rewind(), 0),
}


@pytest.mark.parametrize("name", POINTS)
def test_points_in_every_unit(name: str) -> None:
    rewind, step = POINTS[name]
    pruning = pruner(rewind=rewind)
    watch = Watch(pruning, step)
    fit(pruning, watch, module=Net())
    mask = pruning.masks["body.weight"]
    for event in watch.events:
        here = event["masks"]["body.weight"]
        assert torch.equal(event["module"]["body.weight"][here], watch.point["module"]["body.weight"][here])
    assert len(watch.events) == 3 and int((~mask).sum()) > 0


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("at", [2, 9, 15])
def test_n3_resumed_between_rounds_equals_uninterrupted(at: int, optimizer: str, tmp_path: Path) -> None:
    # N3: the original weights were in no checkpoint. One more step than the data has: the epoch's last is 7, 14, 21.
    def every(folder: str) -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)

    kwargs: Any = {"max_epochs": 25, "limit_train_batches": 1, "limit_val_batches": 0}
    torch.manual_seed(0)
    _, whole = fit(pruner(3), every("whole"), module=Net(optimizer), **kwargs)
    path = tmp_path / f"whole/step={at}.ckpt"
    assert (next(iter(callbacks_of(path)))["kept"] is None) == (at < 3)
    _, resumed = fit(pruner(3), every("again"), module=Net(optimizer), ckpt_path=path, **kwargs)
    assert_same_state(whole, resumed)
    last, again = (torch.load(tmp_path / f"{folder}/step=25.ckpt", weights_only=True) for folder in ("whole", "again"))
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_same_state(last[part], again[part])
    assert_same_state(
        [*callbacks_of(tmp_path / "whole/step=25.ckpt")], [*callbacks_of(tmp_path / "again/step=25.ckpt")]
    )
    assert count_zeros([whole.body.weight, whole.head.weight])[0] == 512


def callbacks_of(path: Path) -> list[dict[str, Any]]:
    checkpoint = torch.load(path, weights_only=True)
    return [state for state in checkpoint["callbacks"].values() if "kept" in state]


@pytest.mark.parametrize("rewound", [False, True], ids=["plain", "rewound"])
@pytest.mark.parametrize("kind", ["by the trainer after the fit", "at the exception"])
def test_resuming_from_what_is_saved_once_training_has_stopped(kind: str, rewound: bool, tmp_path: Path) -> None:
    class Stops(Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.current_epoch == 10:
                raise RuntimeError("boom")

    def build() -> tuple[Net, ScheduledPruning]:
        torch.manual_seed(0)
        return Net("adam"), pruner(3) if rewound else pruner(rewind=None)

    kwargs: Any = {"limit_train_batches": 1, "limit_val_batches": 0}
    module, pruning = build()
    _, whole = fit(pruning, module=module, max_epochs=25, **kwargs)
    path = tmp_path / "stopped.ckpt"
    module, pruning = build()
    if kind == "by the trainer after the fit":
        trainer = quiet_trainer(max_epochs=10, callbacks=[pruning], **kwargs)
        with pytest.warns(UserWarning, match="before its window's end"):
            trainer.fit(module, TinyData())
        trainer.save_checkpoint(path)
    else:
        saves = ModelCheckpoint(tmp_path, filename="stopped", save_on_exception=True, every_n_epochs=99)
        with pytest.raises(RuntimeError, match="boom"):
            fit(pruning, Stops(), saves, module=module, max_epochs=25, **kwargs)
        assert saves.format_checkpoint_name({}) == str(path)
    module, pruning = build()
    _, resumed = fit(pruning, module=module, max_epochs=25, ckpt_path=path, **kwargs)
    assert_same_state(whole, resumed)


def test_without_rewind_nothing_goes_back() -> None:
    # N1: rewinding was the default, so a fit returned an untrained network.
    assert ScheduledPruning(sparsity=0.5).rewind is None
    pruning = pruner(rewind=None)
    watch = Watch(pruning, 3)
    fit(pruning, watch, module=Net())
    for event, before in zip(watch.events, watch.just_before, strict=True):
        mask = event["masks"]["body.weight"]
        assert int(mask.sum()) > 50
        assert torch.equal(event["module"]["body.weight"][mask], before["module"]["body.weight"][mask])
        assert_different_state(watch.point["module"]["norm.running_mean"], event["module"]["norm.running_mean"])
    assert pruning.state_dict()["kept"] is None


def test_the_returned_network_is_a_trained_one() -> None:
    pruning, data = pruner(3), TinyData()
    _, module = fit(pruning, module=Net(), max_epochs=8)
    untrained = quiet_trainer().validate(Net(), data, verbose=False)[0]["val_loss"]
    assert quiet_trainer().validate(module, data, verbose=False)[0]["val_loss"] < 0.8 * untrained


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "inside the window": ({"rewind": Rewind(9)}, r"`rewind` must go back to a point before the window.*step 9.*step 8"),
    "an epoch inside": ({"rewind": Rewind(2, "epoch")}, "`rewind` must go back to a point before"),
    "adjacent": (
        {"schedule": Linear()},
        r"`rewind` must leave training between two prunings.*at steps 9 and 10\. Use a Steps",
    ),
    "adjacent at the end": (
        {"schedule": Linear(), "window": Window(8, 14, unit="step", every_n_steps=5)},
        "at steps 13 and 14",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_be_rewound_is_an_error_that_changes_nothing(name: str) -> None:
    arguments, message = ERRORS[name]
    module = Net()
    before = snapshot(module)
    with pytest.raises(CompressionError, match=message):
        fit(pruner(**arguments), module=module)
    assert_same_state(before, module)


@pytest.mark.parametrize(("to", "unit"), [(-1, "step"), (1.5, "fit"), (1, "batch"), (float("nan"), "step")])
def test_points_that_are_none(to: float, unit: Any) -> None:
    with pytest.raises(CompressionError):
        Rewind(to, unit)


def test_it_does_not_go_with_regrowing() -> None:
    with pytest.raises(CompressionError, match="`rewind` must be left out with regrow=True"):
        pruner(regrow=True)


@pytest.mark.parametrize("method", ["lamp", "taylor", "random_unstructured", "ln_structured"])
def test_with_every_kind_of_method(method: str) -> None:
    pruning = pruner(2, method=method, schedule=OneShot(), **({"scope": "layer"} if method == "ln_structured" else {}))
    watch = Watch(pruning, 2)
    _, module = fit(pruning, watch, module=Net())
    [event] = watch.events
    mask = event["masks"]["body.weight"]
    assert torch.equal(event["module"]["body.weight"][mask], watch.point["module"]["body.weight"][mask])
    gone = ~mask.any(1)
    if method == "ln_structured":
        assert gone.any() and not event["module"]["norm.bias"][gone].any() and not module.norm.bias[gone].any()


def test_a_shared_and_a_tied_tensor_are_kept_once() -> None:
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.twin = nn.Linear(16, 32)
            self.twin.weight = self.body.weight

        def forward(self, x: Any) -> Any:
            return self.head(self.norm(self.body(self.flatten(x)) + self.twin(self.flatten(x))).relu())

    pruning, states = pruner(2), []

    class Looks(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            states.append(pruning.state_dict()["kept"])

    fit(pruning, Looks(), module=Tied())
    tensors = next(state for state in reversed(states) if state)["tensors"]
    assert tensors["body.weight"] is tensors["twin.weight"]
