"""Silent copies of a module, on which its steps are tried."""

from __future__ import annotations

from typing import Any

import lightning as L

from lightning_compress.silent_copy import make_probe
from tests.support.data import TinyData
from tests.support.modules import Classifier, quiet_trainer


def test_a_silent_copy_can_be_copied_while_the_trainer_can_not() -> None:
    class Copies(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            trainer.loading = (batch for batch in ())  # type: ignore[attr-defined]  # as a loader with workers has it
            again: Any = make_probe(trainer, make_probe(trainer, pl_module))
            rates.append(again.optimizers().param_groups[0]["lr"])

    rates: list[float] = []
    quiet_trainer(max_steps=1, callbacks=[Copies()]).fit(Classifier(lr=0.25), TinyData())
    assert rates == [0.25]
