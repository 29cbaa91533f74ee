"""Dynamic int8 attention against `nn.MultiheadAttention` with the same rounded weights."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.errors import CompressionError
from lightning_compress.quantization.layers.attention import why_not
from lightning_compress.quantization.layers.schemes import DynamicInt8
from tests.quantization.layers.layer_views import routed

SCHEME = DynamicInt8(reduce_range=True)  # that of any CPU

STEP = 2 / 127
"""The quantization step of 7 bits, relative to the largest of a row; errors of 16 channels go far to cancel out."""

BATCH, LENGTH, KEYS, WIDTH, HEADS = 3, 5, 7, 16, 4

WEIGHTS = pytest.mark.parametrize(
    "weights", [{"need_weights": False}, {}, {"average_attn_weights": False}], ids=["none", "mean", "by_head"]
)


def attention(**options: Any) -> nn.MultiheadAttention:
    layer = nn.MultiheadAttention(WIDTH, HEADS, **options).eval()
    with torch.no_grad():
        for bias in (layer.in_proj_bias, layer.out_proj.bias):
            if bias is not None:
                bias.normal_()  # torch starts with zeros, which would hide a bias that is left out
    return layer


def rounded(layer: nn.MultiheadAttention) -> nn.MultiheadAttention:
    """The same layer in float with weights that int8 can hold: the oracle. Call it with gradients on.

    (Without, torch takes its fused path, which treats queries without keys in yet another way.)
    """
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        for name, weight in twin.named_parameters():
            if "weight" in name:
                scale = weight.abs().amax(dim=1, keepdim=True) / 127
                weight.copy_(torch.round(weight / scale) * scale)
    return twin


def inputs(kind: str, batch_first: bool, kdim: int = WIDTH, vdim: int = WIDTH) -> tuple[Tensor, Tensor, Tensor]:
    def made(length: int, width: int) -> Tensor:
        return torch.randn(BATCH, length, width) if batch_first else torch.randn(length, BATCH, width)

    query = made(LENGTH, WIDTH)
    if kind == "self":
        return query, query, query
    if kind == "own_value":
        return query, query, made(LENGTH, WIDTH)
    key = made(KEYS, kdim)
    return query, key, key if kind == "memory" else made(KEYS, vdim)


def assert_near(result: Any, expected: Any) -> None:
    for got, want in zip(result, expected, strict=True):
        assert (got is None) == (want is None)
        if got is None:
            continue
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        assert torch.equal(got.isnan(), want.isnan())
        error = (got - want).abs().nan_to_num()
        assert error.max() <= 2 * STEP * want.abs().nan_to_num().max()


@WEIGHTS
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["self", "own_value", "memory", "cross"])
def test_computes_what_the_float_layer_with_rounded_weights_does(
    weights: dict[str, bool], batch_first: bool, bias: bool, kind: str
) -> None:
    layer = attention(batch_first=batch_first, bias=bias, dropout=0.5)
    dynamic, oracle = routed(layer, SCHEME), rounded(layer)
    args = inputs(kind, batch_first)
    result, expected = dynamic(*args, **weights), oracle(*args, **weights)
    assert_near(result, expected)
    assert not torch.equal(result[0], expected[0])  # else it would be float


@WEIGHTS
@pytest.mark.parametrize("kind, kdim, vdim", [("cross", 6, 10), ("cross", WIDTH, 10), ("memory", 6, 6)])
@pytest.mark.parametrize("bias", [False, True])
def test_keys_and_values_of_other_sizes(weights: dict[str, bool], kind: str, kdim: int, vdim: int, bias: bool) -> None:
    layer = attention(kdim=kdim, vdim=vdim, batch_first=True, bias=bias)
    args = inputs(kind, True, kdim, vdim)
    assert_near(routed(layer, SCHEME)(*args, **weights), rounded(layer)(*args, **weights))


def masks(length: int, keys: int) -> dict[str, dict[str, Tensor]]:
    plane = torch.rand(length, keys) < 0.4
    plane[:, 0] = False
    deep = torch.rand(BATCH * HEADS, length, keys) < 0.4
    deep[..., 0] = False
    padding = torch.arange(keys) >= torch.tensor([[keys], [2], [4]])
    float_padding = torch.zeros(padding.shape).masked_fill(padding, -torch.inf)
    return {
        "plane": {"attn_mask": plane},
        "float_plane": {"attn_mask": torch.randn(length, keys) * 3},
        "deep": {"attn_mask": deep},
        "float_deep": {"attn_mask": torch.randn(BATCH * HEADS, length, keys) * 3},
        "padding": {"key_padding_mask": padding},
        "float_padding": {"key_padding_mask": torch.randn(BATCH, keys) * 3},
        "plane_padding": {"attn_mask": plane, "key_padding_mask": padding},
        "float_deep_padding": {
            "attn_mask": torch.randn(BATCH * HEADS, length, keys),
            "key_padding_mask": float_padding,
        },
        "queries_without_keys": {"attn_mask": torch.arange(length)[:, None].expand(length, keys) == 1},
        "samples_without_keys": {"key_padding_mask": (torch.arange(BATCH) == 1)[:, None].expand(BATCH, keys)},
    }


@WEIGHTS
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", ["self", "cross"])
@pytest.mark.parametrize("name", list(masks(1, 1)))
def test_masks_mean_what_they_mean_to_torch(weights: dict[str, bool], batch_first: bool, kind: str, name: str) -> None:
    layer = attention(batch_first=batch_first)
    mask = masks(LENGTH, LENGTH if kind == "self" else KEYS)[name]
    args = inputs(kind, batch_first)
    dynamic, oracle = routed(layer, SCHEME), rounded(layer)
    result = dynamic(*args, **mask, **weights)
    assert_near(result, oracle(*args, **mask, **weights))
    assert not torch.allclose(result[0], dynamic(*args, **weights)[0], atol=0.02)  # the mask matters


@WEIGHTS
@pytest.mark.parametrize("padded", [False, True])
def test_the_causal_hint_counts_where_torch_lets_it(weights: dict[str, bool], padded: bool) -> None:
    layer = attention(batch_first=True)
    args = inputs("self", True)
    # A wrong hint: torch believes it only where nothing else is to be masked or shown.
    options: dict[str, Any] = {"attn_mask": torch.zeros(LENGTH, LENGTH), "is_causal": True}
    if padded:
        options["key_padding_mask"] = torch.zeros(BATCH, LENGTH).masked_fill(torch.arange(LENGTH) == 3, -torch.inf)
    dynamic = routed(layer, SCHEME)
    result = dynamic(*args, **options, **weights)
    assert_near(result, rounded(layer)(*args, **options, **weights))
    hinted, plain = result[0], dynamic(*args, **{**options, "is_causal": False}, **weights)[0]
    assert torch.allclose(hinted, plain) == (padded or weights != {"need_weights": False})
    causal = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    assert_near(
        dynamic(*args, **{**options, "attn_mask": causal}, **weights),
        rounded(layer)(*args, **{**options, "attn_mask": causal}, **weights),
    )


@WEIGHTS
@pytest.mark.parametrize("batch_first", [False, True])
def test_unbatched(weights: dict[str, bool], batch_first: bool) -> None:
    layer = attention(batch_first=batch_first)
    dynamic, oracle = routed(layer, SCHEME), rounded(layer)
    query, key = torch.randn(LENGTH, WIDTH), torch.randn(KEYS, WIDTH)
    masked = {
        "key_padding_mask": torch.arange(KEYS) > 4,
        "attn_mask": torch.rand(HEADS, LENGTH, KEYS) > 1.0 * (torch.arange(KEYS) > 0),
    }
    masked["attn_mask"][..., 0] = False
    for args, mask in [((query, query, query), {}), ((query, key, key), {}), ((query, key, key), masked)]:
        assert_near(dynamic(*args, **mask, **weights), oracle(*args, **mask, **weights))


def test_self_and_cross_attention_use_the_same_numbers() -> None:
    dynamic = routed(attention(), SCHEME)
    x = torch.randn(LENGTH, BATCH, WIDTH)
    assert torch.equal(dynamic(x, x, x)[0], dynamic(x, x.clone(), x.clone())[0])


@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 10}], ids=["packed", "apart"])
@torch.no_grad()
def test_a_fresh_layer_and_the_state_dict_give_the_same_bits(options: dict[str, int]) -> None:
    dynamic, fresh = (routed(attention(**options), SCHEME) for _ in range(2))
    calls = [inputs("cross", False, **options)] + ([] if options else [inputs("self", False)])
    unused_size = len(pickle.dumps(dynamic))
    expected = [dynamic(*args) for args in calls]
    for args, (output, _) in zip(calls, expected, strict=True):
        assert not torch.equal(fresh(*args)[0], output)  # and it has packed the weights that now go
    stream = io.BytesIO()
    torch.save(dynamic.state_dict(), stream)
    stream.seek(0)
    fresh.load_state_dict(torch.load(stream, weights_only=True))
    assert len(pickle.dumps(dynamic)) == unused_size
    for twin in (fresh, copy.deepcopy(dynamic), pickle.loads(pickle.dumps(dynamic))):
        for args, results in zip(calls, expected, strict=True):
            assert all(torch.equal(got, want) for got, want in zip(twin(*args), results, strict=True))


@pytest.mark.parametrize("options", [{}, {"kdim": 60, "vdim": 100}, {"bias": False}])
def test_holds_int8_weights_in_place_of_the_floats(options: dict[str, Any]) -> None:
    layer = nn.MultiheadAttention(64, 4, **options)
    before = copy.deepcopy(layer.state_dict())
    dynamic = routed(layer, SCHEME)
    assert [name for name, _ in dynamic.named_parameters()] == [name for name, _ in layer.named_parameters()]
    assert all(parameter.dtype == torch.int8 for parameter in dynamic.parameters() if parameter.dim() > 1)
    dynamic(torch.randn(5, 64), torch.randn(5, options.get("kdim", 64)), torch.randn(5, options.get("vdim", 64)))
    size, float_size = (sum(t.nbytes for t in m.state_dict().values()) for m in (dynamic, layer))
    assert size < 0.3 * float_size
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_moves_as_the_float_layer_does(dtype: torch.dtype) -> None:
    dynamic, x = routed(attention(), SCHEME), torch.randn(LENGTH, BATCH, WIDTH)
    moved, args = copy.deepcopy(dynamic).to(dtype), (x.to(dtype),) * 3
    assert moved.in_proj_weight.dtype == moved.out_proj.bias.dtype == moved(*args)[0].dtype == dtype
    torch.testing.assert_close(moved(*args)[0].float(), dynamic(x, x, x)[0], rtol=0.0, atol=0.05)
    assert dynamic.to("meta")(*(x.to("meta"),) * 3)[0].device.type == "meta"


@WEIGHTS
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["self", "cross"])
def test_keeps_the_dtype_and_the_random_state_in_inference_mode(
    weights: dict[str, bool], dtype: torch.dtype, kind: str
) -> None:
    layer = attention(dropout=0.5).to(dtype)
    args = [x.to(dtype) for x in inputs(kind, False)]
    if kind == "self":
        args = args[:1] * 3  # to() has made three of one
    mask = torch.randn(LENGTH, len(args[1]), dtype=dtype)
    before = torch.get_rng_state()
    with torch.inference_mode():
        dynamic = routed(layer, SCHEME)
        result, shown = dynamic(*args, attn_mask=mask, **weights)
    assert torch.equal(torch.get_rng_state(), before)
    assert_near((result, shown), layer(*args, attn_mask=mask, **weights))
    # What was packed in inference mode serves outside of it.
    assert dynamic(*args, **weights)[0].dtype == dtype


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_says_why_a_layer_stays_float(options: dict[str, bool]) -> None:
    assert "no keys of its own" in why_not(nn.MultiheadAttention(WIDTH, HEADS, **options))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"is_causal": True}, "`attn_mask` must be given where is_causal=True"),
        ({"attn_mask": torch.zeros(1, KEYS)}, r"`attn_mask` must have the shape \(5, 7\) or \(12, 5, 7\)"),
        ({"key_padding_mask": torch.zeros(KEYS, BATCH)}, r"`key_padding_mask` must have the shape \(3, 7\)"),
        ({"attn_mask": torch.zeros(LENGTH, KEYS, dtype=torch.int64)}, "`attn_mask` must be boolean or float"),
    ],
)
def test_calls_that_torch_refuses_are_refused(options: dict[str, Any], message: str) -> None:
    layer, args = attention(), inputs("cross", False)
    with pytest.raises((RuntimeError, AssertionError)):
        layer(*args, **options)
    with pytest.raises(CompressionError, match=message):
        routed(layer, SCHEME)(*args, **options)
