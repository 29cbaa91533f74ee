from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_compress import ScheduledPruning, Window
from tests.support.data import TinyData
from tests.support.ddp import run_ranks
from tests.support.modules import Classifier, quiet_trainer
from tests.support.oracles import assert_same_state, count_zeros


def prune(method: str) -> dict[str, Any]:
    module = Classifier()
    pruning = ScheduledPruning(method, 0.7, "layer", window=Window(0, 0.8))
    events: list[Any] = []

    class Records(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            events.append({name: mask.clone() for name, mask in pruning.masks.items()})

    trainer = quiet_trainer(devices=2, strategy="ddp", max_epochs=2, callbacks=[pruning, Records()])
    torch.manual_seed(100 + trainer.global_rank)  # ranks that draw differently must still prune the same
    trainer.fit(module, TinyData(samples=48))
    return {"events": events, "weights": module.state_dict(), "drawn": torch.rand(3)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["random_unstructured", "tests.pruning.rules.Noisy", "taylor", "ln_structured", "least_squares"]
)
def test_t11_masks_are_equal_on_ranks_with_different_seeds(method: str) -> None:
    # T11, W8, sparseml#429; Noisy draws from whatever generator there is. T12: gradients are the mean over ranks.
    first, second = run_ranks(prune, method)
    assert len(first["events"]) == 6
    assert_same_state(first["events"], second["events"])
    parameters = [name for name in first["weights"] if "running" not in name]
    for name in parameters:
        assert torch.equal(first["weights"][name], second["weights"][name]), name
    assert count_zeros([first["weights"]["body.weight"]])[0] == (
        16 * round(0.7 * 32) if method == "ln_structured" else round(0.7 * 512)
    )
    assert not torch.equal(first["drawn"], second["drawn"])
