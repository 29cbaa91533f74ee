"""Modules that log in every way."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Accuracy, MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassPrecision, MulticlassRecall

from lightning_compress import PostTrainingQuantization
from tests.support.data import TinyData
from tests.support.modules import Classifier, quiet_trainer

SCHEMES = ["int8_static", "int8_dynamic", "int8_weight_only"]


class Blank(Classifier):
    """A classifier without steps that log, for the tests to add them."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        raise NotImplementedError

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


class Plain(Blank):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", self.loss(batch))  # the batch size is found out
        self.log("largest", self(batch[0]).amax(), reduce_fx="max", batch_size=len(batch[0]))


class Metrics(Blank):
    """Metric objects: by themselves, in a collection, computed by hand, and not even registered."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = Accuracy("multiclass", num_classes=4)
        self.several = MetricCollection([MulticlassPrecision(4), MulticlassRecall(4)], prefix="of/")
        self.by_hand = MeanMetric()
        self.aside = [MeanMetric()]

    def test_step(self, batch: Any, batch_idx: int) -> None:
        logits = self(batch[0])
        self.accuracy(logits, batch[1])
        self.several(logits, batch[1])
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        self.log_dict(self.several, on_step=False, on_epoch=True)
        self.by_hand.update(self.loss(batch))
        self.aside[0].update(logits.amax(1).mean())

    def on_test_epoch_end(self) -> None:
        for name, metric in (("by hand", self.by_hand), ("aside", self.aside[0])):
            self.log(name, metric.compute())
            metric.reset()


class Draws(Blank):
    """Noise in the test step, as in diffusion."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        x = batch[0] + torch.randn_like(batch[0])
        self.log("loss", self.loss((x, batch[1])))


def fitted(kind: type[L.LightningModule]) -> Any:
    torch.manual_seed(0)
    module = kind()
    quiet_trainer(max_epochs=2).fit(module, TinyData())
    return module


def metrics_of(module: Any, data: Any = None, trainer: Any = None, **options: Any) -> dict[str, float]:
    """The metrics of one test, of all loaders together."""
    trainer = trainer or quiet_trainer(callbacks=[PostTrainingQuantization(**options)] if options else [])
    torch.manual_seed(1)
    metrics = trainer.test(module, data or TinyData(), verbose=False)
    return {name: value for one in metrics for name, value in one.items()}
