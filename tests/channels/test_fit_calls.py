"""Modules as people write them, which a fit calls in ways of their own: they shrink and train."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from torch import Tensor

from lightning_compress import CompressionError, Linear, Window
from tests.channels.test_callback import PER_EPOCH, Drawing, TensorLog, shrink
from tests.support.data import keyword_loader
from tests.support.fits import fit
from tests.support.modules import Classifier, KeywordClassifier, ManualClassifier, quiet_trainer
from tests.support.oracles import hooks


class NoForward(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(self.norm(self.body(batch[0])).relu()), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)


class Emptying(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        y, x = batch.pop(), batch.pop()
        return F.cross_entropy(self(x.mul_(2)), y)


class Skipping(Classifier):
    """Of every two batches one makes no step, among them the one that the removal would be planned on."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) if batch_idx % 2 else None


class Keyword(Classifier):
    """Its batches don't bind to forward, and its step can't be tried."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(x=batch[0]), batch[1]))
        optimizer.step()

    def forward(self, *, x: Tensor) -> Tensor:
        return super().forward(x)

    def evaluate(self, batch: Any, stage: str) -> None:
        self(x=batch[0])


class Example(Keyword):
    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = {"x": torch.zeros(3, 16)}


class Calibrated(Keyword):
    def calibration_step(self, batch: Any) -> Tensor:
        return self(x=batch[0])


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("kind", [NoForward, Emptying, Skipping, Example, Calibrated, ManualClassifier, Drawing])
def test_odd_modules_shrink_and_train(kind: type[Classifier]) -> None:
    log = TensorLog()
    _, module = fit(shrink(importance="taylor", window=Window(4, 6, unit="step")), log, module=kind())
    assert (module.body.out_features, module.head.in_features, module.norm.num_features) == (16, 16, 16)
    assert not torch.equal(log.tensors[-1]["body.weight"], log.tensors[log.widths.index(16)]["body.weight"])


def test_a_module_that_no_batch_runs_is_refused_with_the_remedy() -> None:
    class Blind(Keyword):
        def evaluate(self, batch: Any, stage: str) -> None: ...

    module = Blind()
    with pytest.raises(CompressionError, match="must run one batch.*example_input_array.*calibration_step"):
        fit(shrink(), module=module)
    assert module.body.out_features == 32 and hooks(module) == []


def test_dict_batches_and_keywords() -> None:
    module = KeywordClassifier()
    pruning = shrink(window=Window(2, 4, unit="step"), scope="layer")
    quiet_trainer(max_epochs=3, callbacks=[pruning]).fit(module, keyword_loader(), keyword_loader())
    assert (module.embedding.embedding_dim, module.body.out_features, module.head.in_features) == (8, 16, 16)


class Measured(Classifier):
    """Metrics are children, and note what they have seen."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        self.accuracy.update(logits, batch[1])
        self.log("train_loss", F.cross_entropy(logits, batch[1]), on_epoch=True, on_step=False)
        return F.cross_entropy(logits, batch[1])


@pytest.mark.parametrize("importance", ["l2", "taylor"])
def test_a_trace_of_a_batch_leaves_metrics_and_logs_alone(importance: str) -> None:
    module = Measured()
    trainer, _ = fit(shrink(importance=importance, schedule=Linear()), module=module)
    assert int(module.accuracy.tp.sum() + module.accuracy.fn.sum()) == 2 * 50
    assert module.norm.num_batches_tracked == 2 * PER_EPOCH
    assert trainer.callback_metrics.keys() == {"train_loss", "val_loss", "val_acc", "remaining_channels"}
