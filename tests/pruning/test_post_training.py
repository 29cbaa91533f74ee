"""`PostTrainingPruning`: the test's metrics are those of the pruned model, and the dense one comes back."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from lightning_compress import (
    CompressionError,
    PostTrainingPruning,
    PostTrainingQuantization,
    ScheduledPruning,
    Window,
    prune_,
    sparsity,
)
from tests.support.data import TinyData
from tests.support.fits import fit
from tests.support.modules import Classifier, quiet_trainer
from tests.support.oracles import assert_same_state, hooks, snapshot


def trained() -> Classifier:
    return fit()[1]  # type: ignore[no-any-return]


@pytest.mark.parametrize("inference_mode", [True, False])
def test_metrics_are_those_of_prune_and_the_dense_model_comes_back(inference_mode: bool) -> None:
    module, data = trained(), TinyData()
    before = snapshot(module)
    data.setup("fit")
    by_hand = copy.deepcopy(module)
    masks = prune_(by_hand, 0.5, "wanda", calibration=data.train_dataloader())
    expected = quiet_trainer().test(by_hand, data, verbose=False)
    pruning = PostTrainingPruning("wanda", sparsity=0.5)
    trainer = quiet_trainer(inference_mode=inference_mode, callbacks=[pruning])
    for _ in range(2):
        assert trainer.test(module, data, verbose=False) == expected
        assert_same_state(pruning.masks, masks)
        trainer.predict(module, data)
        assert_same_state(before, module)
        assert hooks(module) == []
    assert "calibrated on 40 samples" in pruning.report_notes()[0]
    trainer.fit(module, data)
    assert not torch.equal(before["body.weight"], module.body.weight)


def test_keep_leaves_it_pruned() -> None:
    module = trained()
    quiet_trainer(callbacks=[PostTrainingPruning(sparsity=0.5, keep=True)]).test(module, TinyData(), verbose=False)
    assert sparsity(module) == 0.5


def test_what_is_pruned_is_quantized_then() -> None:
    module, data = trained(), TinyData()
    before, by_hand = snapshot(module), copy.deepcopy(module)
    data.setup("fit")
    prune_(by_hand, 0.5, "least_squares", calibration=data.train_dataloader())
    quantized = PostTrainingQuantization("int8_weight_only")
    expected = quiet_trainer(callbacks=[quantized]).test(by_hand, data, verbose=False)
    both = [PostTrainingPruning(sparsity=0.5), PostTrainingQuantization("int8_weight_only")]
    assert quiet_trainer(callbacks=both).test(module, data, verbose=False) == expected
    assert_same_state(before, module)


class Interrupts(Callback):
    def on_test_batch_start(self, *_: Any) -> None:
        raise KeyboardInterrupt


def test_an_error_and_an_exception_leave_the_model_as_it_was() -> None:
    module, data = trained(), TinyData()
    before, pruning = snapshot(module), PostTrainingPruning(sparsity=0.5)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        quiet_trainer(callbacks=[pruning, Interrupts()]).test(module, data, verbose=False)
    assert pruning.masks
    assert_same_state(before, module)
    with pytest.raises(CompressionError, match="`calibration_dataloader` must be there to calibrate on"):
        quiet_trainer(callbacks=[pruning]).test(module, data.test_dataloader(), verbose=False)
    assert_same_state(before, module)


class Counts(TinyData):
    """Counts how often each loader is made."""

    def __init__(self) -> None:
        super().__init__()
        self.made = 0

    def calibration_dataloader(self) -> Any:
        self.made += 1
        return self.loader(self.val)


def test_a_fit_calibrates_when_a_tenth_of_the_way_is_gone() -> None:
    data, pruning = Counts(), ScheduledPruning("wanda", 0.8, window=Window(0.0, 1.0))
    _, module = fit(pruning, data=data)
    assert sparsity(module) == 0.8
    steps = [point.sparsity for point in pruning.sparsity_history]
    assert data.made == len(set(steps) - {0.0}) < 14 - 2  # of as many optimizer steps
    assert all(later - earlier >= 0.08 for earlier, later in pairwise(steps[:-1]) if later != earlier)
    assert "calibrated on" in "".join(pruning.report_notes())


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_bare_loaders_of_a_fit_serve_and_go_on_undisturbed() -> None:
    data = TinyData()
    data.setup("fit")
    seen: list[list[torch.Tensor]] = []
    for callbacks in ([], [ScheduledPruning("least_squares", 0.5)]):
        loader = DataLoader(data.train, 8, shuffle=True, generator=torch.Generator().manual_seed(3))

        class Sees(Classifier):
            def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
                seen[-1].append(batch[0])
                return super().training_step(batch, batch_idx)

        seen.append([])
        fit(*callbacks, module=Sees(), data=loader)
    assert_same_state(seen[0], seen[1])
