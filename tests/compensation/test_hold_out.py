"""Samples that nothing is fitted to."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.compensation.hold_out import HoldOut, pieces, relative_error, split
from lightning_compress.compensation.runner import Runner
from tests.support.oracles import assert_same_state, snapshot


def rows(batches: Any) -> list[int]:
    return [int(value) for batch in batches for value in batch.flatten()]


@pytest.mark.parametrize(
    ("sizes", "fitted", "held_out"),
    [([10], 8, 2), ([64, 64], 103, 25), ([4] * 10, 32, 8), ([3], 3, 0), ([1, 1], 1, 1), ([1], 1, 0), ([7] * 4, 26, 6)],
)
def test_a_fifth_is_held_out_the_last_and_nothing_is_in_both_or_lost(sizes: list[int], fitted: int, held_out: int):
    batches = list(torch.arange(sum(sizes)).split(sizes))
    parts = split(batches)
    assert rows([*parts[0], *parts[1]]) == list(range(sum(sizes)))
    assert len(rows(parts[0])) >= len(rows(parts[1]))
    if sum(sizes) >= 10:
        assert abs(len(rows(parts[1])) - sum(sizes) / 5) <= len(sizes)


def test_batches_of_any_structure_are_taken_apart_along_their_samples():
    batch = {"x": torch.arange(10), "pair": (torch.arange(20).view(10, 2), 3, "name")}
    found = pieces(batch)
    assert [len(piece["x"]) for piece in found] == [2] * 5
    assert torch.equal(torch.cat([piece["pair"][0] for piece in found]), batch["pair"][0])  # type: ignore[index]
    assert found[0]["pair"][1:] == (3, "name")


@pytest.mark.parametrize(
    "batch",
    [(torch.ones(10), torch.ones(4)), torch.ones(3, 9), torch.tensor(1.0), [], {"text": "abc"}],
    ids=["two lengths", "few", "scalar", "empty", "no tensor"],
)
def test_what_has_no_samples_to_take_apart_stays_whole(batch: Any):
    found = pieces(batch)
    assert len(found) == 1 and found[0] is batch


def test_the_error_is_relative_to_the_spread_of_each_output():
    torch.manual_seed(0)
    expected, got = [torch.randn(6, 3) * 5 + 2 for _ in range(3)], [torch.randn(6, 3) for _ in range(3)]
    others, other_got = [torch.randn(6, 2, 4) for _ in range(3)], [torch.randn(6, 2, 4) for _ in range(3)]

    def alone(a: list[Tensor], b: list[Tensor]) -> float:
        whole, apart = torch.cat(a).double(), torch.cat(b).double()
        return float(((whole - apart) ** 2).sum() / ((whole - whole.mean(0)) ** 2).sum())

    found = relative_error(
        [[{"a": a, "b": b}] for a, b in zip(expected, others, strict=True)],
        [[{"a": a, "b": b}] for a, b in zip(got, other_got, strict=True)],
    )
    assert found == pytest.approx((alone(expected, got) + alone(others, other_got)) / 2, rel=1e-4)


def test_scalars_and_whole_numbers_do_not_count():
    expected = [[(torch.tensor(1.0), torch.tensor([1, 2]), torch.tensor([0.0, 2.0]))]]
    got = [[(torch.tensor(9.0), torch.tensor([5, 5]), torch.tensor([0.0, 2.0]))]]
    assert relative_error(expected, got) == 0.0
    assert relative_error([], []) == 0.0


def test_lengths_may_differ_and_another_shape_is_as_wrong_as_zeros():
    assert relative_error([[torch.randn(2, 5)], [torch.randn(2, 9)]], [[torch.zeros(2, 5)], [torch.zeros(2, 9)]]) == 1.0
    assert relative_error([[torch.ones(2, 5)], [torch.zeros(2, 5)]], [[torch.ones(3, 5)], [torch.zeros(2, 5)]]) > 0.9


def test_it_looks_at_the_fitted_model_anew_and_changes_neither():
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout())
    fitted = copy.deepcopy(reference)
    before = snapshot(reference)
    held = HoldOut(Runner(reference), Runner(fitted), [torch.randn(6, 4), torch.randn(3, 4)])
    assert held.error() == 0.0 and held.agreement().cosine == pytest.approx(1.0)
    fitted[1].running_mean += 1.0
    assert (moved := held.error()) > 0.0
    fitted[0].weight.data.neg_()
    assert held.error() > moved and held.agreement().cosine < 0.9
    assert held.agreement().batches == 2
    assert_same_state(snapshot(reference), before)
    assert reference.training and fitted.training
