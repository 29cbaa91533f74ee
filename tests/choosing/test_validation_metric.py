"""A Trainer's own validation decides, and batches go through the module's own steps."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as older
import torch
import yaml
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import CSVLogger

from lightning_compress import (
    ChannelPruning,
    PostTrainingQuantization,
    ScheduledPruning,
    ValidationMetric,
    WeightOnly,
    search,
    sensitivity,
)
from lightning_compress.choosing.commands import step_batches
from lightning_compress.choosing.evaluations import drop
from lightning_compress.errors import CompressionError
from tests.support.data import TinyData
from tests.support.modules import Classifier, quiet_trainer
from tests.support.oracles import assert_same_state


def fitted(**options: Any) -> tuple[Classifier, TinyData]:
    torch.manual_seed(0)
    module, data = Classifier(), TinyData()
    quiet_trainer(max_epochs=4, **options).fit(module, data)
    return module, data


def batches(data: TinyData) -> list[Any]:
    return list(data.train_dataloader())


def test_the_metric_is_that_of_the_trainer_and_nothing_of_the_module_changes() -> None:
    module, data = fitted()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    attributes = set(vars(module))
    metric = ValidationMetric(quiet_trainer(), data, "val_loss")
    expected = quiet_trainer().validate(module, data, verbose=False)[0]["val_loss"]
    table = sensitivity(module, metric, batches(data), "weights", mode="min", top=1)
    assert table.metric == pytest.approx(expected)
    assert_same_state(module.state_dict(), before)
    assert set(vars(module)) == attributes


def test_callbacks_of_ours_stay_out_of_it() -> None:
    module, data = fitted()
    trainer = quiet_trainer(callbacks=[PostTrainingQuantization(WeightOnly(2))])
    own = list(trainer.callbacks)
    expected = quiet_trainer().validate(module, data, verbose=False)[0]["val_loss"]
    assert ValidationMetric(trainer, data, "val_loss")(module).value == pytest.approx(expected)
    assert trainer.callbacks == own


def test_drops_have_the_standard_error_of_differences_paired_by_group() -> None:
    module, data = fitted()
    other = copy.deepcopy(module)
    torch.nn.init.normal_(other.head.weight)
    metric = ValidationMetric(quiet_trainer(), data, "val_loss")
    found = drop(metric(module), metric(other), "min")
    falls, sizes = list[float](), list[int]()
    for x, y in data.val_dataloader():
        losses = [torch.nn.functional.cross_entropy(model.eval()(x), y) for model in (module, other)]
        falls.append((losses[1] - losses[0]).item())
        sizes.append(len(x))
    assert len(set(sizes)) > 1
    mean = np.average(falls, weights=sizes)
    spread = sum((size * (fall - mean)) ** 2 for size, fall in zip(sizes, falls, strict=True))
    error = math.sqrt(len(sizes) / (len(sizes) - 1) * spread) / sum(sizes)
    assert (found.value, found.error) == pytest.approx((mean, error), rel=1e-4)
    table = sensitivity(module, metric, batches(data), "weights", levels=[WeightOnly(2)], mode="min", top=1)
    assert table.rows[0].drop_error is not None and " ±" in str(table)


class Perplexity(Classifier):
    """Logs what is no mean over samples."""

    def on_validation_epoch_start(self) -> None:
        self.losses: list[torch.Tensor] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.losses.append(torch.nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def on_validation_epoch_end(self) -> None:
        self.log("perplexity", torch.stack(self.losses).mean().exp())


def test_all_data_at_once_where_a_metric_is_no_mean() -> None:
    torch.manual_seed(0)
    module, data = Perplexity(), TinyData()
    [logged] = quiet_trainer().validate(module, data, verbose=False)
    found = ValidationMetric(quiet_trainer(), data, "perplexity", groups=1)(module)
    assert found.value == pytest.approx(logged["perplexity"])
    assert drop(found, found, "min").error is None
    assert ValidationMetric(quiet_trainer(), data, "perplexity")(module).value != pytest.approx(logged["perplexity"])


class SetsUp(Classifier):
    """Makes in `setup` what its steps need, and takes other weights."""

    def setup(self, stage: str) -> None:
        self.head = torch.nn.Linear(1, 1)
        torch.nn.init.zeros_(self.body.weight)
        self.scale = 1.0 if self.trainer.datamodule is not None else 2.0  # type: ignore[attr-defined]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.scale * torch.nn.functional.cross_entropy(self(batch[0]), batch[1]))


def test_what_setup_makes_is_there_and_what_was_compressed_stays() -> None:
    module, data = fitted()
    late = SetsUp()
    late.load_state_dict(module.state_dict())
    expected = ValidationMetric(quiet_trainer(), data, "val_loss")(module).value
    assert ValidationMetric(quiet_trainer(), data, "val_loss")(late).value == pytest.approx(expected)
    assert_same_state(late.state_dict(), module.state_dict())


def test_data_that_is_set_up_to_validate_alone() -> None:
    class Picky(TinyData):
        def prepare_data(self) -> None:
            self.is_prepared = True

        def setup(self, stage: str) -> None:
            assert stage == "validate" and self.is_prepared
            super().setup(stage)

    module, data = fitted()
    expected = ValidationMetric(quiet_trainer(), data, "val_acc")(module).value
    assert ValidationMetric(quiet_trainer(), Picky(), "val_acc")(module).value == expected


def test_loaders_in_place_of_a_datamodule() -> None:
    module, data = fitted()
    data.setup("validate")
    with_loader = ValidationMetric(quiet_trainer(), data.val_dataloader(), "val_acc")(module)
    assert with_loader.value == ValidationMetric(quiet_trainer(), data, "val_acc")(module).value


def test_what_is_not_logged_is_named() -> None:
    module, data = fitted()
    with pytest.raises(
        CompressionError, match="`monitor` must be a metric that validation logs.* Nearest: val_acc, val_loss"
    ):
        ValidationMetric(quiet_trainer(), data, "val_ac")(module)
    with pytest.raises(CompressionError, match="`model` must be a LightningModule"):
        ValidationMetric(quiet_trainer(), data, "val_acc")(torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(CompressionError, match="`groups` must be a whole number, at least 1"):
        ValidationMetric(quiet_trainer(), data, "val_acc", groups=0)


def test_batches_go_through_the_steps() -> None:
    module, data = fitted()
    trainer = quiet_trainer()
    trainer.datamodule = data  # type: ignore[attr-defined]
    run, found = step_batches(trainer, module, 3)
    assert len(found) == 3
    assert isinstance(found[0], list)
    run(module, found[0])
    assert not {"log", "log_dict"} & set(vars(module))


def test_what_search_promises_the_callback_gives() -> None:
    module, data = fitted()
    metric = ValidationMetric(quiet_trainer(), data, "val_loss")
    levels = [WeightOnly(8, group_size=4), WeightOnly(3, group_size=4)]
    result = search(module, metric, batches(data), levels=levels, budget=0.6, mode="min")
    said = yaml.safe_load(result.to_yaml())["init_args"]
    schemes = {layer: WeightOnly(**scheme["init_args"]) for layer, scheme in said.get("overrides", {}).items()}
    ptq = PostTrainingQuantization(WeightOnly(**said["scheme"]["init_args"]), overrides=schemes)
    [logged] = quiet_trainer(callbacks=[ptq]).validate(module, data, verbose=False)
    assert logged["val_loss"] == pytest.approx(result.metric + result.chosen.drop, rel=1e-4)


def test_zeros_and_channels_as_they_were_chosen_in_a_fit() -> None:
    module, data = fitted()
    metric = ValidationMetric(quiet_trainer(), data, "val_loss")
    zeros = search(module, metric, batches(data), over="pruning", budget=0.3, mode="min")
    pruning = ScheduledPruning("l1_unstructured", **yaml.safe_load(zeros.to_yaml())["init_args"])
    quiet_trainer(max_epochs=4, callbacks=[pruning]).fit(fitted()[0], data)
    assert sum(int(mask.sum()) for mask in pruning.masks.values()) == zeros.chosen.cost

    channels = search(module, metric, batches(data), over="channels", budget=0.6, mode="min")
    narrow = fitted()[0]
    callback = ChannelPruning(**yaml.safe_load(channels.to_yaml())["init_args"])
    quiet_trainer(max_epochs=4, callbacks=[callback]).fit(narrow, data)
    assert narrow.body.out_features == round(float(channels.chosen.choice["body"]) * module.body.out_features)


def test_an_interrupted_validation_leaves_the_module_as_it_was(tmp_path: Path) -> None:
    module, data = fitted()
    before = {name: value.clone() for name, value in module.state_dict().items()}

    class Stops(ValidationMetric):
        calls = 0

        def __call__(self, module: Any) -> Any:
            Stops.calls += 1
            if Stops.calls == 3:
                raise KeyboardInterrupt
            return super().__call__(module)

    metric = Stops(quiet_trainer(), data, "val_loss")
    with pytest.raises(KeyboardInterrupt):
        sensitivity(module, metric, batches(data), "weights", mode="min", path=tmp_path / "run.jsonl")
    assert_same_state(module.state_dict(), before)
    assert len((tmp_path / "run.jsonl").read_text().splitlines()) == 2


def test_nothing_is_logged_and_no_bar_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module, data = fitted()
    logger = CSVLogger(tmp_path)
    trainer = quiet_trainer(logger=logger, enable_progress_bar=True)
    bars = [callback for callback in trainer.callbacks if isinstance(callback, ProgressBar)]
    capsys.readouterr()
    ValidationMetric(trainer, data, "val_loss")(module)
    assert capsys.readouterr().out == ""
    assert not logger.experiment.metrics
    assert trainer.loggers == [logger]
    assert bars and set(bars) <= set(trainer.callbacks)


def test_projects_that_import_the_older_name() -> None:
    class Module(older.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.body = torch.nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x)

        def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
            self.log("val_loss", torch.nn.functional.cross_entropy(self(batch[0]), batch[1]))

    class Data(older.LightningDataModule):
        def setup(self, stage: str) -> None:
            TinyData.setup(self, stage)  # type: ignore[arg-type]

        samples, batch_size, loader = 50, 8, TinyData.loader

        def val_dataloader(self) -> Any:
            return TinyData.val_dataloader(self)  # type: ignore[arg-type]

    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    data = TinyData()
    data.setup("fit")
    metric: Any = ValidationMetric(older.Trainer(accelerator="cpu", **quiet), Data(), "val_loss")
    table = sensitivity(Module(), metric, batches(data), "weights", mode="min", top=1)
    assert table.rows[0].drop is not None
