"""Fits with a ridge and on a mask, against numpy's least squares and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_compress import CompressionError
from lightning_compress.compensation.least_squares import LeastSquares, all_finite


def problem(rows: int, columns: int, outputs: int = 3, groups: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(groups, rows, columns) * torch.linspace(0.5, 2.0, columns) + 0.7
    y = x @ torch.randn(groups, columns, outputs) + torch.randn(groups, rows, outputs) + 1.3
    return x, y, torch.randn(groups, outputs, columns)


def ridge(x: Tensor, y: Tensor, weight: Tensor, strength: float, centred: bool = True) -> Tensor:
    other, found = LeastSquares(x, centred).ridges(y, weight, [2 * strength, strength])
    assert other.shape == found.shape
    return found


def stacked(x: Tensor, y: Tensor, weight: Tensor, strength: float, centred: bool) -> np.ndarray:
    """Least squares of numpy with the ridge as rows of its own."""
    a, b, w = (tensor.double().numpy() for tensor in (x, y, weight))
    if centred:
        a, b = a - a.mean(0), b - b.mean(0)
    root = np.sqrt(strength * (a**2).sum() / a.shape[1])
    a, b = np.vstack([a, root * np.eye(a.shape[1])]), np.vstack([b, root * w.T])
    return np.linalg.lstsq(a, b, rcond=None)[0].T


@pytest.mark.parametrize("rows", [5, 12, 60])  # fewer than columns: the dual
@pytest.mark.parametrize("strength", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("centred", [True, False])
def test_a_ridge_is_least_squares_with_rows_for_the_ridge(rows: int, strength: float, centred: bool):
    x, y, weight = problem(rows, 12, groups=2)
    found = ridge(x, y, weight, strength, centred)
    for group in range(2):
        expected = stacked(x[group], y[group], weight[group], strength, centred)
        np.testing.assert_allclose(found[group].numpy(), expected, atol=2e-3, rtol=2e-3)


def test_a_strong_ridge_leaves_the_weight_as_it_was_and_a_weak_one_finds_the_truth():
    x, _, weight = problem(80, 6)
    truth = torch.randn(1, 3, 6)
    y = x @ truth.mT + 2.0
    torch.testing.assert_close(ridge(x, y, weight, 1e9), weight, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ridge(x, y, weight, 1e-7), truth, atol=1e-4, rtol=1e-4)


def test_inputs_that_are_always_zero_change_nothing():
    x, y, weight = problem(20, 4, groups=2)
    assert torch.equal(ridge(torch.zeros_like(x), y, weight, 0.1), weight)
    x[1] = 0.0
    found = ridge(x, y, weight, 0.1)
    assert torch.equal(found[1], weight[1]) and not torch.equal(found[0], weight[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_are_refused(bad: float):
    x, y, weight = problem(20, 4)
    x[0, 3, 2] = bad
    assert not all_finite(x)
    with pytest.raises(CompressionError, match="`calibration` must be finite"):
        LeastSquares(x)
    with pytest.raises(CompressionError, match="`calibration` must be finite"):
        LeastSquares(y).ridges(x, weight, [0.1])


@pytest.mark.parametrize("rows", [5, 40])
@pytest.mark.parametrize("centred", [True, False])
def test_on_a_mask_each_row_is_what_least_squares_on_its_own_columns_gives(rows: int, centred: bool):
    x, _, goal = problem(rows, 8, outputs=4)
    mask = torch.rand(goal.shape) > 0.5
    mask[0, 0] = False  # a row without any weight
    found = LeastSquares(x, centred).on_mask(goal, mask, strength=0.1, steps=40)
    assert not found[~mask].any()
    a = x[0].double().numpy()
    a = a - a.mean(0) if centred else a
    square = a.T @ a
    square += 0.1 * np.trace(square) / len(square) * np.eye(len(square))
    root = np.linalg.cholesky(square).T  # ||root (v - t)||^2 is what is made small
    for row, keep in enumerate(mask[0].numpy()):
        expected = np.zeros(8)
        if keep.any():
            expected[keep] = np.linalg.lstsq(root[:, keep], root @ goal[0, row].double().numpy(), rcond=None)[0]
        np.testing.assert_allclose(found[0, row].numpy(), expected, atol=1e-3)


def test_few_steps_are_nearer_in_outputs_than_the_masked_goal_where_inputs_hang_together():
    torch.manual_seed(0)
    x, goal = torch.randn(1, 60, 3) @ torch.randn(3, 12) + 0.2 * torch.randn(1, 60, 12), torch.randn(1, 5, 12)
    mask = torch.rand(goal.shape) > 0.5
    centred = x - x.mean(1, keepdim=True)

    def far(weight: Tensor) -> float:
        return float((centred @ (weight - goal).mT).square().sum())

    assert far(LeastSquares(x).on_mask(goal, mask)) < 0.2 * far(goal * mask)
