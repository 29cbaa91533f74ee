"""`regrow=True`: pruned weights come back, with the value that they had, while the window lasts."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.nn.utils.parametrizations import weight_norm

from lightning_compress import CompressionError, Linear, ScheduledPruning, Window
from tests.support.data import TinyData
from tests.support.modules import Classifier, quiet_trainer
from tests.support.oracles import assert_same_state, snapshot

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
]

WEIGHTS = ("body.weight", "head.weight")
TOTAL = 16 * 32 + 32 * 4


def pruned(masks: dict[str, Tensor]) -> set[tuple[str, int]]:
    return {(name, i) for name, mask in masks.items() for i, kept in enumerate(mask.flatten().tolist()) if not kept}


class WatchRegrowth(Callback):
    """Masks at every batch end; what comes back must be, bit for bit, what the last step before it went made of it."""

    def __init__(self, pruning: ScheduledPruning) -> None:
        self.pruning = pruning
        self.masks: list[dict[str, Tensor]] = []
        self.stepped: dict[str, Tensor] = {}
        self.went: dict[str, Tensor] = {}
        self.back = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        def after_step(*_: Any) -> None:
            self.stepped = {name: pl_module.get_parameter(name).detach().clone() for name in WEIGHTS}

        trainer.optimizers[0].register_step_post_hook(after_step)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        masks = {name: mask.clone() for name, mask in self.pruning.masks.items()}
        before = self.masks[-1] if self.masks else {name: torch.ones_like(mask) for name, mask in masks.items()}
        for name, mask in masks.items():
            weight = pl_module.get_parameter(name)
            assert not weight[~mask].any()
            came = mask & ~before[name]
            assert torch.equal(weight[came], self.went.get(name, weight)[came]) and weight[came].all()
            assert torch.equal(weight[mask & before[name]], self.stepped[name][mask & before[name]])
            self.back += int(came.sum())
            goes = before[name] & ~mask
            self.went[name] = torch.where(goes, self.stepped[name], self.went.get(name, self.stepped[name]))
        self.masks.append(masks)


class Restless(Classifier):
    """Weights move far enough for their order to change."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.2)


@pytest.mark.parametrize("method", ["magnitude", "taylor", "movement"])
def test_pruned_weights_come_back_with_the_value_that_they_had(method: str) -> None:
    pruning = ScheduledPruning(method, 0.6, regrow=True, schedule=Linear(), window=Window(0.1, 0.8))
    watch = WatchRegrowth(pruning)
    module = Restless()
    quiet_trainer(max_epochs=5, limit_val_batches=0, callbacks=[pruning, watch]).fit(module, TinyData())
    if method != "magnitude":  # Magnitudes that are kept aside seldom outgrow others so soon.
        assert watch.back > 10
    counts = [len(pruned(masks)) for masks in watch.masks]
    assert counts == sorted(counts) and counts[-1] == round(0.6 * TOTAL)
    # Frozen after the window: 35 steps, of which it ends with the 28th.
    for masks in watch.masks[27:]:
        assert_same_state(watch.masks[-1], masks)
    masks_only_grow = ScheduledPruning(method, 0.6, schedule=Linear(), window=Window(0.1, 0.8))
    never = WatchRegrowth(masks_only_grow)
    quiet_trainer(max_epochs=5, limit_val_batches=0, callbacks=[masks_only_grow, never]).fit(Restless(), TinyData())
    assert never.back == 0


def test_with_magnitude_a_weight_comes_back_once_the_others_have_shrunk() -> None:
    class Shrinks(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return 20 * (self.body.weight[16:] ** 2).sum() + 0 * super().training_step(batch, batch_idx)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    module = Shrinks()
    first = module.body.weight.detach().clone()
    pruning = ScheduledPruning(
        "magnitude", 0.3, "layer", regrow=True, schedule=Linear(), window=Window(1, 10, unit="step")
    )
    watch = WatchRegrowth(pruning)
    quiet_trainer(max_epochs=2, limit_val_batches=0, callbacks=[pruning, watch]).fit(module, TinyData())
    early, late = watch.masks[3]["body.weight"][:16], watch.masks[-1]["body.weight"][:16]
    assert int((late & ~early).sum()) >= 5
    # The upper half is moved by nothing, so these are the values of the start, bit for bit.
    assert torch.equal(module.body.weight[:16][late], first[:16][late])


def test_a_second_fit_never_goes_below_what_was_pruned_before() -> None:
    module, pruning = Restless(), ScheduledPruning("taylor", 0.6, regrow=True, window=Window(0.2, 0.8))
    quiet_trainer(max_epochs=2, limit_val_batches=0, callbacks=[pruning]).fit(module, TinyData())
    before = snapshot(pruning.masks)
    watch = WatchRegrowth(pruning)
    quiet_trainer(max_epochs=2, limit_val_batches=0, callbacks=[pruning, watch]).fit(module, TinyData())
    assert {len(pruned(masks)) for masks in watch.masks} == {round(0.6 * TOTAL)}
    assert_same_state(before, pruning.masks)


def test_regrowing_needs_a_criterion() -> None:
    for method in ("random_unstructured", "ln_structured", "tests.pruning.rules.LargestFirst"):
        with pytest.raises(CompressionError, match="`regrow` must be False with method="):
            ScheduledPruning(method, 0.5, "layer", regrow=True)


def test_scores_and_kept_values_are_dropped_once_the_window_has_ended() -> None:
    class Looks(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            state = pruning.state_dict()
            sizes.append((len(state["scores"]), len(state["aside"])))

    sizes: list[tuple[int, int]] = []
    pruning = ScheduledPruning("taylor", 0.5, regrow=True, window=Window(2, 9, unit="step"))
    quiet_trainer(max_epochs=2, limit_val_batches=0, callbacks=[pruning, Looks()]).fit(Classifier(), TinyData())
    assert sizes[0] == (2, 0) and sizes[7] == (2, 2)
    assert set(sizes[8:]) == {(0, 0)}


def test_a_weight_norm_is_refused() -> None:
    # Of a whole row the magnitude goes to zero, which would have to be kept aside too.
    class Normed(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.body = weight_norm(self.body)

    module = Normed()
    before = snapshot(module)
    with pytest.raises(CompressionError, match="`regrow` must be False where a weight norm is pruned"):
        quiet_trainer(callbacks=[ScheduledPruning(sparsity=0.5, regrow=True)]).fit(module, TinyData())
    assert_same_state(before, module)
