"""Greedy steps beside all choices there are."""

from __future__ import annotations

from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_compress.choosing.steps import greedy

LEVELS = ("a", "b", "c")
SIZES = {"": 1.0, "a": 0.5, "b": 0.25, "c": 0.1}


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[float], list[list[float]], float]:
    count = draw(st.integers(2, 5))
    weights = [draw(st.floats(0.5, 4.0)) for _ in range(count)]
    errors = [sorted(draw(st.floats(0.01, 10.0)) for _ in LEVELS) for _ in range(count)]
    return weights, errors, draw(st.floats(0.12, 0.95))


def brute_force(weights: list[float], errors: list[list[float]], most: float) -> float:
    found = []
    for levels in product(("", *LEVELS), repeat=len(weights)):
        if sum(weight * SIZES[level] for weight, level in zip(weights, levels, strict=True)) <= most:
            found.append(sum(row[LEVELS.index(level)] for row, level in zip(errors, levels, strict=True) if level))
    return min(found)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_within_a_budget_and_at_most_a_step_from_the_best(case: tuple[list[float], list[list[float]], float]) -> None:
    weights, errors, fraction = case
    names = [str(place) for place in range(len(weights))]

    def cost(choice: dict[str, str]) -> float:
        return sum(weight * SIZES[choice.get(name, "")] for name, weight in zip(names, weights, strict=True))

    known = {(name, level): row[at] for name, row in zip(names, errors, strict=True) for at, level in enumerate(LEVELS)}
    steps = greedy(dict.fromkeys(names, LEVELS), known, cost)
    assert list(steps.costs) == sorted(steps.costs, reverse=True)
    assert steps.last == dict.fromkeys(names, "c")
    for choice, reached in zip(steps.choices, steps.costs, strict=True):
        assert abs(cost(choice) - reached) < 1e-9
    most = fraction * sum(weights)
    choice = steps.within(most)
    assert choice is not None
    assert cost(choice) <= most * (1 + 1e-6)
    got = sum(known[key] for key in choice.items())
    least = brute_force(weights, errors, most)
    # The step over the budget is all that the relaxed optimum, which isn't above the best choice, may lack.
    place = next(at for at, reached in enumerate(steps.costs) if reached <= most * (1 + 1e-9))
    last_step = steps.errors[place] - steps.errors[place - 1] if place else 0.0
    assert least - 1e-9 <= got <= least + last_step + 1e-9


def test_a_budget_out_of_reach() -> None:
    steps = greedy({"a": ["x"]}, {("a", "x"): 1.0}, lambda choice: 0.5 if choice else 1.0)
    assert steps.within(0.4) is None
    assert steps.within(1.0) == {}


def test_a_level_that_is_both_larger_and_worse_is_never_taken() -> None:
    cost = {"": 1.0, "good": 0.4, "bad": 0.5}
    steps = greedy({"a": ["bad", "good"]}, {("a", "bad"): 2.0, ("a", "good"): 1.0}, lambda c: cost[c.get("a", "")])
    assert list(steps.choices) == [{}, {"a": "good"}]
