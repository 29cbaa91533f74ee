"""Masks stay on the weights in every kind of fit, and what they are kept on is the user's own module."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_compress import (
    ScheduledPruning,
    Targets,
    Window,
)
from tests.support.data import TinyData
from tests.support.modules import Classifier, ManualClassifier, ZooModule, quiet_trainer
from tests.support.oracles import (
    assert_different_state,
    assert_same_state,
    count_zeros,
    hooks,
    snapshot,
)
from tests.support.zoo import ZOO, Row, row

WEIGHTS = ("body.weight", "head.weight")

TOTAL = 16 * 32 + 32 * 4


def zeros(module: nn.Module) -> tuple[int, int]:
    return count_zeros(module.get_parameter(name) for name in WEIGHTS)


def attributes(module: nn.Module) -> dict[str, set[str]]:
    """Names of everything on each module, but what Lightning itself leaves on the root."""
    lightnings = {"_trainer", "_current_fx_name", "_metric_attributes", "_param_requires_grad_state"}
    return {path: set(vars(inner)) - lightnings for path, inner in module.named_modules()}


class Watch(Callback):
    """After each optimizer step and at each batch end: are the masked weights zero, and did masks only grow?"""

    def __init__(self, pruning: ScheduledPruning) -> None:
        self.pruning = pruning
        self.steps = 0
        self.before: dict[str, Tensor] = {}
        self.sparsities: list[float] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(lambda *_: self.after_step(pl_module))

    def after_step(self, module: nn.Module) -> None:
        self.steps += 1
        for name, mask in self.pruning.masks.items():
            assert not module.get_parameter(name)[~mask].any(), name

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.after_step(pl_module)
        masks = self.pruning.masks
        for name, mask in self.before.items():
            assert not (masks[name] & ~mask).any(), f"{name}: a pruned weight came back"
        self.before = {name: mask.clone() for name, mask in masks.items()}
        self.sparsities.append(1 - sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values()))


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=1e-1),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_weights_stay_zero_after_every_optimizer_step(name: str) -> None:
    # T10: momentum and weight decay revived them.
    class Module(Classifier):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return OPTIMIZERS[name](self.parameters())

    pruning = ScheduledPruning(sparsity=0.8, window=Window(0.1, 0.6))
    watch = Watch(pruning)
    quiet_trainer(max_epochs=3, callbacks=[pruning, watch]).fit(Module(), TinyData())
    assert watch.steps == 2 * 21
    assert watch.sparsities == sorted(watch.sparsities)
    assert len(set(watch.sparsities)) > 5
    assert watch.sparsities[-1] == round(0.8 * TOTAL) / TOTAL


def test_weights_keep_training_between_events() -> None:
    module = Classifier()
    pruning = ScheduledPruning(sparsity=0.5, window=Window(0, 1, unit="step"))
    quiet_trainer(max_epochs=2, callbacks=[pruning]).fit(module, TinyData())
    plain = Classifier()
    assert_different_state(module, plain)
    stays = pruning.masks["body.weight"]
    assert (module.body.weight[stays] != 0).all()


class TrainWithoutDrawing(TinyData):
    """A DataLoader draws a base seed from the global generator unless it has one of its own."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train, batch_size=8, generator=torch.Generator())


def plain_fit(row: Row) -> nn.Module:
    module = ZooModule(row)
    quiet_trainer(callbacks=[]).fit(module)
    return module


@pytest.mark.parametrize("row", ZOO, ids=str)
def test_over_the_zoo_keys_order_and_identity_stay_and_nothing_is_left_behind(row: Row) -> None:
    # N6, N13, T3, T4, P4, P5; promise 1.
    module = ZooModule(row)
    order, identities = list(module.state_dict()), [id(parameter) for parameter in module.parameters()]
    hooked = hooks(module)
    pruning = ScheduledPruning(sparsity=0.6, window=Window(0, 1))
    trainer = quiet_trainer(max_epochs=3, callbacks=[pruning])
    trainer.fit(module)
    assert list(module.state_dict()) == order
    assert [id(parameter) for parameter in module.parameters()] == identities
    assert hooks(module) == hooked
    assert attributes(module) == attributes(plain_fit(row))
    pruned, total = count_zeros(module.get_parameter(name) for name in pruning.masks)
    assert pruned == round(0.6 * total) > 0
    trainer.test(module, verbose=False)
    args, kwargs = row.inputs()
    module.eval()(*args, **kwargs)
    module.train()(*args, **kwargs)
    for inner in module.modules():
        if isinstance(inner, nn.RNNBase):
            inner.flatten_parameters()
    copy.deepcopy(module)


class Interrupts(Callback):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == 4:
            raise self.error


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()], ids=["exception", "ctrl-c"])
def test_an_interruption_leaves_no_hook_and_the_next_fit_works(error: BaseException) -> None:
    # W10.
    module = Classifier()
    before = attributes(module)
    pruning = ScheduledPruning(sparsity=0.9, window=Window(0, 1))
    trainer = quiet_trainer(callbacks=[pruning, Interrupts(error)])
    with pytest.raises((RuntimeError, SystemExit, KeyboardInterrupt)):
        trainer.fit(module, TinyData())
    [optimizer] = trainer.optimizers or [None]
    assert optimizer is None or not [
        h for h in optimizer._optimizer_step_post_hooks.values() if "lightning_compress" in h.__module__
    ]
    assert attributes(module) == before
    assert hooks(module) == []
    quiet_trainer(callbacks=[pruning]).fit(module, TinyData())
    assert zeros(module)[0] == round(0.9 * TOTAL)


def test_after_fit_the_optimizer_has_no_hook_of_ours() -> None:
    trainer = quiet_trainer(callbacks=[ScheduledPruning(sparsity=0.5)])
    trainer.fit(Classifier(), TinyData())
    assert not trainer.optimizers[0]._optimizer_step_post_hooks


def test_fit_twice_keeps_the_masks_and_regrows_nothing() -> None:
    # W6.
    module, pruning = Classifier(), ScheduledPruning(sparsity=0.8)
    quiet_trainer(callbacks=[pruning]).fit(module, TinyData())
    masks = {name: mask.clone() for name, mask in pruning.masks.items()}
    watch = Watch(pruning)
    quiet_trainer(callbacks=[pruning, watch]).fit(module, TinyData())
    assert_same_state(masks, pruning.masks)
    assert set(watch.sparsities) == {round(0.8 * TOTAL) / TOTAL}


def test_fit_on_a_second_model_starts_anew() -> None:
    # N12: the callback was tied to its first module.
    pruning = ScheduledPruning(sparsity=0.8)
    first, second = Classifier(), Classifier(hidden=8)
    quiet_trainer(callbacks=[pruning]).fit(first, TinyData())
    after = snapshot(first)
    quiet_trainer(callbacks=[pruning]).fit(second, TinyData())
    assert count_zeros([second.body.weight, second.head.weight]) == (round(0.8 * 160), 160)
    assert_same_state(after, first)


def test_a_second_model_of_the_same_shape_gets_masks_of_its_own() -> None:
    pruning = ScheduledPruning(sparsity=0.8)
    torch.manual_seed(1)
    first, second = Classifier(), Classifier()
    quiet_trainer(callbacks=[pruning]).fit(first, TinyData())
    masks = dict(pruning.masks)
    quiet_trainer(callbacks=[pruning]).fit(second, TinyData())
    assert_different_state(masks, pruning.masks)
    alone = ScheduledPruning(sparsity=0.8)
    torch.manual_seed(1)
    Classifier()
    again = Classifier()
    quiet_trainer(callbacks=[alone]).fit(again, TinyData())
    assert_same_state(second, again)


@pytest.fixture
def counted() -> Iterator[None]:
    """What is alive already isn't looked at, which also makes looking fast."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def live_tensors() -> int:
    gc.collect()
    return sum(1 for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter))


@pytest.mark.usefixtures("counted")
def test_p1_memory_is_constant_over_three_fits() -> None:
    # P1, PL#8542; T5, T6: masks on hooks grew with each event.
    module, pruning, counts = Classifier(), ScheduledPruning(sparsity=0.8, window=Window(0, 1)), []
    for _ in range(4):
        quiet_trainer(max_epochs=3, callbacks=[pruning]).fit(module, TinyData())
        counts.append(live_tensors())
    assert counts[1] == counts[2] == counts[3]


@pytest.mark.usefixtures("counted")
def test_t5_memory_is_constant_over_fifty_events() -> None:
    counts: list[int] = []

    class Counts(Callback):
        def on_train_epoch_end(self, *_: Any) -> None:
            counts.append(live_tensors())

    pruning = ScheduledPruning(sparsity=0.9, window=Window(0, 1))
    quiet_trainer(max_epochs=8, limit_val_batches=0, callbacks=[pruning, Counts()]).fit(Classifier(), TinyData())
    assert len(set(counts[2:])) == 1


def test_manual_optimization_with_two_optimizers() -> None:
    module = ManualClassifier()
    pruning = ScheduledPruning(sparsity=0.8)
    watch = Watch(pruning)
    quiet_trainer(max_epochs=2, callbacks=[pruning, watch]).fit(module, TinyData())
    assert zeros(module)[0] == round(0.8 * TOTAL)
    assert watch.steps == 3 * 14


def test_bf16_mixed() -> None:
    module = Classifier()
    quiet_trainer(precision="bf16-mixed", max_epochs=2, callbacks=[ScheduledPruning(sparsity=0.8)]).fit(
        module, TinyData()
    )
    assert zeros(module)[0] == round(0.8 * TOTAL)


@pytest.mark.parametrize("name", ["gru", "attention", "transformer"])  # torch has no bfloat16 LSTM on many CPUs
def test_t9_recurrent_and_attention_layers_under_bf16_mixed(name: str) -> None:
    module = ZooModule(row(name))
    pruning = ScheduledPruning(sparsity=0.5)
    quiet_trainer(precision="bf16-mixed", max_epochs=2, callbacks=[pruning]).fit(module)
    pruned, total = count_zeros(module.get_parameter(key) for key in pruning.masks)
    assert pruned == round(0.5 * total)


def test_frozen_submodules_stay_bit_identical() -> None:
    # N10.
    module = Classifier()
    module.body.requires_grad_(False)
    frozen = module.body.weight.detach().clone()
    pruning = ScheduledPruning(sparsity=0.5)
    quiet_trainer(callbacks=[pruning]).fit(module, TinyData())
    assert torch.equal(frozen, module.body.weight)
    assert set(pruning.masks) == {"head.weight"}


def test_what_is_not_targeted_trains_as_if_we_were_not_there() -> None:
    module = Classifier()
    pruning = ScheduledPruning(sparsity=0.5, targets=Targets(include=["head"]))
    quiet_trainer(max_epochs=2, callbacks=[pruning]).fit(module, TinyData())
    assert count_zeros([module.head.weight])[0] == 64
    assert count_zeros([module.body.weight])[0] == 0


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_the_callback_can_be_copied(clone: Callable[[Any], Any], when: str) -> None:
    pruning = ScheduledPruning(sparsity=0.5, window=Window(0.2), targets=Targets(include=["body"]))
    if when == "after":
        quiet_trainer(callbacks=[pruning]).fit(Classifier(), TinyData())
    twin = clone(pruning)
    assert (twin.window, twin.recipe) == (Window(0.2), pruning.recipe)
    assert_same_state(pruning.masks, twin.masks)
    module = Classifier()
    quiet_trainer(callbacks=[twin]).fit(module, TinyData())
    assert count_zeros([module.body.weight])[0] == 256


def test_a_module_can_be_copied_in_mid_training() -> None:
    # T1: a hook that held the callback would be copied with it, and its Trainer too.
    copies: list[nn.Module] = []

    class Copies(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            copies.append(copy.deepcopy(pl_module))

    pruning = ScheduledPruning(sparsity=0.5)
    quiet_trainer(max_steps=2, callbacks=[pruning, Copies()]).fit(Classifier(), TinyData())
    assert len(copies) == 2
    for made in copies:
        assert all(value is not pruning for value in vars(made).values())
        made(torch.zeros(2, 16)).sum().backward()


def test_configure_model_may_build_the_layers() -> None:
    class Late(L.LightningModule):
        def configure_model(self) -> None:
            if not hasattr(self, "net"):
                self.net = Classifier()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.net.training_step(batch, batch_idx)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Late()
    quiet_trainer(limit_val_batches=0, callbacks=[ScheduledPruning(sparsity=0.5)]).fit(module, OnlyTrain())
    assert zeros(module.net)[0] == TOTAL // 2


def test_setup_of_the_module_may_build_the_layers() -> None:
    # Lightning calls the module's own setup after the callbacks'.
    class Late(Classifier):
        def setup(self, stage: str) -> None:
            self.head = nn.Linear(32, 4)

    module = Late()
    quiet_trainer(callbacks=[ScheduledPruning(sparsity=0.5)]).fit(module, TinyData())
    assert zeros(module)[0] == TOTAL // 2


class OnlyTrain(L.LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        data = TinyData()
        data.setup("fit")
        return data.train_dataloader()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_p16_a_compiled_submodule() -> None:
    class Compiled(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.compile(Classifier())

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Compiled()
    order = list(module.state_dict())
    pruning = ScheduledPruning(sparsity=0.9, targets=Targets(include=["net.body"]))
    quiet_trainer(max_epochs=2, callbacks=[pruning]).fit(module, OnlyTrain())
    assert list(pruning.masks) == ["net.body.weight"]
    assert list(module.state_dict()) == order
    assert count_zeros([module.net._orig_mod.body.weight])[0] == round(0.9 * 512)
    # The compiled form reads the zeroed weights.
    x = torch.randn(8, 16)
    torch.testing.assert_close(module.net.eval()(x), module.net._orig_mod.eval()(x))


@pytest.mark.slow
def test_p16_the_whole_module_compiled(tmp_path: Path) -> None:
    module = Classifier()
    pruning = ScheduledPruning(sparsity=0.7, window=Window(0.1, 0.8))
    trainer = quiet_trainer(max_epochs=2, callbacks=[pruning])
    trainer.fit(torch.compile(module), TinyData())
    trainer.save_checkpoint(tmp_path / "compiled.ckpt")
    assert set(pruning.masks) == set(WEIGHTS)
    assert zeros(module)[0] == round(0.7 * TOTAL)
    again = Classifier()
    quiet_trainer(max_epochs=2, callbacks=[pruning]).validate(
        again, TinyData(), ckpt_path=tmp_path / "compiled.ckpt", verbose=False
    )
    assert_same_state(again, module)
