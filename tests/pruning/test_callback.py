"""`ScheduledPruning` in real fits: the promises to the user's model."""

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
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_compress import (
    CompressionError,
    Linear,
    OneShot,
    Polynomial,
    ScheduledPruning,
    Steps,
    Targets,
    Window,
)
from tests.support.data import TinyData, keyword_loader
from tests.support.modules import Classifier, KeywordClassifier, ManualClassifier, ZooModule, quiet_trainer
from tests.support.oracles import (
    assert_different_state,
    assert_same_state,
    count_zeros,
    hooks,
    same_random_state,
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


class EndlessData(TinyData):
    class Stream(IterableDataset):  # type: ignore[type-arg]
        def __init__(self, dataset: Any) -> None:
            self.dataset = dataset

        def __iter__(self) -> Iterator[Any]:
            while True:
                yield from self.dataset

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.Stream(self.train), batch_size=8)


FITS: dict[str, dict[str, Any]] = {
    "one epoch": {},
    "uneven accumulation": {"max_epochs": 2, "accumulate_grad_batches": 3},
    "limit_train_batches": {"max_epochs": 2, "limit_train_batches": 5, "accumulate_grad_batches": 2},
    "max_steps": {"max_epochs": -1, "max_steps": 9},
    "max_steps within an accumulation": {"max_epochs": 9, "max_steps": 4, "accumulate_grad_batches": 4},
    "one step": {"max_epochs": 1, "max_steps": 1},
}


@pytest.mark.parametrize("name", FITS)
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_final_sparsity_is_exact(name: str, scope: Any) -> None:
    module = Classifier()
    trainer = quiet_trainer(callbacks=[ScheduledPruning(sparsity=0.77, scope=scope)], **FITS[name])
    trainer.fit(module, TinyData())
    assert zeros(module) == (round(0.77 * TOTAL), TOTAL)
    if scope == "layer":
        assert count_zeros([module.head.weight])[0] == round(0.77 * 128)
    assert trainer.callback_metrics["sparsity"] == pytest.approx(round(0.77 * TOTAL) / TOTAL)


def test_final_sparsity_is_exact_with_an_endless_loader_and_max_steps() -> None:
    module = Classifier()
    quiet_trainer(
        max_epochs=-1,
        max_steps=11,
        limit_val_batches=1,
        val_check_interval=5,
        callbacks=[ScheduledPruning(sparsity=0.9)],
    ).fit(module, EndlessData())
    assert zeros(module)[0] == round(0.9 * TOTAL)


@pytest.mark.parametrize("schedule", [OneShot(), Linear(), Polynomial(), Steps([0.2, 0.6], [0.5, 1.0])], ids=repr)
@pytest.mark.parametrize("method", ["l1_unstructured", "random_unstructured"])
def test_final_sparsity_is_exact_with_every_schedule(schedule: Any, method: str) -> None:
    module = Classifier()
    pruning = ScheduledPruning(method, 0.5, schedule=schedule, window=Window(0.2, 0.9))
    quiet_trainer(max_epochs=2, callbacks=[pruning]).fit(module, TinyData())
    assert zeros(module)[0] == TOTAL // 2


@pytest.mark.parametrize("method", ["ln_structured", "random_structured"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_structured_rules_end_on_whole_units(method: str, scope: Any) -> None:
    module = Classifier()
    pruning = ScheduledPruning(method, 0.5, scope, targets=Targets(exclude=["head"]))
    quiet_trainer(max_epochs=2, callbacks=[pruning]).fit(module, TinyData())
    rows = (module.body.weight != 0).all(1)
    assert int(rows.sum()) == 16 and not module.body.weight[~rows].any()


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
    kept = pruning.masks["body.weight"]
    assert (module.body.weight[kept] != 0).all()


def test_with_sparsity_zero_training_is_that_of_plain_lightning() -> None:
    # Our callbacks draw nothing from the global generators and touch nothing.
    torch.manual_seed(0)
    ours, plain = Classifier(), Classifier()
    plain.load_state_dict(ours.state_dict())
    data = TinyData()
    quiet_trainer(max_epochs=2, callbacks=[ScheduledPruning("random_unstructured", 0.0)]).fit(ours, data)
    quiet_trainer(max_epochs=2).fit(plain, data)
    assert_same_state(ours, plain)


@pytest.mark.parametrize("method", ["l1_unstructured", "random_unstructured", "random_structured"])
def test_a_fit_draws_nothing_from_the_global_generators(method: str) -> None:
    module = Classifier()
    with same_random_state():
        quiet_trainer(num_sanity_val_steps=0, limit_val_batches=0, callbacks=[ScheduledPruning(method, 0.5)]).fit(
            module, TrainWithoutDrawing()
        )
    assert zeros(module)[0] > 0


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


def test_custom_from_mask_from_a_file(tmp_path: Path) -> None:
    mask = torch.rand(32, 16, generator=torch.Generator().manual_seed(1)) < 0.3
    torch.save({"body.weight": mask}, tmp_path / "masks.pt")
    module = Classifier()
    pruning = ScheduledPruning("custom_from_mask", mask_file=str(tmp_path / "masks.pt"), window=Window(0.5))
    watch = Watch(pruning)
    quiet_trainer(max_epochs=2, callbacks=[pruning, watch]).fit(module, TinyData())
    assert torch.equal(module.body.weight != 0, mask)
    assert (module.head.weight != 0).all()
    assert len(set(watch.sparsities[:6])) == 1 and watch.sparsities[0] == 0.0
    assert len(set(watch.sparsities[6:])) == 1 and watch.sparsities[6] > 0.5


MASK_FILES: dict[str, tuple[Any, str]] = {
    "unknown name": ({"bdy.weight": torch.ones(32, 16)}, r"must name targeted weights.*'bdy\.weight'.*Nearest: body"),
    "shape": ({"body.weight": torch.ones(16, 32)}, r"weight's shape \(32, 16\)"),
    "values": ({"body.weight": torch.full((32, 16), 0.5)}, "only 0 and 1"),
    "kind": ([torch.ones(1)], "`mask_file` must hold a dict"),
    "missing": (None, "`mask_file` must be a readable file"),
}


@pytest.mark.parametrize("name", MASK_FILES)
def test_bad_mask_files_are_refused_before_training(name: str, tmp_path: Path) -> None:
    content, message = MASK_FILES[name]
    if content is not None:
        torch.save(content, tmp_path / "masks.pt")
    module = Classifier()
    before, had = snapshot(module), attributes(module)
    pruning = ScheduledPruning("custom_from_mask", mask_file=str(tmp_path / "masks.pt"))
    with pytest.raises(CompressionError, match=message):
        quiet_trainer(callbacks=[pruning]).fit(module, TinyData())
    assert_same_state(before, module)
    assert attributes(module) == had


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.5}, r"`sparsity` must lie in \[0, 1\)"),
        ({"sparsity": -0.2}, "`sparsity` must lie"),
        ({}, "`sparsity` must be given"),
        ({"method": "l1_unstructurd", "sparsity": 0.5}, "Nearest: l1_unstructured"),
        ({"sparsity": 0.5, "scope": "model"}, "`scope` must be"),
        ({"sparsity": 0.5, "mask_file": "x.pt"}, "`mask_file` must be given with method='custom_from_mask', and only"),
        ({"method": "custom_from_mask"}, "`mask_file` must be given with"),
        ({"method": "custom_from_mask", "mask_file": "x.pt", "sparsity": 0.5}, "`sparsity` must be left out"),
    ],
)
def test_w11_bad_arguments_are_refused_in_the_constructor(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(CompressionError, match=message):
        ScheduledPruning(**arguments)


@pytest.mark.parametrize(
    ("pruning", "message"),
    [
        (ScheduledPruning(sparsity=0.5, targets=Targets(include=["bdy"])), "'bdy' must match a module.*Nearest: body"),
        (ScheduledPruning(sparsity=0.5, targets=Targets(exclude=["*"])), "at least one trainable weight"),
        (ScheduledPruning("ln_structured", 0.5, dim=3), "`dim` must be a dimension"),
        (ScheduledPruning(sparsity=0.5, window=Window(99, unit="step")), "must begin before the fit ends"),
    ],
    ids=["typo", "nothing", "dim", "window"],
)
def test_errors_at_fit_start_change_nothing(pruning: ScheduledPruning, message: str) -> None:
    module = Classifier()
    before, had = snapshot(module), attributes(module)
    with pytest.raises(CompressionError, match=message):
        quiet_trainer(callbacks=[pruning]).fit(module, TinyData())
    assert_same_state(before, module)
    assert attributes(module) == had


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


def test_two_callbacks_with_different_targets_in_one_trainer(tmp_path: Path) -> None:
    module = Classifier()
    body = ScheduledPruning(sparsity=0.9, targets=Targets(include=["body"]))
    head = ScheduledPruning("random_unstructured", 0.25, targets=Targets(include=["head"]))
    trainer = quiet_trainer(max_epochs=2, callbacks=[body, head])
    trainer.fit(module, TinyData())
    assert count_zeros([module.body.weight])[0] == round(0.9 * 512)
    assert count_zeros([module.head.weight])[0] == 32
    trainer.save_checkpoint(tmp_path / "both.ckpt")
    states = torch.load(tmp_path / "both.ckpt", weights_only=True)["callbacks"]
    assert {name for state in states.values() for name in state.get("masks", {})} == set(WEIGHTS)


def test_keyword_forward_and_an_embedding() -> None:
    # P12.
    module = KeywordClassifier()
    quiet_trainer(callbacks=[ScheduledPruning(sparsity=0.5)]).fit(module, keyword_loader(), keyword_loader())
    assert count_zeros([module.body.weight, module.head.weight])[0] == (512 + 128) // 2
    assert count_zeros([module.embedding.weight])[0] == 0


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


def test_training_that_stops_early_warns_of_the_sparsity_that_it_has() -> None:
    class Stops(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.should_stop = True

    pruning = ScheduledPruning(sparsity=0.9, window=Window(0, 10, unit="step"))
    with pytest.warns(
        UserWarning, match=r"stopped at optimizer step 1, before its window's end at 10: sparsity is 0\.\d+, not 0\.9"
    ):
        quiet_trainer(max_epochs=2, callbacks=[pruning, Stops()]).fit(Classifier(), TinyData())
    assert any("not 0.9" in note for note in pruning.report_notes())


def test_p11_the_masks_grow_before_validation_and_saving(tmp_path: Path) -> None:
    # P11, N4: validation ran before pruning, so the metric was another model's.
    seen: list[tuple[str, int]] = []

    class Order(Callback):
        def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            seen.append(("val", zeros(pl_module)[0]))

        def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: Any) -> None:
            seen.append(("save", count_zeros(checkpoint["state_dict"][name] for name in WEIGHTS)[0]))

    checkpoint = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=-1)
    pruning = ScheduledPruning(sparsity=0.9, window=Window(0, 1))
    quiet_trainer(
        max_epochs=3, num_sanity_val_steps=0, enable_checkpointing=True, callbacks=[pruning, Order(), checkpoint]
    ).fit(Classifier(), TinyData())
    assert [kind for kind, _ in seen] == ["val", "save"] * 3
    assert all(seen[i][1] == seen[i + 1][1] for i in (0, 2, 4))
    assert seen[1][1] < seen[3][1] < seen[5][1] == round(0.9 * TOTAL)


def test_the_sanity_check_sees_the_model_as_it_is() -> None:
    module = Classifier()
    before = snapshot(module)

    class Sanity(Callback):
        def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            after = snapshot(pl_module)
            assert_same_state(before, after)

    quiet_trainer(max_steps=1, callbacks=[Sanity(), ScheduledPruning(sparsity=0.5)]).fit(module, TinyData())


def test_validate_test_and_predict_with_the_callback_change_nothing() -> None:
    module, data = Classifier(), TinyData()
    before, had = snapshot(module), attributes(module)
    trainer = quiet_trainer(callbacks=[ScheduledPruning(sparsity=0.5)])
    trainer.validate(module, data, verbose=False)
    trainer.test(module, data, verbose=False)
    trainer.predict(module, data)
    assert_same_state(before, module)
    assert attributes(module) == had


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


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook", "fsdp"])
def test_strategies_that_lose_structure_are_refused_in_setup(strategy: str) -> None:
    module = Classifier()
    before, had = snapshot(module), attributes(module)
    from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy

    made = (
        FSDPStrategy()
        if strategy == "fsdp"
        else DDPStrategy(start_method=strategy.replace("ddp_", "").replace("notebook", "fork"))
    )
    from types import SimpleNamespace

    trainer: Any = SimpleNamespace(strategy=made, callbacks=[])
    with pytest.raises(CompressionError, match="`strategy` must be one that keeps whole parameters.*strategy='ddp'"):
        ScheduledPruning(sparsity=0.5).setup(trainer, module, "fit")
    assert_same_state(before, module)
    assert attributes(module) == had
