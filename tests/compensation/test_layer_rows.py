"""A layer as a matrix, against the layer itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_compress.compensation.layer_rows import (
    columns_of,
    count_rows,
    groups_of,
    matrix_of,
    output_rows_of,
    rows_of,
    weight_from,
)

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def by_matrix(layer: Any, x: Tensor, chosen: Tensor | None = None) -> Tensor:
    """What the rows and the matrix put out: ``(n, channels)``."""
    rows = rows_of(layer, x, chosen) @ matrix_of(layer).mT
    out = rows.transpose(0, 1).flatten(1)
    return out if layer.bias is None else out + layer.bias.detach()


def check(layer: Any, x: Tensor) -> None:
    with torch.no_grad():
        expected = output_rows_of(layer, layer(x))
    got = by_matrix(layer, x)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    count = count_rows(layer, x)
    assert count == len(expected)
    chosen = torch.randperm(count)[: max(1, count // 3)]
    torch.testing.assert_close(by_matrix(layer, x, chosen), expected[chosen], atol=1e-4, rtol=1e-4)
    matrix = matrix_of(layer)
    assert matrix.shape == (groups_of(layer), matrix.shape[1], columns_of(layer))
    assert torch.equal(weight_from(layer, matrix), layer.weight)


@st.composite
def convolutions(draw: Any, kinds: Any) -> tuple[Any, Tensor]:
    spatial, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3]))

    def sizes(least: int, most: int) -> Any:
        return tuple(draw(st.lists(st.integers(least, most), min_size=spatial, max_size=spatial)))

    stride, dilation, kernel = sizes(1, 3), sizes(1, 2), sizes(1, 3)
    shapes = {"stride": stride, "dilation": dilation, "groups": groups, "bias": draw(st.booleans())}
    if kinds is TRANSPOSED:
        padding = tuple(draw(st.integers(0, d * (k - 1) + 1)) for d, k in zip(dilation, kernel, strict=True))
        more = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
        shapes |= {"padding": padding, "output_padding": more}
    else:
        mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        shapes |= {"padding": sizes(0, 2), "padding_mode": mode}
    layer = kinds[spatial - 1](groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2)), kernel, **shapes)
    batch = draw(st.sampled_from([(), (1,), (2,)]))
    return layer, torch.randn(*batch, layer.in_channels, *sizes(4, 6))


def runs(layer: Any, x: Tensor) -> bool:
    try:
        return layer(x).numel() > 0
    except RuntimeError:  # a kernel that is wider than what it meets
        return False


@settings(max_examples=150, deadline=None)
@given(convolutions(CONVS))
def test_a_convolution_is_its_matrix_times_its_rows(pair: tuple[Any, Tensor]):
    assume(runs(*pair))
    check(*pair)


@settings(max_examples=150, deadline=None)
@given(convolutions(TRANSPOSED))
def test_so_is_a_transposed_one(pair: tuple[Any, Tensor]):
    assume(runs(*pair))
    check(*pair)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_so_is_a_linear_layer(shape: tuple[int, ...], bias: bool):
    torch.manual_seed(0)
    check(nn.Linear(5, 4, bias=bias), torch.randn(shape))


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_may_be_a_word(padding: str):
    torch.manual_seed(0)
    check(nn.Conv2d(2, 3, (5, 3), padding=padding, dilation=(1, 2)), torch.randn(2, 2, 9, 8))


def test_rows_are_float32_whatever_comes():
    layer = nn.Linear(4, 2).bfloat16()
    assert rows_of(layer, torch.randn(3, 4, dtype=torch.bfloat16)).dtype == torch.float32
