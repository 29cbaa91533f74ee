"""A Trainer's own validation decides, and batches go through the module's own steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
from lightning_compress.choosing.validation_metric import step_batches
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
    assert ValidationMetric(trainer, data, "val_loss")(module) == pytest.approx(expected)
    assert trainer.callbacks == own


def test_loaders_in_place_of_a_datamodule() -> None:
    module, data = fitted()
    data.setup("validate")
    with_loader = ValidationMetric(quiet_trainer(), data.val_dataloader(), "val_acc")(module)
    assert with_loader == ValidationMetric(quiet_trainer(), data, "val_acc")(module)


def test_what_is_not_logged_is_named() -> None:
    module, data = fitted()
    with pytest.raises(CompressionError, match="`monitor` must be logged .* Nearest: val_acc, val_loss"):
        ValidationMetric(quiet_trainer(), data, "val_ac")(module)
    with pytest.raises(CompressionError, match="`model` must be a LightningModule"):
        ValidationMetric(quiet_trainer(), data, "val_acc")(torch.nn.Linear(1, 1))  # type: ignore[arg-type]


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

        def __call__(self, module: Any) -> float:
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
