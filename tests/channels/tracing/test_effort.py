"""What planning a deep network costs: as many runs as one of few blocks of the same kind; and that it says so."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress import plan_removal
from lightning_compress.channels.tracing import find_groups
from tests.channels.cuts import inexact


class Counted(nn.Sequential):
    """Counts its runs, those of its copies too."""

    runs = 0

    def forward(self, x: Tensor) -> Tensor:
        Counted.runs += 1
        for layer in self:
            x = layer(x)
        return x


class Pooled(nn.Module):
    """Heads whose dimensions a convolution takes one by one, so that only whole heads can go."""

    def __init__(self) -> None:
        super().__init__()
        self.parts, self.heads = 3, 4
        self.qkv, self.o = nn.Linear(32, 96), nn.Linear(32, 32)
        self.pool = nn.Conv1d(8, 8, 3, padding=1, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        batch, count, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, count, 3, self.heads, 8).permute(2, 0, 3, 4, 1).unbind(0)
        q = self.pool(q.reshape(batch * self.heads, 8, count)).view(batch, self.heads, 8, count)
        y = F.scaled_dot_product_attention(*(part.transpose(2, 3) for part in (q, k, v)), scale=0.3)
        return self.o(y.transpose(1, 2).reshape(batch, count, -1))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(16, 24), nn.LayerNorm(24), nn.Linear(24, 16)
        self.c, self.d = nn.Linear(16, 12), nn.Linear(12, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.b(self.norm(self.a(x)))
        return x + self.d(self.c(x).relu())


class Scaled(nn.Module):
    """A width whose code scales by its length, so that it stays, beside one that can go."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 24), nn.Linear(24, 16)
        self.c, self.d = nn.Linear(16, 12), nn.Linear(12, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        x = x + self.b(F.silu(y) * y.shape[-1] ** -0.5)
        return x + self.d(self.c(x).relu())


def runs(block: Callable[[], nn.Module], depth: int, *shape: int) -> int:
    torch.manual_seed(0)
    model, inputs = Counted(*(block() for _ in range(depth))).eval(), torch.randn(*shape)
    Counted.runs = 0
    plan = plan_removal(model, inputs, macs=0.6)
    found = Counted.runs
    assert inexact(model, plan, (inputs,)) < 1e-5
    return found


def test_what_is_found_of_a_block_holds_for_those_alike() -> None:
    assert runs(Pooled, 6, 2, 10, 32) <= runs(Pooled, 2, 2, 10, 32) + 4  # halving more of them


def test_widths_that_norms_span_are_not_tried_one_by_one() -> None:
    assert runs(Normed, 8, 4, 16) == runs(Normed, 2, 4, 16)


def test_what_fails_in_a_block_is_tried_once_in_those_alike() -> None:
    once = 8  # runs that tell of one cut that it fails, in float64 too
    assert runs(Scaled, 8, 4, 16) <= runs(Scaled, 2, 4, 16) + 6 * once + 4


def test_where_it_takes_long_it_says_that_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(find_groups, "PATIENCE", 600.0)
    runs(Normed, 2, 4, 16)
    assert not caplog.records
    monkeypatch.setattr(find_groups, "PATIENCE", 0.0)
    with caplog.at_level(logging.INFO):
        runs(Normed, 2, 4, 16)
    expected = "Counted: what can go is still being looked for; cuts tried so far: 1"
    assert caplog.records[0].getMessage() == expected
