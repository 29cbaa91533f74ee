"""What a fit tells about its sparsity: logged values, the progress bar, the history; and the counting itself."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from lightning_compress import Linear, OneShot, ScheduledPruning, Targets, Window, sparsity
from lightning_compress.pruning.masks import HISTORY_POINTS
from tests.support.architectures import TiedLanguageModel
from tests.support.data import TinyData
from tests.support.modules import Classifier, ManualClassifier, quiet_trainer
from tests.support.oracles import count_zeros

TOTAL = 16 * 32 + 32 * 4


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


# The functional `sparsity`.


@pytest.mark.parametrize("seed", range(5))
def test_sparsity_is_what_counting_finds(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5), nn.LSTM(5, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.rand(parameter.shape, generator=generator) < 0.6)
    weights = [model[0].weight, model[3].weight, model[4].weight_ih_l0, model[4].weight_hh_l0]
    zeros, total = count_zeros(weights)
    assert zeros and sparsity(model) == zeros / total
    assert sparsity(model, Targets(include=["3"])) == count_zeros([model[3].weight])[0] / 80


def test_p3_biases_and_zeros_elsewhere_do_not_count() -> None:
    # P3, PL#13595.
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4, bias=False))
    assert sparsity(model) == 0.0  # BatchNorm's shifts are all zero.
    with torch.no_grad():
        model[0].bias.zero_()
        model[2].weight[0].zero_()
    assert sparsity(model) == 4 / 32


def test_p3_n9_tied_weights_count_once() -> None:
    model = TiedLanguageModel()
    targets = Targets(types=[nn.Linear, nn.Embedding])
    tied = [p for p in model.parameters() if p.dim() == 2]
    assert len(tied) < len([m for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding))])
    with torch.no_grad():
        for parameter in tied:
            parameter[0].zero_()
    zeros, total = count_zeros(tied)
    assert sparsity(model, targets) == zeros / total


@pytest.mark.parametrize("dim", [0, 1, None])
def test_with_weight_norm_zeros_of_the_weight_itself_count(dim: Any) -> None:
    layer = weight_norm(nn.Linear(6, 4), dim=dim)
    with torch.no_grad():
        layer.parametrizations.weight.original1[0, :3].zero_()
        if dim == 0:
            layer.parametrizations.weight.original0[2].zero_()
    weight = layer.weight.detach()
    expected = sum(value == 0 for value in weight.flatten().tolist()) / 24
    assert sparsity(nn.Sequential(layer)) == expected == (9 if dim == 0 else 3) / 24
