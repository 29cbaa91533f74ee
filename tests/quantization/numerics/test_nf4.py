"""NF4: the published values, the nearest of them, and scales that are quantized themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from torch import Tensor

from lightning_compress.quantization.numerics.nf4 import (
    NF4_VALUES,
    SCALE_BLOCK,
    nf4_codes,
    nf4_values,
    scale_codes,
    scale_values,
)
from tests.support.few_bits import NF4_CONSTANTS


def test_the_values_are_the_published_ones() -> None:
    assert NF4_VALUES.dtype == torch.float32 and NF4_VALUES.shape == (16,)
    torch.testing.assert_close(NF4_VALUES.double(), torch.tensor(NF4_CONSTANTS).double(), rtol=0, atol=3e-7)
    assert NF4_VALUES[[0, 7, 15]].tolist() == [-1.0, 0.0, 1.0]


def test_the_values_are_quantiles_of_the_normal_distribution() -> None:
    # Equal areas between neighbours on either side, once undone the division by the largest.
    offset = 1 - (1 / 32 + 1 / 30) / 2
    areas = np.diff(norm.cdf(NF4_VALUES.double().numpy() * norm.ppf(offset)))
    assert np.ptp(areas[:7]) < 1e-6 and np.ptp(areas[7:]) < 1e-6


@settings(max_examples=100)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 70)),
    magnitude=st.sampled_from([1e-30, 1e-3, 1.0, 1e30]),
    seed=st.integers(0, 2**16),
)
def test_the_nearest_value_by_brute_force(shape: tuple[int, int], magnitude: float, seed: int) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * magnitude
    absmax = values.abs().amax(-1, keepdim=True)
    codes = nf4_codes(values, absmax)
    assert codes.dtype == torch.uint8 and codes.shape == values.shape
    distance = np.abs(values.double().numpy()[..., None] - absmax.double().numpy()[..., None] * NF4_CONSTANTS)
    chosen = np.take_along_axis(distance, codes.numpy()[..., None].astype(int), -1)[..., 0]
    assert (chosen <= distance.min(-1) + 1e-6 * absmax.numpy()).all()
    back = nf4_values(codes, absmax).double().numpy()
    assert np.allclose(back, absmax.numpy() * np.array(NF4_CONSTANTS)[codes.numpy()], rtol=1e-6, atol=1e-6 * magnitude)
    # Half of the widest gap, which is the one down to -1.
    assert (np.abs(back - values.double().numpy()) <= absmax.double().numpy() * (1 - 0.6961928) / 2 * 1.0001).all()


def test_zero_stays_zero_and_the_largest_stays_what_it_is() -> None:
    values = torch.tensor([[0.0, 3.0, -0.0, 1.0], [0.0, -5.0, 0.0, 1.0]])
    back = nf4_values(nf4_codes(values, torch.tensor([[3.0], [5.0]])), torch.tensor([[3.0], [5.0]]))
    assert back[:, 0].tolist() == [0.0, 0.0] and back[0, 2] == 0
    assert back[0, 1] == 3.0 and back[1, 1] == -5.0


def test_values_beyond_the_scale_are_clipped() -> None:
    # A scale that was quantized may be a little below the block's largest magnitude.
    assert nf4_codes(torch.tensor([-1.02, 1.02]), torch.tensor([1.0])).tolist() == [0, 15]


# Scales.


def scales_back(absmax: Tensor) -> Tensor:
    return scale_values(*scale_codes(absmax))


@settings(max_examples=60)
@given(
    count=st.integers(1, 700),
    spread=st.sampled_from([0.0, 0.2, 1.0, 1.5]),
    magnitude=st.sampled_from([1e-30, 1.0, 1e30]),
    zeros=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_double_quantization_is_off_by_half_a_step_of_the_logarithm(
    count: int, spread: float, magnitude: float, zeros: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    absmax = (torch.randn(count, generator=generator) * spread).exp() * magnitude
    if zeros:
        absmax[torch.rand(count, generator=generator) < 0.3] = 0.0
    codes, offset, step = scale_codes(absmax)
    groups = -(-count // SCALE_BLOCK)
    assert codes.dtype == torch.uint8 and codes.shape == (count,)
    assert offset.shape == step.shape == (groups,)
    back = scale_values(codes, offset, step).double().numpy()
    exact = absmax.double().numpy()
    for start in range(0, count, SCALE_BLOCK):
        part, got = exact[start : start + SCALE_BLOCK], back[start : start + SCALE_BLOCK]
        logs = np.log(part[part > 0]) if (part > 0).any() else np.zeros(1)
        bound = np.exp(np.ptp(logs) / 255 / 2 + 4e-5) - 1
        assert (np.abs(got - part)[part > 0] <= part[part > 0] * bound).all()
        assert np.isfinite(got).all() and (got >= 0).all()


def test_scales_that_are_all_alike_are_exact() -> None:
    for value in (1e-30, 0.37, 1e30):
        assert torch.allclose(scales_back(torch.full((300,), value)), torch.full((300,), value), rtol=1e-5, atol=0)


@pytest.mark.parametrize("outlier", [1e3, 1e4])
def test_an_outlier_among_the_scales_costs_its_neighbours_little(outlier: float) -> None:
    absmax = 0.1 * (1 + torch.rand(600, generator=torch.Generator().manual_seed(0)))
    spoiled = absmax.clone()
    spoiled[100] = outlier
    error = (scales_back(spoiled) / spoiled - 1).abs()
    assert error.max() < 0.025
    assert torch.equal(scales_back(spoiled)[SCALE_BLOCK:], scales_back(absmax)[SCALE_BLOCK:])
    # What a step that is linear in the scale, as for 8-bit integers, would do to them.
    step = outlier / 255
    assert ((absmax / step).round() * step / absmax - 1).abs().max() > 0.9


@pytest.mark.parametrize("small", [1e-12, 1e-20, 1e-35])
def test_a_block_of_next_to_nothing_costs_its_neighbours_little(small: float) -> None:
    # As weight decay leaves the weights of a dead unit.
    absmax = 0.1 * (1 + torch.rand(256, generator=torch.Generator().manual_seed(0)))
    absmax[100] = small
    error = (scales_back(absmax) / absmax - 1).abs()
    error[100] = 0
    assert error.max() < 0.03
    assert 0 <= scales_back(absmax)[100] < 1e-3 * absmax.median()


def test_scales_of_some_rows_by_themselves() -> None:
    absmax = torch.rand(600) + 0.1
    codes, offset, step = scale_codes(absmax)
    index = torch.tensor([3, 255, 256, 599])
    some = scale_values(codes[index], offset[index // SCALE_BLOCK], step[index // SCALE_BLOCK])
    assert torch.equal(some, scales_back(absmax)[index])
