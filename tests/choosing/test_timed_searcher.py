"""The search by time. Where the choice is tested, time is what weights weigh: the clock of the machine decides none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from lightning_compress import plan_removal, remove_channels_, search
from lightning_compress.choosing.speed import Speed
from lightning_compress.errors import CompressionError, NoEffectWarning
from tests.choosing.networks import batches, small
from tests.choosing.test_search import BITS, loss, quantized
from tests.support.oracles import assert_same_state, snapshot

Timings = list[tuple[nn.Module, nn.Module]]


def weight_of(model: nn.Module) -> int:
    tensors = {id(tensor): tensor for tensor in model.state_dict().values()}.values()
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def timed_by(monkeypatch: pytest.MonkeyPatch, time_of: Any) -> Timings:
    """Let a model take `time_of` it; return what was timed."""
    timings: Timings = []

    def beside(model: nn.Module, other: nn.Module, run: Any, batch: Any) -> Speed:
        timings.append((model, other))
        median = time_of(model) / time_of(other)
        return Speed(median, 0.99 * median, 1.01 * median)

    monkeypatch.setattr(Speed, "beside", beside)
    return timings


@pytest.fixture
def timings(monkeypatch: pytest.MonkeyPatch) -> Iterator[Timings]:
    found = timed_by(monkeypatch, weight_of)
    yield found
    assert found


def found(model: nn.Module | None = None, **options: Any) -> Any:
    levels = {"levels": BITS} if options.get("over", "weights") == "weights" else {}
    return search(model or small(), loss, batches(), **{"mode": "min", "cost": "latency", **levels, **options})


def made(result: Any) -> nn.Module:
    """What the YAML of a result makes."""
    if result.over != "channels":
        return quantized(result)
    said, model = yaml.safe_load(result.to_yaml())["init_args"], small()
    plan = plan_removal(model, batches()[0], calibration=batches(), importance="outputs", scope="layer", **said)
    remove_channels_(model, plan)
    return model


@pytest.mark.parametrize(("over", "budget"), [("weights", 0.4), ("int8", 0.6), ("channels", 0.5)])
def test_within_a_budget_of_time_and_the_yaml_takes_as_long(timings: Timings, over: str, budget: float) -> None:
    model = small()
    before = snapshot(model)
    result = found(model, over=over, budget=budget)
    assert_same_state(model, before)
    assert all(floats is model for floats, _ in timings)
    assert result.chosen.fraction <= budget
    assert weight_of(made(result)) / weight_of(small()) == pytest.approx(result.chosen.fraction, rel=1e-6)
    assert result.chosen.spread == pytest.approx((result.chosen.fraction / 1.01, result.chosen.fraction / 0.99))
    assert result.chosen.cost == pytest.approx(result.chosen.fraction * result.whole)
    least_changed = [point for point in result.points if len(point.choice) < len(result.chosen.choice)]
    assert all(point.fraction > budget for point in least_changed)
    assert result.notes == ()


def test_within_a_drop_it_is_as_fast_as_anything_that_was_evaluated(timings: Timings) -> None:
    result = found(max_drop=0.02)
    assert result.chosen.drop <= 0.02
    assert all(point.fraction >= result.chosen.fraction for point in result.points if point.drop <= 0.02)
    assert all(point.spread is not None for point in result.points if point.choice)


def test_what_compresses_most_need_not_be_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with its last layer in few bits is slow."""

    def time_of(model: nn.Module) -> float:
        return 1.0 if type(model.get_submodule("conv")) is not nn.Conv2d else weight_of(model) / weight_of(small())

    timed_by(monkeypatch, time_of)
    result = found(budget=0.6)
    assert result.chosen.fraction <= 0.6
    assert "conv" not in result.chosen.choice


def test_what_was_chosen_by_chance_is_timed_anew_and_gone_on_from(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, seen = weight_of(small()), list[int]()

    def time_of(model: nn.Module) -> float:
        seen.append(weight := weight_of(model))
        return weight * (1.3 if 0.25 * whole < weight < whole and seen.count(weight) > 1 else 1.0)

    timed_by(monkeypatch, time_of)
    result = found(budget=0.35)
    assert result.chosen.fraction <= 0.35
    assert weight_of(quantized(result)) <= 0.25 * whole


def test_a_budget_that_is_missed_in_the_end_is_said_loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = list[int]()

    def beside(model: nn.Module, other: nn.Module, run: Any, batch: Any) -> Speed:
        weights.append(weight_of(other))
        median = 2.0 if weights.count(weights[-1]) == 1 else 1.6 if weights[-1] == min(weights) else 1.5
        return Speed(median, median - 0.1, median + 0.1)

    monkeypatch.setattr(Speed, "beside", beside)
    with pytest.warns(NoEffectWarning, match=r"BEYOND the budget of 0.55: timed anew, 0.625 of the time remains"):
        result = found(budget=0.55)
    assert "note: BEYOND the budget" in str(result)
    assert result.chosen.fraction == pytest.approx(0.625)


@pytest.mark.parametrize(
    ("speed", "words"),
    [
        (Speed(0.5, 0.4, 0.6), "SLOWER than the model as it is: 2.00 times as long"),
        (Speed(1.01, 0.9, 1.1), "No measurable difference in time"),
    ],
)
def test_what_is_no_faster_says_so(monkeypatch: pytest.MonkeyPatch, speed: Speed, words: str) -> None:
    monkeypatch.setattr(Speed, "beside", lambda *_: speed)
    with pytest.warns(NoEffectWarning, match=words):
        result = found(max_drop=10.0)
    assert f"note: {words}" in str(result)


def test_a_search_that_goes_on_times_nothing_again(timings: Timings, tmp_path: Path) -> None:
    first = found(budget=0.4, path=tmp_path / "run.jsonl")
    count = len(timings)
    second = found(budget=0.4, path=tmp_path / "run.jsonl")
    assert len(timings) == count
    assert (second.chosen, second.points, second.whole) == (first.chosen, first.points, first.whole)


@pytest.mark.filterwarnings("ignore:search. No measurable difference", "ignore:search. SLOWER", "ignore:search. BEYOND")
def test_it_is_really_timed_beside_the_model(tmp_path: Path) -> None:
    result = found(over="channels", max_drop=10.0, levels=[0.25])
    assert result.whole > 0
    for point in filter(lambda point: point.choice, result.points):
        assert point.spread[0] <= point.fraction <= point.spread[1]
    assert json.loads(result.save(tmp_path / "result.json").read_text())["chosen"]["spread"]
    assert " ms -> " in str(result)


def test_a_time_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Speed, "beside", lambda *_: Speed(0.8, 0.7, 0.9))
    with pytest.raises(CompressionError, match=r"budget=0.5 of latency, where the least is 1.2500. It was timed"):
        found(budget=0.5)


def test_zeros_save_no_time() -> None:
    with pytest.raises(CompressionError, match="`cost` must be one of bytes, params, macs over pruning") as error:
        found(over="pruning", budget=0.5)
    assert str(error.value) in (Path(__file__).parents[2] / "docs" / "choosing.md").read_text()


def test_nothing_is_drawn_from_global_generators(timings: Timings) -> None:
    model = small()
    state = torch.get_rng_state()
    found(model, budget=0.4)
    assert torch.equal(state, torch.get_rng_state())
