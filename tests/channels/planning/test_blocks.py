"""In which order blocks leave, by changes that are known, and what is measured, by networks without the blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from lightning_compress.channels.planning.blocks import Changes, cheapest_first
from lightning_compress.channels.tracing.blocks import find_blocks
from lightning_compress.channels.tracing.find_groups import find_groups
from lightning_compress.channels.tracing.verify import Subject
from tests.support.residual import network


class Known:
    """Changes that are the sum of each block's own, and of what some cost together."""

    def __init__(self, alone: dict[int, float], together: dict[frozenset[int], float] | None = None) -> None:
        self.alone, self.together, self.asked = alone, together or {}, list[frozenset[int]]()

    def without(self, blocks: Sequence[int]) -> float:
        self.asked.append(frozenset(blocks))
        extra = sum(more for pair, more in self.together.items() if pair <= set(blocks))
        return sum(self.alone[number] for number in blocks) + extra


def order(changes: Any, sizes: dict[int, float], least: float = 0.0) -> list[int]:
    whole = sum(sizes.values())
    return cheapest_first(changes, list(sizes), lambda gone: whole - sum(sizes[n] for n in set(gone)), least)


def test_what_changes_least_by_what_it_costs_leaves_first() -> None:
    assert order(Known({0: 3.0, 1: 2.0, 2: 1.0}), {0: 10, 1: 2, 2: 2}) == [0, 2, 1]


def test_none_leaves_that_the_budget_has_no_room_for() -> None:
    assert order(Known({0: 1.0, 1: 2.0, 2: 3.0}), {0: 10, 1: 4, 2: 3}, least=11.0) == [1]


def test_blocks_that_can_do_without_one_another_only_apart() -> None:
    changes = Known({0: 1.0, 1: 1.1, 2: 2.0}, {frozenset((0, 1)): 5.0})
    assert order(changes, {0: 1, 1: 1, 2: 1}) == [0, 2, 1]


def test_few_are_measured_again() -> None:
    changes = Known({number: float(number + 1) for number in range(20)})
    assert order(changes, dict.fromkeys(range(20), 1)) == list(range(20))
    assert len(changes.asked) < 20 + 2 * 20


def test_a_block_without_which_the_model_fails_stays() -> None:
    assert order(Known({0: float("inf"), 1: 1.0}), {0: 1, 1: 1}) == [1]


def test_a_block_in_one_that_has_left_is_none() -> None:
    costs = {frozenset(): 10.0, frozenset({0}): 5.0, frozenset({1}): 8.0, frozenset({0, 1}): 5.0}
    known: Any = Known({0: 1.0, 1: 1.0})
    assert cheapest_first(known, [0, 1], lambda gone: costs[frozenset(gone)], 0.0) == [0]


@pytest.mark.parametrize("name", ["basic", "convnext", "inverted"])
def test_the_change_is_that_to_a_network_without_these_blocks(name: str) -> None:
    model, x = network(name)
    subject = Subject(model, [lambda twin: twin.eval()(x)], samples=len(x))
    groups = find_blocks(subject, find_groups(subject))
    numbers = {group.name: number for number, group in enumerate(groups.all) if group.skip}
    changes = Changes(subject, groups)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    shorter = nn.Sequential(model[0], model[1][1], *model[2:])
    with torch.no_grad():
        expected = float((shorter(x) - model(x)).square().sum())
    assert changes.without([numbers["1.0"], numbers["1.2"]]) == pytest.approx(expected, rel=1e-4)
    assert changes.without([]) == 0.0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_is_measured_on_is_given() -> None:
    model, x = network("basic")
    runs = [lambda twin: twin.eval()(x[:1])]
    groups = find_blocks(subject := Subject(model, runs), find_groups(subject))
    [first, *_] = [number for number, group in enumerate(groups.all) if group.skip]
    alone, both = (
        Changes(Subject(model, runs, measured=measured), groups).without([first])
        for measured in (None, lambda twin: [twin.eval()(sample) for sample in x[:2].split(1)])
    )
    second = Changes(Subject(model, [lambda twin: twin.eval()(x[1:2])]), groups).without([first])
    assert both == pytest.approx(alone + second, rel=1e-6) and second > 0
