"""Attention between projections against torch's own layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress import CompressionError
from lightning_compress.modules.attention import attend

CAUSAL = nn.Transformer.generate_square_subsequent_mask(3)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "without weights": {"need_weights": False},
    "weights by head": {"average_attn_weights": False},
    "padding": {"key_padding_mask": torch.tensor([[False, False, True], [False, False, False]])},
    "mask by head": {"attn_mask": torch.tensor([[[0, 1, 0], [1, 0, 1], [0, 0, 0]]] * 3 + [[[0, 0, 0]] * 3]).bool()},
    "causal": {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
    "causal with weights": {"attn_mask": CAUSAL, "is_causal": True},
    "both masks": {"attn_mask": CAUSAL.isinf(), "key_padding_mask": torch.tensor([[False, True, False]] * 2)},
}


def projected(layer: nn.MultiheadAttention, x: Tensor) -> list[Tensor]:
    return list(F.linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("batch_first", [True, False])
def test_computes_what_the_layer_computes(options: dict[str, Any], batch_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(4, 2, batch_first=batch_first)  # in training mode: no fused path
    x = torch.randn(2, 3, 4) if batch_first else torch.randn(3, 2, 4)
    expected, weights = layer(x, x, x, **options)
    attended, got = attend(projected(layer, x), 2, batch_first, **options)
    torch.testing.assert_close(layer.out_proj(attended), expected)
    assert (got is None) == (weights is None)
    if weights is not None:
        torch.testing.assert_close(got, weights)


def test_takes_a_sequence_without_a_batch_and_heads_of_any_width() -> None:
    layer, x = nn.MultiheadAttention(4, 2), torch.ones(3, 4)
    attended, weights = attend(projected(layer, x), 2, False)
    torch.testing.assert_close(layer.out_proj(attended), layer(x, x, x)[0])
    assert weights is not None and weights.shape == (3, 3)
    wide = torch.ones(1, 3, 10)
    assert attend([wide, wide, wide], 2, True)[0].shape == (1, 3, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"is_causal": True}, "be given where is_causal=True"),
        ({"attn_mask": torch.zeros(2, 2)}, r"have the shape \(3, 3\) or \(4, 3, 3\)"),
        ({"attn_mask": torch.zeros(3, 3, dtype=torch.int64)}, "be boolean or float"),
        ({"key_padding_mask": torch.zeros(1, 2)}, r"have the shape \(2, 3\)"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CompressionError, match=message):
        attend([torch.ones(2, 3, 4)] * 3, 2, True, **options)
