"""Whatever quantization runs of a model draws nothing from the global generators of torch, numpy and Python."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from lightning_compress import PostTrainingQuantization, QuantizationAwareTraining, quantize
from lightning_compress.quantization.schemes import SCHEMES
from tests.support.data import TinyData
from tests.support.modules import Classifier, quiet_trainer
from tests.support.oracles import same_random_state


def draw() -> None:
    random.random()
    np.random.rand()
    torch.rand(1)


class Drawing(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        draw()
        return super().forward(x)


class DrawingClassifier(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        draw()
        return super().forward(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        draw()
        return super().training_step(batch, batch_idx)


MODEL = Drawing().eval()


@pytest.mark.parametrize(("scheme", "flow"), [(scheme, "auto") for scheme in SCHEMES])
def test_without_a_trainer(scheme: str, flow: Any) -> None:
    with same_random_state():
        quantize(MODEL, scheme, calibration=[torch.ones(8, 16)] * 2, flow=flow)


class Around(Callback):
    """Two of them, before and after the callback of the test, see the generators as it sees and leaves them."""

    def __init__(self, hook: str) -> None:
        self.states: list[Any] = []
        setattr(self, hook, self.look)

    def look(self, *_: Any, **__: Any) -> None:
        self.states.append((random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()))


@pytest.mark.parametrize(
    ("callback", "hook"),
    [
        (PostTrainingQuantization("int8_static"), "on_test_start"),
        (PostTrainingQuantization("gptq"), "on_test_start"),
        (QuantizationAwareTraining(), "on_train_batch_start"),
        (QuantizationAwareTraining("int4_weight_only"), "on_train_batch_start"),
        (QuantizationAwareTraining(), "on_fit_end"),
    ],
    ids=["ptq", "ptq gptq", "qat", "qat 4 bits", "qat at its end"],
)
def test_in_a_trainer(callback: Any, hook: str) -> None:
    before, after = Around(hook), Around(hook)
    trainer = quiet_trainer(callbacks=[before, callback, after])
    (trainer.test if hook == "on_test_start" else trainer.fit)(DrawingClassifier(), TinyData())
    assert before.states and before.states == after.states
