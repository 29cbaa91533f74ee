"""A teacher that a module hides in a plain list, so that nothing finds it, counts in no budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress import ChannelPruning, Window
from lightning_compress.channels.planning.plan import RemovalPlan
from tests.support.fits import fit
from tests.support.modules import Classifier


class Taught(Classifier):
    """Compares itself with a teacher in its steps, which stands in a list, a dict, or nowhere."""

    def __init__(self, place: str) -> None:
        super().__init__()
        torch.manual_seed(5)
        teacher = nn.Sequential(nn.Flatten(), nn.Linear(16, 300), nn.ReLU(), nn.Linear(300, 4)).requires_grad_(False)
        self.teachers: Any = {"list": [teacher], "dict": {"large": teacher}, "nowhere": []}[place]

    def away(self, x: Tensor) -> Tensor:
        teachers = [*(self.teachers.values() if isinstance(self.teachers, dict) else self.teachers)]
        return sum((F.mse_loss(self(x), teacher(x)) for teacher in teachers), torch.tensor(0.0))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + 0.0 * self.away(batch[0])

    def evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        super().evaluate(batch, stage)
        self.log(f"{stage}_away", self.away(batch[0]), batch_size=len(batch[0]))


def plan_of(place: str, **options: Any) -> RemovalPlan:
    pruning = ChannelPruning(macs=0.5, round_to=1, window=Window(0.2, 0.5), **options)
    fit(pruning, module=Taught(place), max_epochs=1)
    return pruning.plans[-1]


@pytest.mark.parametrize("place", ["list", "dict"])
def test_a_teacher_that_hides_counts_in_no_budget(place: str) -> None:
    alone, taught = plan_of("nowhere", calibration_batches=0), plan_of(place, calibration_batches=0)
    per_call = 16 * 32 + 32 * 4
    assert alone.before.macs == per_call
    assert taught.before.macs == 2 * per_call  # its steps call the module itself once more
    assert 0.45 < taught.after.macs / taught.before.macs < 0.55
    assert [(row.layers, row.after) for row in taught.rows] == [(row.layers, row.after) for row in alone.rows]
