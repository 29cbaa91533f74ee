"""What calibration sees: batches as the module's own evaluation feeds them, whatever its steps do with them."""

from __future__ import annotations

import copy
import logging
import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from lightning_compress import CompressionError, PostTrainingQuantization, quantize
from tests.support.modules import quiet_trainer
from tests.support.oracles import assert_same_state

X = torch.randn(32, 12, generator=torch.Generator().manual_seed(0))
Y = torch.arange(32) % 5
BATCHES = list(zip(X.split(8), Y.split(8), strict=True))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 5))


class Plain(pl.LightningModule):
    """Its steps feed the batch as it is; variants say what reaches the network in `fed`."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", F.cross_entropy(self(self.fed(batch)), batch[1]))

    @staticmethod
    def fed(batch: Any) -> Tensor:
        return batch[0]


class Data(pl.LightningDataModule):
    def __init__(self, batches: Any = BATCHES) -> None:
        super().__init__()
        self.batches = batches

    def train_dataloader(self) -> Any:
        return DataLoader(self.batches, batch_size=None)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def expected(inputs: list[Tensor]) -> Tensor:
    """What the network puts out for `X` if just these inputs calibrate it."""
    return quantize(net().eval(), "int8_static", calibration=inputs)(X)


def calibrated(module: Any, data: Any = None, fn: str = "test", **trainer: Any) -> Any:
    """The module in int8, as it is evaluated."""
    ptq = PostTrainingQuantization("int8_static", keep=True)
    options = {} if fn == "predict" else {"verbose": False}
    getattr(quiet_trainer(callbacks=[ptq], **trainer), fn)(module, data or Data(), **options)
    return module.eval()


class Normalises(Plain):
    @staticmethod
    def fed(batch: Any) -> Tensor:
        return (batch[0] - 3) * 10


class CallsTheChild(Normalises):
    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("no step calls it")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", F.cross_entropy(self.net(self.fed(batch)), batch[1]))


class Tokenizes(Plain):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        words = [" ".join(f"{value:.3f}" for value in row) for row in batch[0].tolist()]
        self(torch.tensor([[float(word) for word in line.split()] for line in words]))

    @staticmethod
    def fed(batch: Any) -> Tensor:
        return batch[0].mul(1000).round().div(1000)


class CallsTwice(Plain):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch[0])
        self.net(-5 * batch[0])


class UsesTheTrainer(Normalises):
    """All that a step may reach for, and that isn't to be touched."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(5)
        self.outputs: list[Tensor] = []
        self.counts = {"steps": 0}
        self.register_buffer("seen", torch.zeros(()))

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        assert self.trainer.datamodule is not None and self.current_epoch == 0 and self.trainer.lightning_module is self
        assert isinstance(self.trainer, pl.Trainer) and batch_idx >= 0
        logits = self(self.fed(batch))
        self.accuracy(logits, batch[1])
        self.log("accuracy", self.accuracy)
        self.log_dict({"mean": logits.mean()}, batch_size=len(logits))
        self.print("a line")
        self.logger.experiment.log_metrics({"own": 1.0})
        self.trainer.callback_metrics["own"] = torch.ones(())
        self.trainer.should_stop = True
        self.outputs.append(logits)
        self.counts["steps"] += 1
        self.seen += 1
        torch.rand(()), random.random(), np.random.rand()


class NeedsItsHooks(Normalises):
    def on_test_start(self) -> None:
        self.scale = 10

    def on_test_epoch_start(self) -> None:
        self.outputs: list[Tensor] = []

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.shift = 3

    def test_step(self, batch: Any) -> None:
        self.outputs.append(self((batch[0] - self.shift) * self.scale))


class SeveralLoaders(Normalises):
    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        self(self.fed(batch))


class OtherArguments(Normalises):
    def test_step(self, batch: Any, batch_idx: int, prefix: str = "test") -> None:
        self.log(prefix + "_loss", self(self.fed(batch)).mean())


class Waits(Normalises):
    """The first batch brings nothing to the network."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        if len(batch[0]):
            self(self.fed(batch))


class ChangesTheBatch(Normalises):
    """In place, as some steps do."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        batch[0].sub_(3).mul_(10)
        self(batch[0])


KINDS = [Plain, Normalises, CallsTheChild, Tokenizes, NeedsItsHooks, OtherArguments, Waits, ChangesTheBatch]


@pytest.mark.parametrize("example", [None, torch.zeros(1, 12), 1e3 * torch.ones(1, 12)], ids=["none", "zeros", "large"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_what_the_step_feeds_calibrates(kind: type[Plain], example: Any) -> None:
    module = kind()
    module.example_input_array = example
    batches = [[x.clone(), y] for x, y in BATCHES]
    data = Data([[X[:0], Y[:0]], *batches] if kind is Waits else batches)
    assert torch.equal(calibrated(module, data).net(X), expected([kind.fed(batch) for batch in BATCHES]))


def test_each_call_of_a_step_counts() -> None:
    inputs = [sign * x for x, _ in BATCHES for sign in (1, -5)]
    assert torch.equal(calibrated(CallsTwice()).net(X), expected(inputs))


def test_a_step_that_asks_for_a_loader_gets_the_first() -> None:
    class Two(Data):
        def test_dataloader(self) -> Any:
            return [self.train_dataloader(), self.train_dataloader()]

    assert torch.equal(calibrated(SeveralLoaders(), Two()).net(X), expected([Normalises.fed(b) for b in BATCHES]))


def drawn() -> tuple[str, str, str]:
    """The global random states."""
    return str(torch.get_rng_state().tolist()), str(random.getstate()), str(np.random.get_state())


def test_a_step_is_run_without_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Looks(PostTrainingQuantization):
        def on_test_start(self, trainer: Any, pl_module: Any) -> None:
            before, draws = copy.deepcopy(pl_module), drawn()
            hooks = [len(module._forward_pre_hooks) for module in pl_module.modules()]
            super().on_test_start(trainer, pl_module)
            assert drawn() == draws
            for module in (pl_module, self.quantized_model):
                assert (module.outputs, module.counts, module.seen.item()) == ([], {"steps": 0}, 0.0)
                assert torch.equal(module.accuracy.tp, before.accuracy.tp) and not module.accuracy.update_called
                assert set(vars(module)) - set(vars(before)) == {"_quantization"}
            assert [len(module._forward_pre_hooks) for module in before.modules()] == hooks
            assert trainer.callback_metrics == {} and not trainer.should_stop
            assert "a line" not in capsys.readouterr().out and not logger.experiment.metrics

    module, logger = UsesTheTrainer(), CSVLogger(tmp_path)
    trainer = quiet_trainer(callbacks=[Looks("int8_static", keep=True)], logger=logger)
    trainer.test(module, Data(), verbose=False)
    assert module.counts == {"steps": 4} == {"steps": len(module.outputs)} and module.seen == 4
    assert "accuracy" in trainer.callback_metrics
    assert torch.equal(module.eval().net(X), expected([Normalises.fed(batch) for batch in BATCHES]))


def test_the_float_model_comes_back_bit_identical() -> None:
    module = NeedsItsHooks()
    state, names = copy.deepcopy(module.state_dict()), set(vars(module))
    quiet_trainer(callbacks=[PostTrainingQuantization("int8_static")]).test(module, Data(), verbose=False)
    assert_same_state(state, module)
    assert set(vars(module)) - names <= {"scale", "shift", "outputs", "_hparams"} and len(module.outputs) == 4


class Unlabelled(Plain):
    """Its test step fails on the copy alone: as if calibration batches had no labels."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        if "_fed" in vars(self):
            raise ValueError("no labels\nat all")

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...


def test_the_log_says_which_way_was_taken_and_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        module = calibrated(Unlabelled())
    said = [record.message for record in caplog.records if "batches go through" in record.message]
    assert len(said) == 1
    assert "go through `forward`; not by `test_step` (ValueError: no labels); not by `validation_step` (it" in said[0]
    assert torch.equal(module.net(X), expected([x for x, _ in BATCHES]))


def test_where_no_way_works_each_is_named_and_nothing_changes() -> None:
    class NoWay(Unlabelled):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.net(x)

    module = NoWay()
    state, names = copy.deepcopy(module.state_dict()), set(vars(module))
    with pytest.raises(
        CompressionError,
        match=r"one batch. Received: `test_step`: ValueError: no labels; `validation_step`: it calls no layer; "
        r"`forward`: The batch must bind to NoWay.forward.*Define `calibration_step\(batch\)`",
    ):
        calibrated(module)
    assert_same_state(state, module)
    assert set(vars(module)) - {"_hparams"} == names  # which Lightning sets


def test_a_step_that_cannot_run_in_int8_is_refused_before_the_test_and_not_passed_over() -> None:
    class WritesAWeight(Plain):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.net[2].weight.data.clamp_(-1.0, 1.0)
            self.log("loss", self(batch[0]).mean())

    module = WritesAWeight()
    state = copy.deepcopy(module.state_dict())
    with pytest.raises(CompressionError, match="The quantized model must run on a calibration batch"):
        calibrated(module)
    assert_same_state(state, module)


def test_a_batch_that_the_step_fails_on_takes_the_next_way() -> None:
    class FailsOnce(Normalises):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            assert batch[0][0, 0] != X[8, 0] or "_fed" not in vars(self), "the second batch"
            super().test_step(batch, batch_idx)

    inputs = [x if number == 1 else Normalises.fed((x,)) for number, (x, _) in enumerate(BATCHES)]
    assert torch.equal(calibrated(FailsOnce()).net(X), expected(inputs))
