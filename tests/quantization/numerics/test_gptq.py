"""GPTQ as arithmetic, beside two references that are written slowly."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_compress import CompressionError
from lightning_compress.quantization.numerics.gptq import gptq
from tests.support.oracles import assert_same_state, snapshot

Array = np.ndarray[Any, Any]


# The reference.


def bfloat16_above(number: float) -> float:
    """The least bfloat16 that isn't below a positive number: its 24-bit significand, cut to 8 bits, and one up."""
    fraction, exponent = math.frexp(number)
    return math.ldexp(math.ceil(fraction * 2**8 * (1 - 1e-12)), exponent - 8)


def scale_and_zero(block: Array, bits: int, symmetric: bool) -> tuple[float, float]:
    high, low = max(block.max(), 0.0), min(block.min(), 0.0)
    half = 2 ** (bits - 1)
    if symmetric:
        return bfloat16_above(max(high / (half - 1), -low / half)), half
    scale = bfloat16_above((high - low) / (2**bits - 1))
    return scale, float(np.rint(-low / scale))


def damped(hessian: Array, damping: float) -> Array:
    """A fraction of the mean diagonal more; inputs that never came have the mean of the others."""
    hessian = hessian.copy()
    dead = np.diag(hessian) == 0
    hessian[dead, dead] = np.diag(hessian)[~dead].mean() if not dead.all() else 1.0
    return hessian + damping * np.diag(hessian).mean() * np.eye(len(hessian))


def by_elimination(
    matrix: Array, hessian: Array, bits: int, group: int | None, symmetric: bool, damping: float, order: bool
) -> tuple[Array, Array, Array]:
    """Optimal Brain Quantization in a fixed order (section 3.2): one row and one weight at a time, in float64.

    The inverse Hessian of what is left comes from Gaussian elimination of the weight that was just rounded, equation 3.
    """
    rows, columns = matrix.shape
    size = group or columns
    inverse = np.linalg.inv(damped(hessian, damping))
    turns = np.argsort(-np.diag(hessian), kind="stable") if order else np.arange(columns)
    shape = rows, -(-columns // size)
    codes, scales, zeros = np.zeros(matrix.shape), np.zeros(shape), np.zeros(shape)
    for row in range(rows):
        w, h = matrix[row].astype(np.float64).copy(), inverse.copy()
        if order:
            for block in range(shape[1]):
                part = w[block * size : (block + 1) * size]
                scales[row, block], zeros[row, block] = scale_and_zero(part, bits, symmetric)
        for i in turns:
            block = i // size
            if not order and i % size == 0:
                scales[row, block], zeros[row, block] = scale_and_zero(w[i : i + size], bits, symmetric)
            s, z = scales[row, block], zeros[row, block]
            codes[row, i] = np.clip(np.rint(w[i] / s) + z, 0, 2**bits - 1)
            w -= (w[i] - s * (codes[row, i] - z)) / h[i, i] * h[i]
            h -= np.outer(h[:, i], h[i]) / h[i, i]
    return codes, scales, zeros


def by_cholesky(
    matrix: Array, hessian: Array, bits: int, group: int | None, symmetric: bool, damping: float
) -> tuple[Array, Array, Array]:
    """Algorithm 1 of the paper with one block of columns, in float64."""
    rows, columns = matrix.shape
    size = group or columns
    upper = np.linalg.cholesky(np.linalg.inv(damped(hessian, damping))).T
    w = matrix.astype(np.float64).copy()
    shape = rows, -(-columns // size)
    codes, scales, zeros = np.zeros(matrix.shape), np.zeros(shape), np.zeros(shape)
    for j in range(columns):
        if j % size == 0:
            for row in range(rows):
                found = scale_and_zero(w[row, j : j + size], bits, symmetric)
                scales[row, j // size], zeros[row, j // size] = found
        s, z = scales[:, j // size], zeros[:, j // size]
        codes[:, j] = np.clip(np.rint(w[:, j] / s) + z, 0, 2**bits - 1)
        error = (w[:, j] - s * (codes[:, j] - z)) / upper[j, j]
        w[:, j:] -= np.outer(error, upper[j, j:])
    return codes, scales, zeros


def problem(rows: int, columns: int, seed: int = 0, samples: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix, inputs that are correlated, and their X^T X."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    x = torch.randn(samples or 4 * columns, columns, generator=generator)
    mixing = torch.eye(columns) + 0.5 * torch.randn(columns, columns, generator=generator) / columns**0.5
    x = x @ mixing * (0.2 + torch.rand(columns, generator=generator))
    return weight, x, x.T @ x


def output_error(x: Tensor, weight: Tensor, values: Tensor) -> float:
    return float((x.double() @ (weight.double() - values.double()).T).square().sum())


def values_of(codes: Tensor, scale: Tensor, zero: Tensor, group: int | None) -> Tensor:
    size = group or codes.shape[-1]
    each = torch.arange(codes.shape[-1]) // size
    return scale[..., each].double() * (codes.double() - zero[..., each].double())


def nearest(weight: Tensor, bits: int, group: int | None, symmetric: bool) -> Tensor:
    size = group or weight.shape[1]
    values = torch.zeros(weight.shape, dtype=torch.float64)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], size):
            block = weight[row, start : start + size].double().numpy()
            s, z = scale_and_zero(block, bits, symmetric)
            q = np.clip(np.rint(block / s) + z, 0, 2**bits - 1)
            values[row, start : start + size] = torch.from_numpy(s * (q - z))
    return values


# The algorithm.


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 8, 7, 24, 100])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_those_of_the_published_algorithm(bits: int, group: int | None, symmetric: bool, order: bool) -> None:
    weight, _, hessian = problem(4, 24, seed=bits)
    codes, scale, zero = gptq(weight, hessian, bits, group, symmetric, 0.01, order)
    got = [each.double().numpy() for each in (codes, scale, zero)]
    expected = by_elimination(weight.numpy(), hessian.double().numpy(), bits, group, symmetric, 0.01, order)
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape
        assert np.array_equal(one, other)
    if not order:
        other = by_cholesky(weight.numpy(), hessian.double().numpy(), bits, group, symmetric, 0.01)
        assert all(np.array_equal(a, b) for a, b in zip(expected, other, strict=True))


@pytest.mark.parametrize(
    ("columns", "group", "order"),
    [
        (300, None, False),
        (300, 96, False),  # 96 to 192 and 192 to 288 cross borders of 128 columns
        (300, 150, False),
        (290, 200, False),
        (256, 128, False),
        (300, 77, False),
        (129, 64, False),  # one column alone behind the first 128
        (300, 96, True),
    ],
)
def test_more_columns_than_are_updated_at_a_time(columns: int, group: int | None, order: bool) -> None:
    weight, _, hessian = problem(2, columns)
    codes, scale, zero = gptq(weight, hessian, 3, group, False, 0.1, order)
    expected = by_elimination(weight.numpy(), hessian.double().numpy(), 3, group, False, 0.1, order)
    for one, other in zip((codes, scale, zero), expected, strict=True):
        assert np.array_equal(one.double().numpy(), other)


@settings(max_examples=40)
@given(
    columns=st.integers(1, 40),
    group=st.sampled_from([None, 2, 5, 16]),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    order=st.booleans(),
    dead=st.integers(0, 3),
    magnitude=st.sampled_from([1e-4, 1.0, 1e4]),
    seed=st.integers(0, 2**16),
)
def test_any_problem_is_solved_as_the_reference_solves_it(
    columns: int, group: int | None, bits: int, symmetric: bool, order: bool, dead: int, magnitude: float, seed: int
) -> None:
    weight, x, _ = problem(2, columns, seed)
    x[:, :: max(1, columns // 3)][:, :dead] = 0.0
    hessian = x.T @ x
    codes, scale, zero = gptq(weight * magnitude, hessian, bits, group, symmetric, 0.01, order)
    expected = by_elimination(
        (weight * magnitude).numpy(), hessian.double().numpy(), bits, group, symmetric, 0.01, order
    )
    # Float32 decides a tie in ten thousand the other way, and what comes after in the row follows from it.
    if np.array_equal(scale.double().numpy(), expected[1]) and np.array_equal(codes.double().numpy(), expected[0]):
        return
    ours = values_of(codes, scale, zero, group)
    theirs = values_of(*map(torch.from_numpy, expected), group)
    a, b = (output_error(x, weight * magnitude, one) for one in (ours, theirs))
    assert a <= 1.1 * b


def test_matrices_side_by_side_are_each_their_own() -> None:
    parts = [problem(3, 20, seed) for seed in range(4)]
    for order in (False, True):
        together = gptq(
            torch.stack([w for w, *_ in parts]), torch.stack([h for *_, h in parts]), 3, 8, False, 0.01, order
        )
        for index, (weight, _, hessian) in enumerate(parts):
            alone = gptq(weight, hessian, 3, 8, False, 0.01, order)
            for one, other in zip(together, alone, strict=True):
                assert torch.equal(one[index], other)


def test_arguments_are_left_as_they_are() -> None:
    weight, _, hessian = problem(3, 20)
    before = snapshot([weight, hessian])
    gptq(weight, hessian, 3, 8, False, 0.01, True)
    assert_same_state(before, [weight, hessian])


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(2, None), (3, 16), (4, None), (4, 32), (8, None)])
def test_a_smaller_output_error_than_rounding_to_the_nearest(
    bits: int, group: int | None, symmetric: bool, order: bool
) -> None:
    for seed in range(3):
        weight, x, hessian = problem(32, 64, seed)
        values = values_of(*gptq(weight, hessian, bits, group, symmetric, 0.01, order), group)
        assert output_error(x, weight, values) < 0.98 * output_error(x, weight, nearest(weight, bits, group, symmetric))


def test_uncorrelated_inputs_leave_nothing_to_make_up_for() -> None:
    # A diagonal Hessian: every weight is rounded to the nearest.
    weight = torch.randn(8, 24)
    for order in (False, True):
        codes, scale, zero = gptq(weight, torch.diag(torch.rand(24) + 0.1), 4, 8, False, 0.01, order)
        assert torch.equal(values_of(codes, scale, zero, 8), nearest(weight, 4, 8, False))


def test_the_first_column_is_the_nearest_and_the_last_is_best_given_all_others() -> None:
    weight, x, hessian = problem(16, 12)
    codes, scale, zero = gptq(weight, hessian, 3, None, True, 1e-6)
    values = values_of(codes, scale, zero, None)
    best = output_error(x, weight, values)
    for change in (-1, 1):  # one step up or down in the last column makes no row better
        other = codes.int().clone()
        other[:, -1] = (other[:, -1] + change).clamp(0, 7)
        errors = (x.double() @ (weight.double() - values_of(other, scale, zero, None)).T).square().sum(0)
        now = (x.double() @ (weight.double() - values).T).square().sum(0)
        assert (errors >= now * (1 - 1e-9)).all()
    assert best > 0


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("factor", [1e-10, 0.5, 2.0, 1e10])
def test_the_unit_of_the_inputs_does_not_matter(factor: float, order: bool) -> None:
    weight, _, hessian = problem(8, 24)
    for one, other in zip(
        gptq(weight, hessian, 3, 8, False, 0.01, order),
        gptq(weight, hessian * factor, 3, 8, False, 0.01, order),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_a_dead_input_does_not_damp_the_others() -> None:
    weight, x, _ = problem(16, 24)
    x[:, 5] = 0.0
    errors = []
    for factor in (1.0, 1e-3):
        hessian = (factor * x).T @ (factor * x)
        errors.append(output_error(x, weight, values_of(*gptq(weight, hessian, 3, None, True), None)))
    assert errors[1] == pytest.approx(errors[0], rel=0.01)


def test_with_activation_order_the_order_of_the_inputs_does_not_matter() -> None:
    weight, _, hessian = problem(8, 24)
    shuffle = torch.randperm(24)
    codes, scale, zero = gptq(weight, hessian, 3, None, False, 0.01, True)
    other = gptq(weight[:, shuffle], hessian[shuffle][:, shuffle], 3, None, False, 0.01, True)
    assert torch.equal(codes[:, shuffle], other[0])
    assert torch.equal(scale, other[1]) and torch.equal(zero, other[2])
    plain = gptq(weight, hessian, 3, None, False, 0.01, False)
    assert not torch.equal(plain[0], codes)


@pytest.mark.parametrize("order", [False, True])
def test_inputs_that_never_come_are_rounded_to_the_nearest_and_move_nothing(order: bool) -> None:
    weight, x, _ = problem(8, 24)
    x[:, [0, 7, 23]] = 0.0
    codes, scale, zero = gptq(weight, x.T @ x, 4, None, True, 0.01, order)
    values = values_of(codes, scale, zero, None)
    error = (values - weight.double()).abs()[:, [0, 7, 23]]
    assert (error <= scale.double() * (0.5 + 1e-4)).all()
    left = [i for i in range(24) if i not in (0, 7, 23)]
    assert output_error(x, weight, values) < output_error(x, weight, nearest(weight, 4, None, True))
    assert error.max() < (values - weight.double()).abs()[:, left].max()


@pytest.mark.parametrize("samples", [1, 3, 10])
def test_fewer_samples_than_inputs(samples: int) -> None:
    weight, x, hessian = problem(8, 40, samples=samples)
    for order in (False, True):
        for damping in (1e-9, 0.01):
            codes, scale, zero = gptq(weight, hessian, 3, 16, False, damping, order)
            values = values_of(codes, scale, zero, 16)
            assert values.isfinite().all()
            assert output_error(x, weight, values) < output_error(x, weight, nearest(weight, 3, 16, False))


def test_without_any_input_to_the_nearest() -> None:
    weight = torch.randn(4, 12)
    codes, scale, zero = gptq(weight, torch.zeros(12, 12), 4, None, True)
    assert torch.equal(values_of(codes, scale, zero, None), nearest(weight, 4, None, True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_hessian_that_is_not_finite_is_refused(value: float) -> None:
    weight, _, hessian = problem(4, 12)
    hessian[3, 4] = value
    with pytest.raises(CompressionError, match=r"`calibration` must be finite\. Received: NaN or infinity"):
        gptq(weight, hessian, 4, None, True)
