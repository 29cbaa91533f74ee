"""Linear quantization against numpy in float64, over every width, symmetric or not, and blocks of any size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_compress.quantization.numerics.linear import blocks, dequantize, parameters, quantize

TINY = float(torch.finfo(torch.bfloat16).tiny)

KINDS = ("normal", "constant", "zeros", "positive", "negative", "outlier", "mostly zeros")


def numbers(kind: str, shape: tuple[int, int], magnitude: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    if kind == "constant":
        values = values[:1, :1].expand(shape).clone()
    elif kind == "zeros":
        values = torch.zeros(shape)
    elif kind in ("positive", "negative"):
        values = values.abs() * (1 if kind == "positive" else -1) + (0.5 if kind == "positive" else -0.5)
    elif kind == "outlier":
        values[seed % shape[0], seed % shape[1]] = 1000.0
    elif kind == "mostly zeros":
        values = values * (torch.rand(shape, generator=generator) < 0.2)
    return values * magnitude


def round_trip(values: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scale, zero = parameters(values, bits, symmetric)
    codes = quantize(values, scale, zero, bits)
    return scale, zero, codes, dequantize(codes, scale, zero)


def least_step(block: np.ndarray[Any, Any], bits: int, symmetric: bool) -> float:
    """The smallest step with which the codes reach from the block's least to its largest value, and zero."""
    high, low = max(block.max(), 0.0), min(block.min(), 0.0)
    if symmetric:
        return max(high / (2 ** (bits - 1) - 1), -low / 2 ** (bits - 1))
    return float(high - low) / (2**bits - 1)


cases = {
    "kind": st.sampled_from(KINDS),
    "shape": st.tuples(st.integers(1, 5), st.integers(1, 40)),
    "block_size": st.sampled_from([None, 2, 3, 7, 8, 32, 64]),
    "bits": st.integers(2, 8),
    "symmetric": st.booleans(),
    "magnitude": st.sampled_from([1e-30, 1e-3, 1.0, 1e30]),
    "seed": st.integers(0, 2**16),
}


@settings(max_examples=300)
@given(**cases)
def test_an_error_of_half_a_step_at_most(
    kind: str,
    shape: tuple[int, int],
    block_size: int | None,
    bits: int,
    symmetric: bool,
    magnitude: float,
    seed: int,
) -> None:
    matrix = numbers(kind, shape, magnitude, seed)
    scale, zero, codes, values = round_trip(blocks(matrix, block_size), bits, symmetric)
    assert codes.dtype == torch.uint8 and int(codes.max()) < 2**bits
    assert torch.equal(zero, zero.round()) and (zero >= 0).all() and (zero < 2**bits).all()
    flat = values.flatten(1)[:, : shape[1]].double().numpy()
    exact = matrix.double().numpy()
    size = block_size or shape[1]
    for row in range(shape[0]):
        for start in range(0, shape[1], size):
            block = exact[row, start : start + size]
            step = float(scale[row, start // size])
            # The least one, rounded up to bfloat16's eight bits.
            least = max(least_step(block, bits, symmetric), TINY)
            assert least * (1 - 1e-6) <= step <= least * (1 + 2**-7 + 1e-6)
            assert np.abs(flat[row, start : start + size] - block).max() <= step * (0.5 + 5e-5)
    assert (flat[exact == 0] == 0).all()


@settings(max_examples=100)
@given(**cases)
def test_equals_numpy(
    kind: str,
    shape: tuple[int, int],
    block_size: int | None,
    bits: int,
    symmetric: bool,
    magnitude: float,
    seed: int,
) -> None:
    # Q = clip(rint(R / S) + Z) and R = S (Q - Z), block by block; the last block is shorter in numpy, not filled up.
    matrix = numbers(kind, shape, magnitude, seed)
    scale, zero, codes, values = round_trip(blocks(matrix, block_size), bits, symmetric)
    size = block_size or shape[1]
    for row in range(shape[0]):
        for index, start in enumerate(range(0, shape[1], size)):
            block = matrix[row, start : start + size].numpy()
            s = scale[row, index].item()
            z = 2 ** (bits - 1) if symmetric else float(np.rint(np.float32(-min(block.min(), 0.0)) / np.float32(s)))
            q = np.clip(np.rint(block / np.float32(s)) + z, 0, 2**bits - 1)
            assert zero[row, index].item() == z
            assert np.array_equal(codes[row, index, : len(block)].numpy(), q)
            assert np.array_equal(values[row, index, : len(block)].numpy(), np.float32(s) * np.float32(q - z))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_scale_is_a_bfloat16_and_survives_being_stored(bits: int, symmetric: bool) -> None:
    scale, _ = parameters(torch.randn(200, 16) * torch.logspace(-30, 30, 200)[:, None], bits, symmetric)
    assert scale.dtype == torch.float32
    assert torch.equal(scale.bfloat16().float(), scale)


@pytest.mark.parametrize("magnitude", [1e-37, 1e-40, 1e-44])
@pytest.mark.parametrize("symmetric", [True, False])
def test_values_too_small_for_a_step_become_nearly_zero(symmetric: bool, magnitude: float) -> None:
    values = torch.randn(4, 16) * magnitude
    *_, back = round_trip(values, 4, symmetric)
    assert (back.double() - values.double()).abs().max() <= max(values.abs().max().item() / 7, TINY) * 0.51


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_what_the_codes_reach_exactly_comes_back_exactly(bits: int, symmetric: bool) -> None:
    # A step of 1/4: any whole number of steps in reach is a code, and so are the ends of the range.
    low = -(2 ** (bits - 1)) if symmetric else -1
    whole = torch.arange(low, low + 2**bits) / 4.0
    *_, codes, values = round_trip(whole, bits, symmetric)
    assert torch.equal(values, whole)
    assert codes.tolist() == list(range(2**bits))


def test_a_range_on_one_side_uses_all_asymmetric_codes() -> None:
    values = torch.linspace(0.0, 15.0, 16)
    assert round_trip(values, 4, symmetric=False)[2].tolist() == list(range(16))
    assert round_trip(-values, 4, symmetric=False)[2].tolist() == list(range(15, -1, -1))
    # Zero has to be a code, so a range far from zero reaches down to it.
    *_, back = round_trip(values + 100, 8, symmetric=False)
    assert (back - values - 100).abs().max() <= 115 / 255 * 0.51


@settings(max_examples=60)
@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    block_size=st.sampled_from([4, 5, 16]),
    at=st.tuples(st.integers(0, 3), st.integers(0, 29)),
    outlier=st.sampled_from([50.0, -1e4, 1e30]),
    seed=st.integers(0, 2**16),
)
def test_an_outlier_spoils_its_own_block_only(
    bits: int, symmetric: bool, block_size: int, at: tuple[int, int], outlier: float, seed: int
) -> None:
    matrix = numbers("normal", (4, 30), 1.0, seed)
    spoiled = matrix.clone()
    spoiled[at] = outlier
    without, with_outlier = (round_trip(blocks(each, block_size), bits, symmetric)[3] for each in (matrix, spoiled))
    same = (without == with_outlier).all(dim=-1)
    same[at[0], at[1] // block_size] = True
    assert same.all()
    # Per channel the whole row shares the damage; per tensor everything does.
    lost = round_trip(blocks(spoiled, None), bits, symmetric)[3][at[0], 0]
    assert (lost == 0).sum() > (without[at[0]] == 0).sum()
    everything = round_trip(blocks(spoiled.view(1, -1), None), bits, symmetric)[3]
    assert (everything == 0).sum() > (without == 0).sum() + 40


@settings(max_examples=60)
@given(
    leading=st.sampled_from([(), (2,), (2, 3)]),
    rows=st.integers(1, 4),
    columns=st.integers(1, 30),
    block_size=st.sampled_from([None, 1, 4, 16, 30, 100]),
)
def test_blocks_cut_rows_and_fill_up_with_zeros(
    leading: tuple[int, ...], rows: int, columns: int, block_size: int | None
) -> None:
    matrix = torch.randn(*leading, rows, columns)
    size = block_size or columns
    cut = blocks(matrix, block_size)
    count = (columns + size - 1) // size
    assert cut.shape == (*leading, rows, count, size)
    padded = np.zeros((*leading, rows, count * size), dtype=np.float32)
    padded[..., :columns] = matrix.numpy()
    assert np.array_equal(cut.numpy().reshape(padded.shape), padded)
    if columns % size == 0:
        assert cut.data_ptr() == matrix.data_ptr()
