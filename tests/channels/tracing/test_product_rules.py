"""Products with one of several weights, as of experts: the width between them goes, as their kernel takes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import plan_removal
from tests.channels.cuts import inexact
from tests.channels.idioms import Net, conv, linear


class Experts(nn.Module):
    """Each block of four rows has weights of its own."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.gated, self.inner = gated, 64
        self.up = nn.Parameter(torch.randn(3, 128 if gated else 64, 16) / 4)
        self.down = nn.Parameter(torch.randn(3, 16, 64) / 8)
        self.register_buffer("ends", torch.tensor([4, 8, 12], dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        y = torch._grouped_mm(x, self.up.transpose(1, 2), offs=self.ends)
        if self.gated:
            gate, y = y.chunk(2, -1)
            y = gate.sigmoid() * y
        return torch._grouped_mm(y.tanh(), self.down.transpose(1, 2), offs=self.ends)


@pytest.mark.parametrize("gated", [False, True])
def test_experts_lose_the_same_inner_width(gated: bool) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 16), Experts(gated), nn.Linear(16, 5)), torch.randn(12, 16)
    plan = plan_removal(model, x, macs=0.5)
    assert inexact(model, plan, (x,)) < 1e-5
    kept = plan.kept["1.down"][2]
    assert len(kept) % 8 == 0 and 8 <= len(kept) < 64
    rows = torch.cat((kept, kept + 64)) if gated else kept
    assert torch.equal(plan.kept["1.up"][1], rows)
    assert 0 not in plan.kept["1.up"], "their number stays"


def _smoothed(self: Any, x: Tensor) -> Tensor:
    """Attention whose scores a convolution smooths, head by head."""
    batch, count, _ = x.shape
    q, k, v = self.qkv(x).view(batch, count, 3, self.heads, 8).permute(2, 0, 3, 1, 4).unbind(0)
    scores = (0.3 * q @ k.transpose(2, 3)).reshape(batch * self.heads, 1, count, count)
    scores = self.smooth(scores).view(batch, self.heads, count, count).softmax(-1)
    return self.o((scores @ v).transpose(1, 2).reshape(batch, count, -1))


def test_heads_that_lie_in_the_batch_go_through_a_convolution() -> None:
    torch.manual_seed(0)
    model, x = Net(_smoothed, qkv=linear(32, 96), smooth=conv(1, 1), o=linear(32, 5), heads=4), torch.randn(2, 6, 32)
    plan = plan_removal(model, x, macs=0.5)
    assert inexact(model, plan, (x,)) < 1e-5
    assert len(plan.kept["qkv.weight"][0]) == 48, "two heads of four"
