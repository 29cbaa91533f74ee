"""How few layers go back, with how few trials; and what is said where that isn't enough."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_compress import CompressionError
from lightning_compress.callback import Candidate
from lightning_compress.choosing.paired import Group
from lightning_compress.choosing.stepping_back import SteppingBack, fewest


@given(most=st.integers(1, 300), least=st.integers(1, 400))
def test_finds_the_fewest_with_few_trials(most: int, least: int) -> None:
    trials: list[int] = []
    found = fewest(most, lambda count: trials.append(count) or count >= least)
    assert found == (least if least <= most else None)
    assert len(set(trials)) == len(trials) <= 2 * math.log2(most) + 2
    assert all(1 <= count <= most for count in trials)


def test_nothing_to_put_back_is_no_trial() -> None:
    assert fewest(0, lambda count: 1 / 0) is None


class Model(nn.Module):
    """Falls by what each layer that it still has in few bits costs."""

    def __init__(self, costs: dict[str, float], back: Sequence[str]) -> None:
        super().__init__()
        self.fall = sum(cost for layer, cost in costs.items() if layer not in back)
        self.size = nn.Parameter(torch.zeros(10 + 5 * len(back)))


def candidate(costs: dict[str, float], back: Sequence[str] = ()) -> Any:
    return Candidate(
        Model(costs, back),
        Model(costs, list(costs)),
        "int8",
        lambda: {layer: cost**2 for layer, cost in costs.items()},
        lambda layers, scheme: candidate(costs, layers),
        lambda other: 1.25,
    )


class Evaluate:
    def __init__(self, samples: int = 100, groups: int = 10) -> None:
        self.count, self.samples, self.groups = 0, samples, groups

    def __call__(self, model: Any) -> list[Group]:
        self.count += 1
        return [Group(self.samples, 1.0 - model.fall) for _ in range(self.groups)]


def back(max_drop: float = 0.05, **kwargs: Any) -> SteppingBack:
    settings = {"monitor": "acc", "mode": "max", "min_samples": None, "fallback": "float", **kwargs}
    return SteppingBack(max_drop=max_drop, **settings)


COSTS = {"a": 0.001, "b": 0.2, "c": 0.01, "d": 0.03, "e": 0.002}


@pytest.mark.parametrize(
    ("max_drop", "left", "evaluations"), [(0.3, 5, 2), (0.05, 4, 3), (0.02, 3, 4), (0.01, 2, 6), (0.005, 1, 6)]
)
def test_the_worst_go_back_and_no_more_of_them(max_drop: float, left: int, evaluations: int) -> None:
    evaluate, stepping = Evaluate(), back(max_drop)
    chosen: Any = stepping.choose(candidate(COSTS), evaluate)
    worst = sorted(COSTS, key=lambda layer: -COSTS[layer])
    assert chosen.model.fall == pytest.approx(sum(COSTS[layer] for layer in worst[5 - left :]))
    assert evaluate.count == evaluations


def test_a_fall_within_its_noise_is_not_within_max_drop() -> None:
    stepping = back(0.012)
    chosen: Any = stepping.choose(candidate({"a": 0.01, "b": 0.001}), Evaluate())
    assert "a fall of 0.0110, at most 0.0144" in stepping.lines[0]
    assert chosen.model.fall == pytest.approx(0.001)


def test_says_what_each_trial_cost() -> None:
    stepping = back()
    stepping.choose(candidate(COSTS), Evaluate())
    assert stepping.lines[0] == (
        "acc is 1 in float, 0.757 in int8: a fall of 0.2430, at most 0.2464 with 95 % confidence (1,000 samples)"
    )
    assert stepping.lines[1].startswith("`b` in float (+") and "1.25 times as long" in stepping.lines[1]


def test_nothing_suffices() -> None:
    with pytest.raises(CompressionError) as raised:
        back(0.01).choose(candidate({"a": 0.5, "b": 0.6, "c": 0.55}), Evaluate())
    text = str(raised.value)
    assert text.startswith(
        "`max_drop` must be one that int8 can keep. Received: max_drop=0.01. With all but `a` in float"
    )
    assert "change the outputs most are `b`, `c`, `a`" in text and text.endswith("or allow more.")
    stubborn = dataclasses.replace(candidate(COSTS), without=lambda layers, scheme: candidate({"a": math.nan}))
    with pytest.raises(CompressionError, match="acc has a fall of nan"):
        back(0.01).choose(stubborn, Evaluate())


def test_what_another_scheme_keeps_does_not_get_float() -> None:
    asked: list[tuple[int, str]] = []

    def without(enough: str) -> Any:
        def make(layers: Sequence[str], scheme: str) -> Any:
            asked.append((len(layers), scheme))
            return candidate(COSTS, layers if scheme == enough else ())

        return dataclasses.replace(candidate(COSTS), without=make)

    chosen: Any = back(fallback="int8_weight_only").choose(without("int8_weight_only"), Evaluate())
    assert asked == [(1, "int8_weight_only")] and chosen.model.fall < 0.05
    asked.clear()
    back(fallback="int8_weight_only").choose(without("float"), Evaluate())
    assert asked == [*((count, "int8_weight_only") for count in (1, 2, 4, 5)), (1, "float")]


def test_so_small_a_fall_needs_more_samples() -> None:
    with pytest.raises(CompressionError, match=r"For so small a fall some [\d,]+ samples would do"):
        back(0.0101).choose(candidate({"a": 0.01, "b": 0.6}), Evaluate(100))


def test_forty_images_prove_no_point() -> None:
    evaluate = Evaluate(samples=10, groups=4)
    with pytest.raises(CompressionError) as raised:
        back(0.01).choose(candidate(COSTS), evaluate)
    assert str(raised.value) == (
        "`max_drop` must be one that 40 samples of validation can prove. Received: max_drop=0.01. Where not one of "
        "them changes, acc may still fall by 0.14 on others; 551 would do. Validate on more data, allow more, or say "
        "how many you trust: min_samples."
    )
    assert evaluate.count == 1
    chosen: Any = back(0.01, min_samples=40).choose(candidate({"a": 0.0}), evaluate)
    assert chosen.model.fall == 0.0
    with pytest.raises(CompressionError, match="`min_samples` must be at most the samples of validation, 40"):
        back(0.01, min_samples=41).choose(candidate(COSTS), evaluate)
    with pytest.raises(CompressionError, match="`val_dataloader` must give at least 2 batches"):
        back(0.01).choose(candidate(COSTS), Evaluate(1000, groups=1))
