"""Optimizers remember nothing of pruned weights, whose gradients count in no norm; weights come back as they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor
from torch.nn.utils.parametrizations import weight_norm
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from lightning_compress import CompressionError, Linear, ScheduledPruning, Targets, Window
from tests.support.data import TinyData
from tests.support.modules import Classifier, ManualClassifier, quiet_trainer
from tests.support.oracles import assert_same_state, snapshot

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
]

OPTIMIZERS: dict[str, tuple[Callable[[Any], Optimizer], set[str]]] = {
    "sgd": (lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2), {"momentum_buffer"}),
    "nesterov": (lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True), {"momentum_buffer"}),
    "adam": (lambda p: Adam(p, lr=0.01, amsgrad=True, weight_decay=0.1), {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
    "adamw": (lambda p: AdamW(p, lr=0.01, weight_decay=0.1), {"exp_avg", "exp_avg_sq"}),
    "rmsprop": (
        lambda p: RMSprop(p, lr=0.01, momentum=0.9, centered=True),
        {"square_avg", "momentum_buffer", "grad_avg"},
    ),
}


class Net(Classifier):
    def __init__(self, optimizer: str = "sgd") -> None:
        super().__init__()
        self.optimizer = optimizer

    def configure_optimizers(self) -> Optimizer:
        return OPTIMIZERS[self.optimizer][0](self.parameters())


def nonzero_moments(state: dict[str, Any], mask: Tensor) -> list[str]:
    """Names of what an optimizer remembers of one weight that isn't zero where it is pruned."""
    moments = {key: value for key, value in state.items() if isinstance(value, Tensor) and value.shape == mask.shape}
    return [key for key, value in moments.items() if value[~mask].any()]


class Watch(Callback):
    """After each step of each optimizer (as it left its moments) and at each batch end."""

    def __init__(self, pruning: ScheduledPruning) -> None:
        self.pruning = pruning
        self.steps, self.looked = 0, 0
        self.seen: set[str] = set()
        self.nonzero_keys: set[str] = set()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.look(trainer, pl_module)
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(lambda *_: self.look(trainer, pl_module, step=True))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.look(trainer, pl_module)

    def look(self, trainer: L.Trainer, module: L.LightningModule, step: bool = False) -> None:
        self.steps += step
        for optimizer in trainer.optimizers:
            for name, mask in self.pruning.masks.items():
                weight = module.get_parameter(name)
                state = optimizer.state.get(weight, {})
                assert not nonzero_moments(state, mask), (name, self.steps, step)
                if not mask.all() and state:
                    self.looked += 1
                    self.seen |= {key for key, value in state.items() if torch.is_tensor(value) and value.dim() > 1}
                    self.nonzero_keys |= {
                        k for k, v in state.items() if torch.is_tensor(v) and v.dim() > 1 and v[mask].any()
                    }


def pruner(**kwargs: Any) -> ScheduledPruning:
    return ScheduledPruning(**{"sparsity": 0.7, "window": Window(2, 12, unit="step"), **kwargs})


@pytest.mark.parametrize("regrow", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_t10_after_every_step_the_moments_of_pruned_weights_are_zero(name: str, regrow: bool) -> None:
    pruning = pruner(regrow=regrow)
    watch = Watch(pruning)
    quiet_trainer(max_epochs=3, limit_val_batches=0, callbacks=[pruning, watch]).fit(Net(name), TinyData())
    assert watch.steps == 21 and watch.looked > 40
    assert watch.seen == watch.nonzero_keys == OPTIMIZERS[name][1]


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_units_and_what_goes_with_them_have_no_moments_either(name: str) -> None:
    module = Net(name)
    pruning = pruner(method="ln_structured", scope="layer", targets=Targets(include=["body"]), window=Window(0.1, 0.5))
    trainer = quiet_trainer(max_epochs=3, limit_val_batches=0, callbacks=[pruning])
    trainer.fit(module, TinyData())
    gone = ~pruning.masks["body.weight"].any(1)
    assert gone.any()
    for parameter in (module.body.weight, module.body.bias, module.norm.weight, module.norm.bias):
        for key, moment in trainer.optimizers[0].state[parameter].items():
            if moment.shape == parameter.shape:
                assert not moment[gone].any() and moment[~gone].any(), key


def saved_moments(path: Path) -> tuple[int, list[str]]:
    """How many masked elements a checkpoint has, and the moments in it that aren't zero there."""
    from lightning_compress.pruning.masks import unpack

    checkpoint = torch.load(path, weights_only=True)
    [state] = [callback for callback in checkpoint["callbacks"].values() if "masks" in callback]
    order = [name for name, _ in Net().named_parameters()]
    found, pruned = [], 0
    for name, mask in unpack(state["masks"]).items():
        pruned += int((~mask).sum())
        for optimizer in checkpoint["optimizer_states"]:
            moments = optimizer["state"].get(order.index(name), {})
            found += [f"{name} {key}" for key in nonzero_moments(moments, mask)]
        assert not checkpoint["state_dict"][name][~mask].any()
    return pruned, found


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_p15_in_every_checkpoint_and_after_resume_too(name: str, tmp_path: Path) -> None:
    def every(folder: str) -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)

    kwargs: Any = {"max_epochs": 16, "limit_train_batches": 1, "limit_val_batches": 0, "enable_checkpointing": True}
    pruning = pruner()
    quiet_trainer(callbacks=[pruning, every("whole")], **kwargs).fit(Net(name), TinyData())
    counts = []
    for step in range(1, 17):
        pruned, found = saved_moments(tmp_path / f"whole/step={step}.ckpt")
        assert not found
        counts.append(pruned)
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == 448
    for step in (5, 11):
        again = pruner()
        watch = Watch(again)
        trainer = quiet_trainer(callbacks=[again, watch, every(f"from {step}")], **kwargs)
        trainer.fit(Net(name), TinyData(), ckpt_path=tmp_path / f"whole/step={step}.ckpt", weights_only=True)
        assert watch.steps == 16 - step and watch.looked
        assert saved_moments(tmp_path / f"from {step}/step=16.ckpt") == (448, [])


def test_p15_moments_that_a_foreign_checkpoint_brings_are_zeroed_at_the_start(tmp_path: Path) -> None:
    # PL#20338: the optimizer's state is restored after `on_fit_start`.
    save = ModelCheckpoint(tmp_path / "plain", filename="{epoch}", save_top_k=-1)
    quiet_trainer(max_epochs=1, enable_checkpointing=True, callbacks=[save]).fit(Net("adam"), TinyData())
    mask = torch.rand(32, 16) < 0.5
    torch.save({"body.weight": mask}, tmp_path / "masks.pt")
    pruning = ScheduledPruning("custom_from_mask", mask_file=str(tmp_path / "masks.pt"), window=Window(0))
    watch = Watch(pruning)
    trainer = quiet_trainer(max_epochs=2, limit_val_batches=0, callbacks=[pruning, watch])
    module = Net("adam")
    trainer.fit(module, TinyData(), ckpt_path=tmp_path / "plain/epoch=0.ckpt", weights_only=True)
    assert watch.looked and not module.body.weight[~mask].any()


class Norms(Callback):
    """The norm of all gradients, and one without those of pruned weights, both added up by hand."""

    def __init__(self, pruning: ScheduledPruning) -> None:
        self.pruning = pruning
        self.by_hand: list[float] = []
        self.with_pruned: list[float] = []

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        total = squared = 0.0
        for name, parameter in pl_module.named_parameters():
            squares = parameter.grad.double().square()
            total += float(squares.sum())
            squared += float(squares[self.pruning.masks[name]].sum() if name in self.pruning.masks else squares.sum())
        self.with_pruned.append(total**0.5)
        self.by_hand.append(squared**0.5)


class Clips(Net):
    """Clips as Lightning does, and notes the norm of what is there to clip, and of what is left."""

    def __init__(self) -> None:
        super().__init__()
        self.norms: list[float] = []
        self.after: list[float] = []

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None, **kwargs: Any) -> None:
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        self.norms.append(float(torch.nn.utils.get_total_norm(grads)))
        self.clip_gradients(optimizer, gradient_clip_val=gradient_clip_val, gradient_clip_algorithm="norm")
        self.after.append(float(torch.nn.utils.get_total_norm(grads)))


def test_clipping_by_norm_counts_no_gradient_of_pruned_weights() -> None:
    module, pruning = Clips(), pruner(sparsity=0.9, window=Window(2, 6, unit="step"))
    norms = Norms(pruning)
    quiet_trainer(max_epochs=3, limit_val_batches=0, gradient_clip_val=0.01, callbacks=[norms, pruning]).fit(
        module, TinyData()
    )
    assert module.norms == pytest.approx(norms.by_hand, rel=1e-5)
    assert module.after == pytest.approx([0.01] * 21, rel=1e-3)
    # It makes a difference: with the pruned ones the norms would be others.
    assert all(large > 1.05 * small for large, small in zip(norms.with_pruned[7:], norms.by_hand[7:], strict=True))


def test_manual_optimization_with_two_optimizers() -> None:
    pruning = pruner()
    watch = Watch(pruning)
    quiet_trainer(max_epochs=3, limit_val_batches=0, callbacks=[pruning, watch]).fit(ManualClassifier(), TinyData())
    assert watch.steps == 42 and watch.looked > 40
    assert watch.seen == {"momentum_buffer", "exp_avg", "exp_avg_sq"}


class Raw(ManualClassifier):
    """Steps torch's own optimizers, past Lightning: no callback hook runs before the step."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers = self.optimizers(use_pl_optimizer=False)
        loss = F.cross_entropy(self(batch[0]), batch[1])
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()


def test_raw_optimizers_that_step_past_lightning() -> None:
    module, pruning = Raw(), pruner(window=Window(2, 12, unit="step"))
    watch = Watch(pruning)
    quiet_trainer(max_epochs=3, limit_val_batches=0, callbacks=[pruning, watch]).fit(module, TinyData())
    assert watch.steps == 42 and watch.looked > 40
    assert watch.seen == {"momentum_buffer", "exp_avg", "exp_avg_sq"}


def test_raw_optimizers_train_as_lightnings_do() -> None:
    class Through(Raw):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizers = self.optimizers()
            loss = F.cross_entropy(self(batch[0]), batch[1])
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in optimizers:
                optimizer.step()

    ends = []
    for build in (Raw, Through):
        torch.manual_seed(0)
        module = build()
        pruning = pruner(window=Window(2, 12, unit="step"))
        quiet_trainer(max_epochs=3, limit_val_batches=0, callbacks=[pruning]).fit(module, TinyData())
        weights = {name: weight + 0.0 for name, weight in module.named_parameters()}  # a pruned one may be -0.0
        ends.append({"weights": weights, "masks": pruning.masks})
    assert_same_state(*ends)


def test_weights_that_are_not_pruned_keep_their_moments() -> None:
    ends = []
    for sparsity in (None, 0.5):
        torch.manual_seed(0)
        module = Net("adam")
        callbacks = [] if sparsity is None else [pruner(sparsity=sparsity, window=Window(3, 4, unit="step"))]
        trainer = quiet_trainer(max_epochs=1, limit_train_batches=4, limit_val_batches=0, callbacks=callbacks)
        trainer.fit(module, TinyData())
        ends.append((module, trainer.optimizers[0], callbacks))
    (plain, plain_optimizer, _), (module, optimizer, [pruning]) = ends
    mask = pruning.masks["body.weight"]
    # The last event came right after the last step, so what stays is as it would have been up to the first event.
    assert not optimizer.state[module.body.weight]["exp_avg"][~mask].any()
    assert int(optimizer.state[module.body.weight]["step"]) == 4
    assert plain_optimizer.state[plain.body.weight]["exp_avg"][~mask].any()
    assert optimizer.state[module.body.weight]["exp_avg"][mask].all()


WEIGHTS = ("body.weight", "head.weight")

TOTAL = 16 * 32 + 32 * 4


def pruned(masks: dict[str, Tensor]) -> set[tuple[str, int]]:
    return {(name, i) for name, mask in masks.items() for i, stays in enumerate(mask.flatten().tolist()) if not stays}


class WatchRegrowth(Callback):
    """Masks at every batch end; what comes back must be, bit for bit, what the last step before it went made of it."""

    def __init__(self, pruning: ScheduledPruning) -> None:
        self.pruning = pruning
        self.masks: list[dict[str, Tensor]] = []
        self.stepped: dict[str, Tensor] = {}
        self.went: dict[str, Tensor] = {}
        self.back = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        def after_step(*_: Any) -> None:
            self.stepped = {name: pl_module.get_parameter(name).detach().clone() for name in WEIGHTS}

        trainer.optimizers[0].register_step_post_hook(after_step)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        masks = {name: mask.clone() for name, mask in self.pruning.masks.items()}
        before = self.masks[-1] if self.masks else {name: torch.ones_like(mask) for name, mask in masks.items()}
        for name, mask in masks.items():
            weight = pl_module.get_parameter(name)
            assert not weight[~mask].any()
            came = mask & ~before[name]
            assert torch.equal(weight[came], self.went.get(name, weight)[came]) and weight[came].all()
            assert torch.equal(weight[mask & before[name]], self.stepped[name][mask & before[name]])
            self.back += int(came.sum())
            goes = before[name] & ~mask
            self.went[name] = torch.where(goes, self.stepped[name], self.went.get(name, self.stepped[name]))
        self.masks.append(masks)


class Restless(Classifier):
    """Weights move far enough for their order to change."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.2)


@pytest.mark.parametrize("method", ["magnitude", "taylor", "movement"])
def test_pruned_weights_come_back_with_the_value_that_they_had(method: str) -> None:
    pruning = ScheduledPruning(method, 0.6, regrow=True, schedule=Linear(), window=Window(0.1, 0.8))
    watch = WatchRegrowth(pruning)
    module = Restless()
    quiet_trainer(max_epochs=5, limit_val_batches=0, callbacks=[pruning, watch]).fit(module, TinyData())
    if method != "magnitude":  # Magnitudes that are kept aside seldom outgrow others so soon.
        assert watch.back > 10
    counts = [len(pruned(masks)) for masks in watch.masks]
    assert counts == sorted(counts) and counts[-1] == round(0.6 * TOTAL)
    # Frozen after the window: 35 steps, of which it ends with the 28th.
    for masks in watch.masks[27:]:
        assert_same_state(watch.masks[-1], masks)
    masks_only_grow = ScheduledPruning(method, 0.6, schedule=Linear(), window=Window(0.1, 0.8))
    never = WatchRegrowth(masks_only_grow)
    quiet_trainer(max_epochs=5, limit_val_batches=0, callbacks=[masks_only_grow, never]).fit(Restless(), TinyData())
    assert never.back == 0


def test_with_magnitude_a_weight_comes_back_once_the_others_have_shrunk() -> None:
    class Shrinks(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return 20 * (self.body.weight[16:] ** 2).sum() + 0 * super().training_step(batch, batch_idx)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    module = Shrinks()
    first = module.body.weight.detach().clone()
    pruning = ScheduledPruning(
        "magnitude", 0.3, "layer", regrow=True, schedule=Linear(), window=Window(1, 10, unit="step")
    )
    watch = WatchRegrowth(pruning)
    quiet_trainer(max_epochs=2, limit_val_batches=0, callbacks=[pruning, watch]).fit(module, TinyData())
    early, late = watch.masks[3]["body.weight"][:16], watch.masks[-1]["body.weight"][:16]
    assert int((late & ~early).sum()) >= 5
    # The upper half is moved by nothing, so these are the values of the start, bit for bit.
    assert torch.equal(module.body.weight[:16][late], first[:16][late])


def test_a_second_fit_never_goes_below_what_was_pruned_before() -> None:
    module, pruning = Restless(), ScheduledPruning("taylor", 0.6, regrow=True, window=Window(0.2, 0.8))
    quiet_trainer(max_epochs=2, limit_val_batches=0, callbacks=[pruning]).fit(module, TinyData())
    before = snapshot(pruning.masks)
    watch = WatchRegrowth(pruning)
    quiet_trainer(max_epochs=2, limit_val_batches=0, callbacks=[pruning, watch]).fit(module, TinyData())
    assert {len(pruned(masks)) for masks in watch.masks} == {round(0.6 * TOTAL)}
    assert_same_state(before, pruning.masks)


def test_regrowing_needs_a_criterion() -> None:
    for method in ("random_unstructured", "ln_structured", "tests.pruning.rules.LargestFirst"):
        with pytest.raises(CompressionError, match="`regrow` must be False with method="):
            ScheduledPruning(method, 0.5, "layer", regrow=True)


def test_scores_and_kept_values_are_dropped_once_the_window_has_ended() -> None:
    class Looks(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            state = pruning.state_dict()
            sizes.append((len(state["scores"]), len(state["aside"])))

    sizes: list[tuple[int, int]] = []
    pruning = ScheduledPruning("taylor", 0.5, regrow=True, window=Window(2, 9, unit="step"))
    quiet_trainer(max_epochs=2, limit_val_batches=0, callbacks=[pruning, Looks()]).fit(Classifier(), TinyData())
    assert sizes[0] == (2, 0) and sizes[7] == (2, 2)
    assert set(sizes[8:]) == {(0, 0)}


def test_a_weight_norm_is_refused() -> None:
    # Of a whole row the magnitude goes to zero, which would have to be kept aside too.
    class Normed(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.body = weight_norm(self.body)

    module = Normed()
    before = snapshot(module)
    with pytest.raises(CompressionError, match="`regrow` must be False where a weight norm is pruned"):
        quiet_trainer(callbacks=[ScheduledPruning(sparsity=0.5, regrow=True)]).fit(module, TinyData())
    assert_same_state(before, module)
