"""Layers in int8 weights and in dynamic int8; layers that share weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_compress import (
    DynamicInt8,
    quantize,
)
from lightning_compress.quantization.convert import record_of
from lightning_compress.quantization.numerics.int8 import needs_reduced_range
from tests.quantization.layers.layer_views import DYNAMIC, WEIGHT_ONLY, count, rounded, schemes
from tests.quantization.test_quantize import agreement
from tests.support.oracles import assert_same_state, snapshot
from tests.support.zoo import row

# Weights alone.

LAYERS: dict[str, Any] = {"1d": nn.Conv1d, "2d": nn.Conv2d, "3d": nn.Conv3d}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")  # torch's own
@settings(max_examples=60)
@given(
    kind=st.sampled_from(sorted(LAYERS)),
    groups=st.sampled_from([1, 2, 4]),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    padding=st.sampled_from([0, 1, "same"]),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    bias=st.booleans(),
    spread=st.sampled_from([0.0, 4.0]),
    seed=st.integers(0, 2**16),
)
def test_weight_only_convolutions_round_to_half_a_step_and_compute_the_rest_as_they_did(
    kind: str,
    groups: int,
    kernel: int,
    stride: int,
    dilation: int,
    padding: Any,
    mode: str,
    bias: bool,
    spread: float,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    if padding == "same":
        stride = 1
    layer = LAYERS[kind](
        4, 8, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups, bias=bias, padding_mode=mode
    )
    with torch.no_grad():  # channels of very different ranges, one of them dead
        layer.weight *= (torch.randn(8) * spread).exp().view(-1, *[1] * (layer.weight.dim() - 1))
        layer.weight[3] = 0
    model = nn.Sequential(layer)
    int8 = quantize(model, WEIGHT_ONLY)
    assert count(int8, "PackedConv") == 1
    values, scale = rounded(int8[0])
    assert (scale.flatten() <= layer.weight.detach().abs().flatten(1).amax(1) / 127 * (1 + 2**-7) + 1e-37).all()
    assert ((values - layer.weight.flatten(1)).abs() <= scale * (0.5 + 1e-5)).all()
    assert not values[3].any()
    # The same float layer around the rounded weights.
    expected = copy.deepcopy(layer)
    with torch.no_grad():
        expected.weight.copy_(values.view_as(layer.weight))
    x = torch.randn(3, 4, *[6] * int(kind[0]))
    torch.testing.assert_close(int8(x), expected(x), rtol=1e-4, atol=1e-5)


@settings(max_examples=30)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    bias=st.booleans(),
    batch=st.sampled_from([(5,), (0,), (), (2, 3)]),
    seed=st.integers(0, 2**16),
)
@pytest.mark.parametrize("scheme", [WEIGHT_ONLY, DYNAMIC])
def test_linear_weights_round_to_half_a_step_in_any_shape(
    scheme: str, shape: tuple[int, int], bias: bool, batch: tuple[int, ...], seed: int
) -> None:
    torch.manual_seed(seed)
    layer = nn.Linear(*shape, bias=bias)
    int8 = quantize(nn.Sequential(layer), scheme)
    assert count(int8, {WEIGHT_ONLY: "PackedLinear", DYNAMIC: "DynamicLinear"}[scheme]) == 1
    values, scale = rounded(int8[0])
    codes = 63 if scheme == DYNAMIC and needs_reduced_range() else 127
    assert (scale <= layer.weight.detach().abs().amax(1, keepdim=True) / codes * (1 + 2**-7)).all()
    assert ((values - layer.weight).abs() <= scale * (0.5 + 1e-4)).all()
    x = torch.randn(*batch, shape[0])
    expected, got = F.linear(x, values, layer.bias), int8(x)
    assert got.shape == expected.shape and got.dtype == expected.dtype
    if x.numel() == 0:
        return
    # Activations to half a step of their range, and half a step more as zero is one of the codes.
    steps = {WEIGHT_ONLY: 1e5, DYNAMIC: 255}[scheme]
    bound = (x.amax().clamp_min(0) - x.amin().clamp_max(0)) / steps * values.abs().sum(1) + 1e-5
    assert ((got - expected).abs() <= bound).all()


def test_weight_only_takes_half_precision_inputs() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    int8, x = quantize(model, WEIGHT_ONLY), torch.randn(2, 3, 8, 8)
    got = int8(x.bfloat16())
    assert got.dtype == torch.bfloat16
    assert agreement(model(x), got) > 0.99


@pytest.mark.parametrize("scheme", [WEIGHT_ONLY, DYNAMIC])
def test_int8_layers_move_as_float_ones_do(scheme: str) -> None:
    # Q11, Q15.
    int8, x = quantize(row("mlp").build().eval(), scheme), torch.randn(6, 16)
    expected = int8(x)
    half = int8.half()(x.half())
    assert half.dtype == torch.float16 and agreement(expected, half.float()) > 0.99
    assert int8.to("meta")(x.to("meta")).device.type == "meta"


# Dynamic.


def outlier_transformer() -> nn.Module:
    """Four layers whose LayerNorms blow up a few channels, as those of large language models do."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, dim_feedforward=256, dropout=0.0, batch_first=True, norm_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), nn.Linear(64, 32)).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight[[3, 17, 40]] *= 40
    return model


def test_dynamic_keeps_a_deep_transformer_with_outlier_channels() -> None:
    model, x = outlier_transformer(), torch.randn(8, 20, 64)
    int8 = quantize(model, DYNAMIC, calibration=[x]).eval()
    with torch.no_grad():
        expected, got = model(x), int8(x)
    assert F.cosine_similarity(expected.flatten(), got.flatten(), dim=0) >= 0.99
    assert count(int8, "DynamicAttention") == 4 and count(int8, "DynamicLinear") == 4 * 3 + 1
    assert not [
        module
        for module in int8.modules()
        if type(module) is nn.Linear and module._parameters.get("weight") is not None
    ]


class Padded(nn.Module):
    def __init__(self, nested: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=mask))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")  # the float model's own path
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("scheme", [DYNAMIC, WEIGHT_ONLY, "int8_static"])
def test_q2_an_encoder_with_a_padding_mask(scheme: str, nested: bool) -> None:
    torch.manual_seed(0)
    model, x = Padded(nested).eval(), torch.randn(4, 6, 16)
    mask = torch.arange(6) >= torch.tensor([6, 4, 2, 1])[:, None]
    int8 = quantize(model, scheme, calibration=[{"x": x, "mask": mask}]).eval()
    with torch.no_grad():
        expected, got = model(x, mask), int8(x, mask=mask)
        assert got.shape == expected.shape
        assert F.cosine_similarity(expected[~mask].flatten(), got[~mask].flatten(), dim=0) > 0.99
        # What stands in the padding doesn't matter, but that it shares its call's scale.
        other = int8(x.masked_fill(mask[..., None], 0.5), mask)
        tolerance = {"rtol": 0.0, "atol": 0.05} if scheme == DYNAMIC else {}
        torch.testing.assert_close(other[~mask], got[~mask], **tolerance)
        none = torch.zeros_like(mask)
        assert agreement(model(x, none), int8(x, none)) > 0.98


def test_dynamic_takes_an_empty_batch_and_a_single_row() -> None:
    model = row("mlp").build().eval()
    int8, x = quantize(model, DYNAMIC).eval(), torch.randn(6, 16)
    assert int8(x[:0]).shape == (0, 4)
    assert int8(x[:0].reshape(3, 0, 16)).shape == (3, 0, 4)
    assert int8(x[0]).shape == (4,)
    for one in x:
        assert agreement(model(one), int8(one)) > 0.99
    assert torch.equal(int8(torch.zeros(3, 16)), int8(torch.zeros(1, 16)).expand(3, 4))


@pytest.mark.parametrize("value", [1e30, -1e30, 1e-30, 1e-42])
def test_dynamic_rows_of_any_magnitude_leave_the_others_alone_with_a_scale_for_each(value: float) -> None:
    model, x = nn.Sequential(nn.Linear(32, 8, bias=False)), torch.randn(6, 32)
    int8 = quantize(model, DynamicInt8(per_token=True))
    other = x.clone()
    other[2] = value * x[2].abs()
    got = int8(other)
    assert got.isfinite().all()
    keep = [0, 1, 3, 4, 5]
    assert agreement(model(x)[keep], got[keep]) > 0.99


@pytest.mark.parametrize("value", [3e38, 1e30, 1e-3, 1e-6, 1e-30])
@pytest.mark.parametrize("per_token", [False, True])
def test_dynamic_takes_activations_of_any_magnitude(value: float, per_token: bool) -> None:
    # The kernel's own scale of activations overflows above, and doesn't go below 6e-5.
    model, x = nn.Sequential(nn.Linear(32, 8, bias=False)), (torch.rand(6, 32) * 2 - 1)
    with torch.no_grad():
        model[0].weight *= 0.1
    x[0, :2] = torch.tensor([-1.0, 1.0])
    got = quantize(model, DynamicInt8(per_token=per_token))(x * value)
    assert agreement(model(x), got.double() / value) > 0.999


@pytest.mark.parametrize("at", [0, 2, 5])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_dynamic_rows_that_are_not_finite_leave_the_others_alone(value: float, at: int) -> None:
    # Attention gives NaN for a query that may attend to nothing; the float layer behind it passes that row on.
    model, x = nn.Sequential(nn.Linear(32, 8)), torch.randn(6, 32)
    int8 = quantize(model, DYNAMIC)
    other = x.clone()
    other[at] = value
    got = int8(other)
    assert not got[at].isfinite().any()
    keep = [index for index in range(6) if index != at]
    assert agreement(model(x)[keep], got[keep]) > 0.99


def test_dynamic_one_infinite_value_makes_no_finite_or_wrongly_signed_output() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 8)), torch.randn(6, 32)
    x[2, 3] = -torch.inf
    got, expected = quantize(model, DYNAMIC)(x)[2], model(x)[2]
    assert (got.isnan() | (got == expected)).all()


# Shared and tied.


@pytest.mark.parametrize("scheme", [DYNAMIC, WEIGHT_ONLY])
def test_a_shared_module_is_quantized_once(scheme: str) -> None:
    model = row("shared").build().eval()
    int8, x = quantize(model, scheme).eval(), torch.randn(8, 16)
    assert set(schemes(int8)) == {"first", "head"}
    assert int8.first is int8.again
    assert agreement(model(x), int8(x)) > 0.99


@pytest.mark.parametrize("scheme", [DYNAMIC, WEIGHT_ONLY])
def test_two_layers_of_one_weight_hold_the_same_int8_weight(scheme: str) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16, bias=False))
    model[2].weight = model[0].weight
    before = snapshot(model)
    int8, x = quantize(model, scheme).eval(), torch.randn(8, 16)
    assert agreement(model(x), int8(x)) > 0.99
    assert int8[0]._parameters["weight"] is int8[2]._parameters["weight"]
    assert_same_state(before, model)
    assert model[2].weight is model[0].weight


@pytest.mark.parametrize("scheme", [DYNAMIC, WEIGHT_ONLY])
def test_embeddings_and_what_is_tied_to_them_stay_float(scheme: str) -> None:
    model, (ids,) = row("tied").build().eval(), row("tied").inputs()[0]
    int8 = quantize(model, scheme, calibration=[(ids,)]).eval()
    assert set(schemes(int8)) == {"body"}
    floats = (record_of(int8) or {})["floats"]
    assert floats["lm_head"] == "its weight is tied to `embedding`, which stays float"
    assert "embedding" in floats["embedding"].lower()
    assert int8.lm_head.weight is int8.embedding.weight
    assert agreement(model(ids), int8(ids)) > 0.98


def test_a_shared_layer_that_is_overridden_inside_a_traced_unit() -> None:
    model = row("shared").build().eval()
    x = torch.randn(32, 16)
    int8 = quantize(model, calibration=[x], overrides={"first": WEIGHT_ONLY}).eval()
    assert schemes(int8) == {"first": WEIGHT_ONLY}
    assert agreement(model(x), int8(x)) > 0.99
