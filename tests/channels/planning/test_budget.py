"""What remains is what was asked for, counted on the cut model; patterns, steps and floors are kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_compress import RemovalPlan, Targets, plan_removal
from lightning_compress.report.inputs import batch_size_of
from lightning_compress.report.macs import count_macs
from tests.channels.cuts import PLANS, SETTINGS, cut, inputs_of, plan_of

X = torch.ones(2, 3, 8, 8)


def params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("name", "setting"), PLANS)
def test_totals_are_those_of_the_models(name: str, setting: int) -> None:
    model, plan, _ = plan_of(name, setting)
    inputs = inputs_of(name)
    small = cut(model, plan)
    assert (plan.before.params, plan.after.params) == (params(model), params(small))
    samples = batch_size_of(inputs)
    assert plan.before.macs == round(count_macs(model, inputs)[0] / samples)
    assert plan.after.macs == round(count_macs(small, inputs)[0] / samples)
    assert plan.after.channels < plan.before.channels


@pytest.mark.parametrize(("name", "setting"), PLANS)
def test_a_missed_budget_is_reported_and_one_that_is_met_is_not(name: str, setting: int) -> None:
    _, plan, _ = plan_of(name, setting)
    kind = "macs" if "macs" in SETTINGS[setting] else "params"
    wanted = SETTINGS[setting][kind]
    reached = getattr(plan.after, kind) / getattr(plan.before, kind)
    assert bool(plan.missed) == (abs(reached - wanted) > 0.02 * wanted)
    if plan.missed:
        assert plan.missed.startswith(f"The budget is missed: {kind}={wanted} was asked for, {reached:.3f} is nearest.")
        assert str(plan).endswith(plan.missed)


def test_macs_are_those_of_a_sample_whatever_the_batch() -> None:
    single, many = (plan_removal(cnn(16, 16), torch.ones(batch, 3, 8, 8), macs=0.5) for batch in (1, 6))
    assert (single.before, single.after) == (many.before, many.after)
    assert single.before.macs == count_macs(cnn(16, 16), torch.ones(1, 3, 8, 8))[0]
    assert f"macs per sample: {single.before.macs:,} -> {single.after.macs:,}" in str(many)


def cnn(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inp, out in zip((3, *widths), widths, strict=False):
        layers += [nn.Conv2d(inp, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 4))


def widths(plan: RemovalPlan) -> dict[str, int]:
    return {row.layers[0]: row.after for row in plan.rows}


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("kind", ["params", "macs", "channels"])
@given(fraction=st.floats(0.2, 0.95), seed=st.integers(0, 99))
@settings(max_examples=2)
def test_budgets_are_met_where_widths_allow(kind: str, scope: Any, fraction: float, seed: int) -> None:
    model = cnn(30, 26, 28)
    options: dict[str, Any] = {kind: fraction, "scope": scope, "seed": seed, "importance": "random"}
    plan = plan_removal(model, X, min_layer_channels=0.05, **options)
    small = cut(model, plan)
    reached = {
        "params": params(small) / params(model),
        "macs": count_macs(small, X)[0] / count_macs(model, X)[0],
        "channels": sum(small[place].weight.shape[0] for place in (0, 3, 6)) / 84,
    }[kind]
    assert abs(reached - fraction) <= 0.02
    assert bool(plan.missed) == (abs(reached - fraction) > 0.02 * fraction)


def test_layer_scope_takes_the_same_fraction_of_each() -> None:
    model = cnn(20, 24, 28)
    model[0].weight.data.mul_(100.0)
    assert widths(plan_removal(model, X, channels=0.5, scope="layer")) == {"0": 10, "3": 12, "6": 14}


@pytest.mark.parametrize(("round_to", "step"), [(1, 1), (4, 4), (None, 8)])
def test_widths_are_multiples(round_to: int | None, step: int) -> None:
    model = cnn(64, 40, 48)
    plan = plan_removal(model, X, channels=0.58, round_to=round_to, importance="random")
    after = widths(plan)
    assert all(width % step == 0 for width in after.values())
    if step == 1:
        assert any(width % 4 for width in after.values())
    assert sum(after.values()) < 0.62 * 152


def test_floor_of_each_layer() -> None:
    model = cnn(20, 20, 20)
    model[0].weight.data.mul_(1e-3)  # by far the least important, but for what reads it
    model[3].weight.data.mul_(1e-3)
    low = plan_removal(model, X, channels=0.4, importance="l1", min_layer_channels=0.0)
    high = plan_removal(model, X, channels=0.4, importance="l1", min_layer_channels=0.35)
    assert min(widths(high).values()) >= 7
    assert all(width >= 1 for width in widths(low).values())
    assert all(width >= 2 for width in widths(plan_removal(model, X, channels=0.01)).values())


def test_floors_give_way_where_the_budget_is_out_of_reach() -> None:
    class Block(nn.Module):
        """A few heads that cost much, beside a width of many units."""

        def __init__(self) -> None:
            super().__init__()
            self.heads, self.qkv, self.o = 3, nn.Linear(24, 72), nn.Linear(24, 24)
            self.a, self.b = nn.Linear(24, 16), nn.Linear(16, 24)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            shape = *x.shape[:2], 3, self.heads, 8
            q, k, v = self.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)
            y = nn.functional.scaled_dot_product_attention(q, k, v)
            x = x + self.o(y.transpose(1, 2).flatten(2))
            return x + self.b(self.a(x).relu())

    model, x = nn.Sequential(*(Block() for _ in range(3))), torch.randn(2, 6, 24)
    plan = plan_removal(model, x, macs=0.5)
    assert not plan.missed
    small = cut(model, plan)
    assert count_macs(small, x)[0] / count_macs(model, x)[0] <= 0.51


def test_overrides_hold_and_the_last_match_wins() -> None:
    model = cnn(20, 20, 20)
    assert widths(plan_removal(model, X, channels=0.5, overrides={"0": 0.25, "[36]": 0.75})) == {
        **{"0": 5, "3": 15, "6": 15}
    }
    plan = plan_removal(model, X, channels=0.5, overrides={"*": 0.25, "3": 1.0})
    assert widths(plan) == {"0": 5, "3": 20, "6": 5}
    plan = plan_removal(model, X, channels=0.5, overrides={"3": 1.0, "*": 0.25})
    assert widths(plan) == {"0": 5, "3": 5, "6": 5}
    plan = plan_removal(model, X, channels=0.5, overrides={"3": 1.0}, importance="random")
    assert widths(plan)["3"] == 20 and sum(widths(plan).values()) == 30


def test_targets_choose_the_layers_and_reasons_are_given() -> None:
    model = cnn(12, 14, 16)
    plan = plan_removal(model, X, channels=0.5, targets=Targets(include=["3"]))
    assert widths(plan) == {"3": 7}
    assert (plan.fixed["0"], plan.fixed["6"], plan.fixed["11"]) == ("not included", "not included", "an output")
    plan = plan_removal(model, X, channels=0.5, targets=Targets(exclude=["3"]))
    assert set(widths(plan)) == {"0", "6"} and plan.fixed["3"] == "excluded"


def test_frozen_layers_stay() -> None:
    model = cnn(12, 14, 16)
    model[3].requires_grad_(False)
    plan = plan_removal(model, X, macs=0.5)
    assert plan.fixed["3"] == "frozen" and set(widths(plan)) == {"0", "6"}


def test_a_whole_budget_takes_nothing() -> None:
    model = cnn(12, 14, 16)
    plan = plan_removal(model, X, macs=1.0)
    assert not plan.kept and plan.before == plan.after and not plan.missed


def test_a_budget_out_of_reach_goes_to_the_floor_and_says_so() -> None:
    plan = plan_removal(cnn(20, 20, 20), X, macs=0.001, min_layer_channels=0.2)
    assert widths(plan) == {"0": 4, "3": 4, "6": 4}
    assert plan.missed.startswith("The budget is missed: macs=0.001 was asked for, 0.0")


def test_measured_latency() -> None:
    class Sleepy(nn.Module):
        """Takes as long as it has channels."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.o = nn.Linear(4, 40), nn.Linear(40, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            import time

            x = self.a(x)
            time.sleep(0.0002 * x.shape[1])
            return self.o(x)

    plan = plan_removal(Sleepy(), torch.ones(1, 4), latency=0.5, round_to=1)
    assert plan.latency is not None and abs(plan.latency - 0.5) < 0.1
    assert 14 <= widths(plan)["a"] <= 26
    assert f"latency: {plan.latency:.3f} of before, measured" in str(plan)
