"""`ScheduledPruning`: when masks grow, to how much, and what is refused."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
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
from lightning_compress.pruning.masks import HISTORY_POINTS
from tests.pruning.test_masking import TOTAL, WEIGHTS, TrainWithoutDrawing, Watch, attributes, zeros
from tests.support.data import TinyData, keyword_loader
from tests.support.modules import Classifier, KeywordClassifier, ManualClassifier, quiet_trainer
from tests.support.oracles import (
    assert_same_state,
    count_zeros,
    same_random_state,
    snapshot,
)


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


def test_with_sparsity_zero_training_is_that_of_plain_lightning() -> None:
    # Our callbacks draw nothing from the global generators and touch nothing.
    torch.manual_seed(0)
    unpruned, plain = Classifier(), Classifier()
    plain.load_state_dict(unpruned.state_dict())
    data = TinyData()
    quiet_trainer(max_epochs=2, callbacks=[ScheduledPruning("random_unstructured", 0.0)]).fit(unpruned, data)
    quiet_trainer(max_epochs=2).fit(plain, data)
    assert_same_state(unpruned, plain)


@pytest.mark.parametrize("method", ["l1_unstructured", "random_unstructured", "random_structured"])
def test_a_fit_draws_nothing_from_the_global_generators(method: str) -> None:
    module = Classifier()
    with same_random_state():
        quiet_trainer(num_sanity_val_steps=0, limit_val_batches=0, callbacks=[ScheduledPruning(method, 0.5)]).fit(
            module, TrainWithoutDrawing()
        )
    assert zeros(module)[0] > 0


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


class Truth(Callback):
    """What the weights really are at each batch end, by counting."""

    def __init__(self) -> None:
        self.overall: dict[int, float] = {}
        self.layers: dict[int, dict[str, float]] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        both = {name: count_zeros([pl_module.get_parameter(name)]) for name in ("body.weight", "head.weight")}
        step = len(self.overall) + 1
        self.overall[step] = sum(zeros for zeros, _ in both.values()) / TOTAL
        self.layers[trainer.current_epoch] = {name: zeros / count for name, (zeros, count) in both.items()}


def rows(logger: CSVLogger) -> list[dict[str, str]]:
    with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def logged(logger: CSVLogger, name: str) -> dict[int, float]:
    return {int(row["step"]): float(row[name]) for row in rows(logger) if row.get(name)}


@pytest.mark.parametrize("build", [Classifier, ManualClassifier])
def test_what_is_logged_is_what_counting_finds(build: type[Classifier], tmp_path: Path) -> None:
    logger, truth = CSVLogger(tmp_path), Truth()
    pruning = ScheduledPruning(sparsity=0.8, schedule=Linear(), window=Window(3, 17, unit="step"))
    quiet_trainer(
        max_epochs=3, logger=logger, log_every_n_steps=1, limit_val_batches=0, callbacks=[pruning, truth]
    ).fit(build(), TinyData())
    found = logged(logger, "sparsity")
    # Lightning counts the steps before a batch, and writes a value again until its epoch ends.
    assert set(found) >= set(range(2, 17))
    assert list(found.values()) == pytest.approx([truth.overall[step + 1] for step in found])
    assert found[2] == 0.0 < found[3] < found[16] == pytest.approx(0.8)
    for name in ("body.weight", "head.weight"):
        by_epoch = list(logged(logger, f"sparsity/{name}").values())
        assert by_epoch == pytest.approx([truth.layers[epoch][name] for epoch in range(3)]), name
        assert by_epoch[0] < by_epoch[-1]


def test_with_a_logging_interval_that_misses_the_events_the_final_sparsity_is_in_the_log_too(tmp_path: Path) -> None:
    # Every fifth step is written; the masks' last growth is at the 28th, an epoch's last.
    logger = CSVLogger(tmp_path)
    pruning = ScheduledPruning(sparsity=0.8, window=Window(8, 28, unit="step", every_n_steps=4))
    trainer = quiet_trainer(max_epochs=6, logger=logger, log_every_n_steps=5, limit_val_batches=0, callbacks=[pruning])
    trainer.fit(Classifier(), TinyData())
    assert trainer.callback_metrics["sparsity"] == pytest.approx(0.8)
    assert list(logged(logger, "sparsity/body.weight").values())[-1] > 0.5
    assert list(logged(logger, "sparsity").values())[-1] == pytest.approx(0.8)


@pytest.mark.parametrize("shown", [False, True])
def test_the_progress_bar_shows_it_if_asked(shown: bool) -> None:
    pruning = ScheduledPruning(sparsity=0.8, progress_bar=shown, window=Window(0.1, 0.9))
    seen: list[dict[str, Any]] = []

    class Looks(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            seen.append(dict(trainer.progress_bar_metrics))

    trainer = quiet_trainer(max_epochs=2, limit_val_batches=0, callbacks=[pruning, Looks()])
    trainer.fit(Classifier(), TinyData())
    assert ("sparsity" in trainer.progress_bar_metrics) == shown
    assert not any(name.startswith("sparsity/") for metrics in seen for name in metrics)
    if shown:
        assert trainer.progress_bar_metrics["sparsity"] == pytest.approx(0.8)


def test_several_callbacks_are_numbered(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    body = ScheduledPruning(sparsity=0.9, targets=Targets(include=["body"]), window=Window(0.1, 0.9))
    head = ScheduledPruning(sparsity=0.25, targets=Targets(include=["head"]), window=Window(0.1, 0.9))
    trainer = quiet_trainer(
        max_epochs=2, logger=logger, log_every_n_steps=1, limit_val_batches=0, callbacks=[body, Truth(), head]
    )
    trainer.fit(Classifier(), TinyData())
    metrics = trainer.callback_metrics
    assert metrics["sparsity_0"] == pytest.approx(round(0.9 * 512) / 512)
    assert metrics["sparsity_1"] == pytest.approx(0.25)
    assert metrics["sparsity_0/body.weight"] == metrics["sparsity_0"]
    assert metrics["sparsity_1/head.weight"] == metrics["sparsity_1"]
    assert not [name for name in metrics if name.startswith("sparsity/") or name == "sparsity"]


def test_one_shot_at_the_first_step_is_logged_at_the_epochs_end(tmp_path: Path) -> None:
    pruning = ScheduledPruning(sparsity=0.5, schedule=OneShot(), window=Window(0))
    trainer = quiet_trainer(max_epochs=1, limit_val_batches=0, callbacks=[pruning])
    trainer.fit(Classifier(), TinyData())
    layers = [float(trainer.callback_metrics[f"sparsity/{name}"]) for name in ("body.weight", "head.weight")]
    assert (512 * layers[0] + 128 * layers[1]) / TOTAL == pytest.approx(0.5)


def test_the_history_has_steps_and_layers() -> None:
    truth = Truth()
    pruning = ScheduledPruning(sparsity=0.8, schedule=Linear(), window=Window(3, 17, unit="step", every_n_steps=2))
    quiet_trainer(max_epochs=3, limit_val_batches=0, callbacks=[pruning, truth]).fit(Classifier(), TinyData())
    history = pruning.sparsity_history
    assert [point.step for point in history] == [3, 5, 7, 9, 11, 13, 15, 17]
    assert [point.sparsity for point in history] == pytest.approx([truth.overall[point.step] for point in history])
    last = history[-1]
    assert (512 * last.by_layer["body.weight"] + 128 * last.by_layer["head.weight"]) / TOTAL == last.sparsity == 0.8
    assert last.by_layer == pytest.approx(truth.layers[2])


def test_the_history_stays_short_and_has_the_end() -> None:
    # A cubic schedule ends in steps that are too small to be noted each.
    pruning = ScheduledPruning(sparsity=0.97, window=Window(0, 1, every_n_steps=1))
    quiet_trainer(max_epochs=30, limit_val_batches=0, callbacks=[pruning]).fit(Classifier(), TinyData())
    history = pruning.sparsity_history
    assert 40 < len(history) <= HISTORY_POINTS + 2
    assert history[-1].step == 210 and history[-1].sparsity == round(0.97 * TOTAL) / TOTAL
    steps, values = [point.step for point in history], [point.sparsity for point in history]
    assert steps == sorted(set(steps)) and values == sorted(values)


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
def test_a_resumed_run_goes_on_with_the_history(tmp_path: Path) -> None:
    def run(folder: str, path: Any = None) -> ScheduledPruning:
        torch.manual_seed(0)
        save = ModelCheckpoint(tmp_path / folder, filename="{epoch}", save_top_k=-1)
        pruning = ScheduledPruning(sparsity=0.8, window=Window(3, 17, unit="step"))
        trainer = quiet_trainer(max_epochs=3, enable_checkpointing=True, callbacks=[pruning, save])
        trainer.fit(Classifier(), TinyData(), ckpt_path=path, weights_only=True)
        return pruning

    whole = run("whole").sparsity_history
    assert len(whole) > 5
    for epoch in (0, 1):
        assert run(f"from {epoch}", tmp_path / f"whole/epoch={epoch}.ckpt").sparsity_history == whole


def test_a_second_fit_starts_a_new_history() -> None:
    pruning = ScheduledPruning(sparsity=0.8, window=Window(0.1, 0.9))
    for _ in range(2):
        quiet_trainer(max_epochs=2, limit_val_batches=0, callbacks=[pruning]).fit(Classifier(), TinyData())
        assert pruning.sparsity_history[0].sparsity < 0.8 == pruning.sparsity_history[-1].sparsity
