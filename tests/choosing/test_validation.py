"""A module's own metric, however it is logged, by groups that make up the whole; and no trace of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_compress import CompressionError
from lightning_compress.choosing.validation import Validation, validation_loaders
from tests.choosing.nets import Labelled, Right
from tests.support.modules import quiet_trainer
from tests.support.oracles import assert_same_state, snapshot


class AsMetric(Right):
    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(4, average="micro")

    def evaluate(self, batch: Any, stage: str) -> None:
        self.accuracy(self(batch[0]), batch[1])
        self.log(f"{stage}_acc", self.accuracy)


class AtTheEnd(Right):
    def on_validation_epoch_start(self) -> None:
        self.right: list[torch.Tensor] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.right.append((self(batch[0]).argmax(1) == batch[1]).float())

    def on_validation_epoch_end(self) -> None:
        self.log_dict({"val_acc": torch.cat(self.right).mean()})


class Blurred(Right):
    """Isn't always right."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.roll(1, 1) * 0.5 + x)


def blurred(kind: type[Right]) -> Right:
    return type("Both", (Blurred, kind), {})()


class At(L.Callback):
    """Evaluates when the test starts."""

    def __init__(self, monitor: str = "val_acc") -> None:
        self.monitor = monitor

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        before, state = snapshot(pl_module), torch.get_rng_state()
        metrics = dict(trainer.callback_metrics)
        with torch.inference_mode(False):
            self.validation = Validation(
                trainer, validation_loaders(trainer, pl_module), self.monitor, trainer.datamodule
            )
            self.groups = self.validation(pl_module)
            with torch.random.fork_rng():
                torch.manual_seed(5)
                assert self.validation(pl_module) == self.groups
        assert_same_state(before, snapshot(pl_module))
        assert torch.equal(state, torch.get_rng_state()) and dict(trainer.callback_metrics) == metrics
        assert pl_module.trainer is trainer


def groups_of(module: Any, data: Any, monitor: str = "val_acc", **options: Any) -> Any:
    at = At(monitor)
    quiet_trainer(callbacks=[at], **options).test(module, data, verbose=False)
    assert at.validation.count == 2
    return at.groups


@pytest.mark.parametrize("kind", [Right, AsMetric, AtTheEnd])
@pytest.mark.parametrize("batch_size", [50, 37, 9])
def test_groups_make_up_what_a_validation_logs(kind: type[Right], batch_size: int) -> None:
    module, data = blurred(kind), Labelled(batch_size=batch_size)
    groups = groups_of(module, data)
    assert sum(group.samples for group in groups) == 800 and 2 <= len(groups) <= 32
    [logged] = quiet_trainer().validate(module, data, verbose=False)
    mean = sum(group.samples * group.value for group in groups) / 800
    assert mean == pytest.approx(logged["val_acc"], abs=1e-4) and 0.2 < mean < 0.99


def test_as_many_batches_as_the_trainer_allows() -> None:
    data = Labelled()
    assert sum(group.samples for group in groups_of(Right(), data, limit_val_batches=3)) == 150
    assert sum(group.samples for group in groups_of(Right(), data, limit_val_batches=0.5)) == 400


class Stream(IterableDataset[Any]):
    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


class Streams(Labelled):
    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Stream([self.parts[1][index] for index in range(120)]), batch_size=50)


def test_a_loader_without_length_and_one_that_shuffles() -> None:
    assert [group.samples for group in groups_of(Right(), Streams())] == [50, 50, 20]

    class Shuffles(Labelled):
        def val_dataloader(self) -> DataLoader[Any]:
            return DataLoader(self.parts[1], batch_size=50, shuffle=True)

    groups_of(blurred(Right), Shuffles())  # twice the same groups, and the random state stays


def test_what_setup_builds_is_not_built_again_and_loggers_are_there() -> None:
    class Late(Right):
        def setup(self, stage: str) -> None:
            assert stage == "test"
            self.net = Right(outliers=False).net

        def teardown(self, stage: str) -> None:
            assert stage == "test"

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            self.logger.experiment.add_image("first", batch[0][0])

    assert {group.value for group in groups_of(Late(), Labelled(), logger=CSVLogger("logs"))} == {1.0}
    [logged] = Path("logs").rglob("metrics.csv")
    assert "test_acc" in logged.read_text() and "val_acc" not in logged.read_text()


class Several(Right):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)


class Two(Labelled):
    def val_dataloader(self) -> list[DataLoader[Any]]:  # type: ignore[override]
        wrong = [(x, (y + 1) % 4) for x, y in (self.parts[1][index] for index in range(100))]
        return [super().val_dataloader(), DataLoader(wrong, batch_size=50)]


def test_a_metric_of_one_of_several_loaders() -> None:
    assert {group.value for group in groups_of(Several(), Two(), "val_acc/dataloader_idx_0")} == {1.0}
    assert {group.value for group in groups_of(Several(), Two(), "val_acc/dataloader_idx_1")} == {0.0}


def test_hooks_of_batches_of_the_datamodule_are_called() -> None:
    class Hidden(Labelled):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0], (batch[1] + 1) % 4]

    assert {group.value for group in groups_of(Right(), Hidden())} == {0.0}


def test_bare_loaders_and_the_modules_own() -> None:
    module, data = Right(), Labelled()
    with pytest.raises(CompressionError, match="`val_dataloader` must be there to guard a metric"):
        quiet_trainer(callbacks=[At()]).test(module, data.test_dataloader(), verbose=False)
    module.val_dataloader = data.val_dataloader
    quiet_trainer(callbacks=[At()]).test(module, data.test_dataloader(), verbose=False)


def test_a_metric_that_is_not_there() -> None:
    with pytest.raises(CompressionError, match="`monitor` must be a metric that validation logs.*Nearest: val_acc"):
        groups_of(Right(), Labelled(), "val_ac")
