"""Timing in turns, with a clock that only the runs move."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_compress.modules import latency
from tests.support.oracles import assert_same_state


class Clock:
    """Time that passes in the runs alone."""

    def __init__(self) -> None:
        self.now = 0.0

    def takes(self, seconds: Iterator[float], log: list[str], name: str) -> Callable[[], None]:
        def run() -> None:
            log.append(name)
            self.now += next(seconds)

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock.now)
    return clock


def test_takes_turns_and_drops_the_warm_up(clock: Clock) -> None:
    order: list[str] = []
    first = clock.takes(iter([9.0, 1.0, 2.0, 3.0]), order, "first")
    second = clock.takes(iter([9.0, 4.0, 5.0, 6.0]), order, "second")
    rounds = latency.time_in_turns([first, second], max_seconds=1e9, min_rounds=1, max_rounds=3, warm_up=1)
    assert order == ["first", "second"] * 4
    assert rounds == [(1.0, 4.0), (2.0, 5.0), (3.0, 6.0)]


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(10.0, 3), (0.5, 4), (0.01, 8)],
    ids=["a slow run ends after the least number of rounds", "at the budget", "a fast one after the most"],
)
def test_the_number_of_rounds_is_bounded(clock: Clock, seconds: float, expected: int) -> None:
    def run() -> None:
        clock.now += seconds

    rounds = latency.time_in_turns([run, run], max_seconds=4.5, min_rounds=3, max_rounds=8, warm_up=1)
    assert len(rounds) == expected


class Restless(nn.Module):
    """Takes some time of a clock, counts, and draws from all generators."""

    calls: Tensor

    def __init__(self, clock: Clock, seconds: float) -> None:
        super().__init__()
        self.clock, self.seconds = clock, seconds
        self.dropout = nn.Dropout()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self) -> None:
        assert not self.training
        self.calls += 1
        self.cache = torch.rand(1), np.random.rand(), random.random()
        self.clock.now += self.seconds


def test_the_ratio_is_taken_within_rounds_and_leaves_no_trace(clock: Clock) -> None:
    before, after = Restless(clock, 2.0).train(), Restless(clock, 3.0).train()
    before.dropout.eval()
    draws = []
    for measured in (False, True):
        torch.manual_seed(0), np.random.seed(0), random.seed(0)
        if measured:
            assert latency.round_ratios(before, after, lambda model: model(), max_seconds=0.0) == (1.5,) * 5
            assert latency.latency_ratio(before, after, lambda model: model()) == 1.5
        draws.append((torch.rand(1).item(), np.random.rand(), random.random()))
    assert draws[0] == draws[1]
    assert_same_state(before.state_dict(), {"calls": torch.zeros(())})
    assert_same_state(after.state_dict(), {"calls": torch.zeros(())})
    assert not hasattr(before, "cache")
    assert before.training and not before.dropout.training and after.dropout.training
