from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_compress import PostTrainingQuantization, QuantizationAwareTraining, ScheduledPruning, Window
from tests.quantization.prepared import At
from tests.quantization.test_qat import observers
from tests.quantization.test_qat_fits import int8_weights
from tests.support.data import TinyData
from tests.support.ddp import run_ranks
from tests.support.modules import Classifier, quiet_trainer
from tests.support.oracles import assert_same_state


class Shuffled(TinyData):
    """Its calibration data come in another order on each rank, if the ranks' random states say so."""

    def calibration_dataloader(self) -> Any:
        return DataLoader(self.train_dataloader().dataset, batch_size=8, shuffle=True)


def train_for_int8(start: float) -> dict[str, Any]:
    module = Classifier()
    seen: dict[str, Any] = {}
    qat = QuantizationAwareTraining(window=Window(start))
    callbacks = [ScheduledPruning(sparsity=0.5), qat, At(on_train_end=lambda t, m: seen.update(observers(m)))]
    trainer = quiet_trainer(devices=2, strategy="ddp", max_epochs=2, callbacks=callbacks)
    torch.manual_seed(100 + trainer.global_rank)
    trainer.fit(module, TinyData(samples=48))
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    ptq = PostTrainingQuantization("int8_static", calibration_batches=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        other = Classifier()
    quiet_trainer(devices=2, strategy="ddp", callbacks=[ptq]).test(other, Shuffled(samples=48), verbose=False)
    return {
        "observers": seen,
        "calibrated": ptq.quantized_model.eval()(x),
        "int8": {str(shape): weight for shape, weight in int8_weights(module).items()},
        "outputs": module.eval()(x),
    }


@pytest.mark.slow
@pytest.mark.parametrize("start", [0.0, 0.5])
def test_q21_observers_and_the_int8_model_are_equal_on_both_ranks(start: float) -> None:
    # Q21, PT#33648: each rank sees other data.
    first, second = run_ranks(train_for_int8, start)
    assert len(first["int8"]) == 2 and first["observers"]
    assert_same_state(first["observers"], second["observers"])
    assert_same_state(first["int8"], second["int8"])
    assert_same_state(first["outputs"], second["outputs"])
    assert_same_state(first["calibrated"], second["calibrated"])
