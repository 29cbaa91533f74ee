"""Criteria in real fits, against loops that anyone can follow; and weights that come back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn

from lightning_compress import CompressionError, Linear, OneShot, ScheduledPruning, Window, prune_
from lightning_compress.pruning.criteria import lamp
from tests.support.data import TinyData
from tests.support.modules import Classifier, ManualClassifier, quiet_trainer
from tests.support.oracles import assert_different_state, assert_same_state, count_zeros, snapshot

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
]

WEIGHTS = ("body.weight", "head.weight")
TOTAL = 16 * 32 + 32 * 4


def naive_lamp(weight: Tensor) -> list[float]:
    """Equation 6, one weight at a time."""
    values = [value * value for value in weight.double().flatten().tolist()]
    scores = []
    for i, square in enumerate(values):
        # Of equal ones those that come later count: in a sorted list they stand after it.
        rest = sum(other for j, other in enumerate(values) if other > square or (other == square and j >= i))
        scores.append(square / rest if rest else 0.0)
    return scores


@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple),
    seed=st.integers(0, 999),
    scale=st.sampled_from([1.0, 1e-6, 1e6]),
)
@settings(max_examples=60)
def test_lamp_is_its_equation(shape: tuple[int, ...], seed: int, scale: float) -> None:
    weight = scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    before = weight.clone()
    scores = lamp(weight)
    assert torch.equal(before, weight) and scores.shape == weight.shape
    expected = torch.tensor(naive_lamp(weight), dtype=torch.float32).view(shape)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-8)
    assert float(scores.max()) == 1.0


def test_lamp_with_zeros_and_ties() -> None:
    assert lamp(torch.zeros(4)).tolist() == [0.0] * 4
    scores = lamp(torch.tensor([2.0, -2.0, 0.0]))
    assert sorted(scores.tolist()) == [0.0, 0.5, 1.0]


def test_lamp_prunes_by_its_scores_over_all_layers() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    with torch.no_grad():
        model[1].weight.mul_(100)
    scores = [naive_lamp(layer.weight.detach()) for layer in model]
    threshold = sorted(scores[0] + scores[1])[48 - 1]
    masks = prune_(model, 0.5, "lamp")
    for mask, own in zip(masks.values(), scores, strict=True):
        assert mask.flatten().tolist() == [score > threshold for score in own]
    # Magnitude would have emptied the first layer before it touched the second.
    assert int((~masks["1.weight"]).sum()) > 0


class Recorder(Callback):
    """Computes both scores by hand from weights and gradients as they are when the optimizer is about to step."""

    def __init__(self, until: int, dtype: torch.dtype = torch.float32) -> None:
        self.until, self.steps = until, 0
        self.taylor: dict[str, list[float]] = {}
        self.movement: dict[str, list[float]] = {}
        self.dtype = dtype

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self.steps += 1
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name in WEIGHTS:
            weight = pl_module.get_parameter(name)
            if id(weight) not in stepped or self.steps > self.until:
                continue
            pairs = list(zip(weight.detach().flatten().tolist(), weight.grad.flatten().tolist(), strict=True))
            taylor = self.taylor.setdefault(name, [0.0] * len(pairs))
            movement = self.movement.setdefault(name, [0.0] * len(pairs))
            for i, (w, g) in enumerate(pairs):
                taylor[i] = 0.9 * taylor[i] + 0.1 * abs(w * g)
                movement[i] = movement[i] - w * g

    def lowest(self, method: str, count: int) -> set[tuple[str, int]]:
        scores: dict[str, list[float]] = getattr(self, method)
        ranked = sorted((score, name, i) for name, own in scores.items() for i, score in enumerate(own))
        # Next to nothing lies between the last that goes and the first that stays.
        assert ranked[count][0] - ranked[count - 1][0] > 1e-9
        return {(name, i) for _, name, i in ranked[:count]}


def pruned(masks: dict[str, Tensor]) -> set[tuple[str, int]]:
    return {(name, i) for name, mask in masks.items() for i, stays in enumerate(mask.flatten().tolist()) if not stays}


FITS: dict[str, tuple[type[Classifier], dict[str, Any]]] = {
    "plain": (Classifier, {}),
    "accumulation": (Classifier, {"accumulate_grad_batches": 2, "max_epochs": 3}),
    "two optimizers": (ManualClassifier, {}),
    "bf16-mixed": (Classifier, {"precision": "bf16-mixed"}),
    "clipping": (Classifier, {"gradient_clip_val": 0.05}),
}


@pytest.mark.parametrize("method", ["taylor", "movement"])
@pytest.mark.parametrize("name", FITS)
def test_scores_of_gradients_are_what_a_loop_gathers(name: str, method: str) -> None:
    build, settings_ = FITS[name]
    # One event at step 7: what is gathered until then decides.
    pruning = ScheduledPruning(method, 0.5, schedule=OneShot(), window=Window(7, 9, unit="step"))
    recorder = Recorder(until=14 if build is ManualClassifier else 7)
    module = build()
    quiet_trainer(**{"max_epochs": 2, **settings_}, limit_val_batches=0, callbacks=[recorder, pruning]).fit(
        module, TinyData()
    )
    assert recorder.steps > 7
    assert pruned(pruning.masks) == recorder.lowest(method, TOTAL // 2)
    magnitudes = {n: module.get_parameter(n).abs() for n in WEIGHTS}
    assert pruned(pruning.masks) != set() and len(magnitudes) == 2


def test_movement_takes_large_weights_that_shrink() -> None:
    # Signed: with magnitudes of the scores the fastest shrinking weights would be the safest.
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[5.0, -5.0, 0.1, 0.1]]))
    model.weight.grad = torch.tensor([[1.0, 0.1, -1.0, -0.1]])
    masks = prune_(nn.Sequential(model), 0.25, "movement")
    assert masks["0.weight"].tolist() == [[False, True, True, True]]


def test_prune_with_taylor_needs_gradients() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    before = snapshot(model)
    for method in ("taylor", "movement"):
        with pytest.raises(CompressionError, match="must have seen gradients.*call backward before prune_"):
            prune_(model, 0.5, method)
    assert_same_state(before, model)
    model(torch.randn(3, 4)).sum().backward()
    products = [(layer.weight * layer.weight.grad).abs().flatten() for layer in model]
    threshold = sorted(torch.cat(products).tolist())[11]
    masks = prune_(model, 0.5, "taylor")
    for mask, product in zip(masks.values(), products, strict=True):
        assert mask.flatten().tolist() == (product > threshold).tolist()


@pytest.mark.parametrize("method", ["taylor", "movement"])
def test_masks_that_would_grow_before_any_gradient_are_a_clear_error(method: str) -> None:
    module = Classifier()
    before = snapshot(module)
    pruning = ScheduledPruning(method, 0.5, schedule=OneShot(), window=Window(0))
    with pytest.raises(CompressionError, match="`method` must have seen gradients.*Start the window later"):
        quiet_trainer(callbacks=[pruning]).fit(module, TinyData())
    assert_same_state(before, module)
    # A schedule that starts at nothing is fine there.
    quiet_trainer(callbacks=[ScheduledPruning(method, 0.5, schedule=Linear(), window=Window(0))]).fit(
        module, TinyData()
    )
    assert count_zeros(module.get_parameter(name) for name in WEIGHTS)[0] == TOTAL // 2


@pytest.mark.parametrize("method", ["taylor", "movement", "magnitude", "lamp"])
@pytest.mark.parametrize("regrow", [False, True])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_count_is_exact(method: str, regrow: bool, scope: Any) -> None:
    module = Classifier()
    pruning = ScheduledPruning(method, 0.77, scope, regrow=regrow, window=Window(0.1, 0.8))
    quiet_trainer(max_epochs=2, limit_val_batches=0, callbacks=[pruning]).fit(module, TinyData())
    zeros = [count_zeros([module.get_parameter(name)])[0] for name in WEIGHTS]
    assert sum(zeros) == round(0.77 * TOTAL)
    if scope == "layer":
        assert zeros == [round(0.77 * 512), round(0.77 * 128)]


@pytest.mark.parametrize("saved", ["in training", "after it"])
@pytest.mark.parametrize(
    ("method", "regrow"), [("taylor", False), ("movement", False), ("magnitude", True), ("taylor", True)]
)
def test_resumed_in_mid_window_equals_uninterrupted(method: str, regrow: bool, saved: str, tmp_path: Path) -> None:
    kwargs: Any = {"limit_train_batches": 1, "limit_val_batches": 0}

    def run(epochs: int, path: Path | None = None, **more: Any) -> tuple[L.Trainer, ScheduledPruning, Classifier]:
        torch.manual_seed(0)
        module = Classifier(lr=0.3)
        pruning = ScheduledPruning(
            method, 0.7, regrow=regrow, schedule=Linear(), window=Window(2, 20, unit="step", every_n_steps=3)
        )
        callbacks = [pruning, *more.pop("callbacks", ())]
        trainer = quiet_trainer(max_epochs=epochs, callbacks=callbacks, **kwargs, **more)
        trainer.fit(module, TinyData(), ckpt_path=path, weights_only=True)
        return trainer, pruning, module

    _, whole, module = run(24)
    for at in (4, 10):
        path = tmp_path / f"{at}.ckpt"
        if saved == "in training":
            save = ModelCheckpoint(tmp_path / f"at {at}", filename="{step}", every_n_train_steps=1, save_top_k=-1)
            run(24, callbacks=[save], enable_checkpointing=True)
            path = tmp_path / f"at {at}" / f"step={at}.ckpt"
        else:
            with pytest.warns(UserWarning, match="before its window's end"):
                trainer, _, _ = run(at)
            trainer.save_checkpoint(path)
        early = torch.load(path, weights_only=True)
        assert_different_state(early["state_dict"], module)
        _, pruning, resumed = run(24, path)
        assert_same_state(module, resumed)
        assert_same_state(whole.masks, pruning.masks)


def test_lamp_of_a_large_layer_is_its_equation_nearly_and_keeps_the_order() -> None:
    weight = torch.randn(300, 100, generator=torch.Generator().manual_seed(0))
    scores, squares = lamp(weight).flatten(), weight.double().square().flatten()
    order = squares.argsort()
    assert torch.equal(scores[order], scores.sort().values)
    expected = squares[order] / squares[order].flip(0).cumsum(0).flip(0)
    # Of the largest few, which no mask reaches, those of one bin share a denominator.
    torch.testing.assert_close(scores[order][:-300].double(), expected[:-300], rtol=0.03, atol=0)
    assert 0.2 < float(scores.max()) <= 1.0
    zeros = weight.where(weight.abs() > 1, 0.0)
    assert torch.equal(lamp(zeros) == 0, zeros == 0)
