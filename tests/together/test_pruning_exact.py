"""Promise 2 as a law: whatever the fit looks like, the final sparsity is exact to one weight."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_compress import Cosine, Exponential, Linear, OneShot, Polynomial, ScheduledPruning, Steps, Window
from tests.support.data import TinyData
from tests.support.modules import Classifier, quiet_trainer
from tests.support.oracles import count_zeros

SCHEDULES = (OneShot(), Linear(), Cosine(), Exponential(), Polynomial(), Steps([0.3, 0.7], [0.4, 1.0]))


@st.composite
def windows(draw: st.DrawFn) -> Window:
    start, end = sorted(draw(st.lists(st.integers(0, 10), min_size=2, max_size=2, unique=True)))
    return Window(start / 10, end / 10, every_n_steps=draw(st.integers(1, 4)))


@pytest.mark.filterwarnings("ignore:ScheduledPruning")
@given(
    hidden=st.integers(1, 20),
    layers=st.lists(st.integers(1, 9), max_size=3),
    sparsity=st.floats(0, 1, exclude_max=True),
    scope=st.sampled_from(["global", "layer"]),
    method=st.sampled_from(["l1_unstructured", "lamp", "taylor", "movement", "random_unstructured"]),
    regrow=st.booleans(),
    schedule=st.sampled_from(SCHEDULES),
    window=windows(),
    samples=st.integers(3, 40),
    batch_size=st.integers(1, 9),
    accumulate=st.integers(1, 5),
    epochs=st.integers(1, 3),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_final_sparsity_is_exact(
    hidden: int,
    layers: list[int],
    sparsity: float,
    scope: Any,
    method: str,
    regrow: bool,
    schedule: Any,
    window: Window,
    samples: int,
    batch_size: int,
    accumulate: int,
    epochs: int,
) -> None:
    if method in ("taylor", "movement") and window.start == 0:
        window = Window(0.1, 1.0) if window.end == 0.1 else Window(0.1, window.end, every_n_steps=window.every_n_steps)
    module = Classifier(hidden=hidden)
    module.norm = nn.Identity()  # BatchNorm refuses a batch of one
    # Layers that no forward calls, so they get no gradient; they count all the same.
    module.more = nn.ModuleList(nn.Linear(size, 2 * size) for size in layers)
    pruning = ScheduledPruning(
        method, sparsity, scope, schedule, window, regrow=regrow and method != "random_unstructured"
    )
    batches = math.ceil(samples / batch_size)
    steps = epochs * math.ceil(batches / accumulate)
    if method in ("taylor", "movement") and steps * window.start < 1:
        return  # masks would have to grow before a gradient was seen, which is refused
    trainer = quiet_trainer(
        max_epochs=epochs, accumulate_grad_batches=accumulate, limit_val_batches=0, callbacks=[pruning]
    )
    trainer.fit(module, TinyData(samples, batch_size))
    sizes = [mask.numel() for mask in pruning.masks.values()]
    gone = [int((~mask).sum()) for mask in pruning.masks.values()]
    assert len(sizes) == 2 + len(layers)
    if scope == "layer":
        assert gone == [round(sparsity * size) for size in sizes]
    else:
        assert sum(gone) == round(sparsity * sum(sizes))
    weights = [module.get_parameter(name) for name in pruning.masks]
    assert all(not weight[~mask].any() for weight, mask in zip(weights, pruning.masks.values(), strict=True))
    assert count_zeros(weights)[0] >= sum(gone)
    assert torch.isfinite(torch.cat([weight.flatten() for weight in weights])).all()
