"""Dynamic int8 linear layers: exact sums on any CPU, and what one scale for all activations can't hold."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_compress import CompressionError, DynamicInt8, load_compressed, quantize, save_compressed
from lightning_compress.modules.routing import form_of, routed_modules
from lightning_compress.quantization.convert import rebuild_, record_of
from lightning_compress.quantization.layers import linear, schemes
from lightning_compress.quantization.numerics import int8
from tests.quantization.layers.layer_views import routed

ENGINES = [engine for engine in torch.backends.quantized.supported_engines if engine != "none"]


@contextmanager
def running(engine: str) -> Iterator[None]:
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    with running(request.param):
        yield request.param


def dynamic(weight: Tensor, bias: Tensor | None, reduce_range: bool, per_token: bool = False) -> Any:
    """A linear layer of these numbers, which computes dynamically."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    layer.weight = nn.Parameter(weight.detach())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach())
    return routed(layer, DynamicInt8(per_token, reduce_range))


def packed_codes(layer: Any) -> tuple[np.ndarray, np.ndarray]:
    """The integers and scales that the kernel itself holds."""
    weight: Any = form_of(layer).weights["weight"]  # type: ignore[union-attr]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weight, _ = torch.ops.quantized.linear_unpack(linear.packed_kernel(weight.codes, weight.scale, None))
    return weight.int_repr().numpy().astype(np.int64), weight.q_per_channel_scales().numpy()


def by_integers(x: Tensor, form: Any) -> Tensor:
    """The layer in int64, with the range of all activations in 255 steps."""
    codes, scales = packed_codes(form)
    low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    step = (high - low) / 255
    zero = round(-low / step)
    activations = np.clip(np.rint(x.double().numpy() / step) + zero, 0, 255).astype(np.int64) - zero
    product = torch.from_numpy((activations @ codes.T) * scales * step)
    return product if form.bias is None else product + form.bias


@settings(max_examples=25)
@given(
    columns=st.integers(1, 70),
    rows=st.integers(1, 20),
    batch=st.integers(1, 9),
    bias=st.booleans(),
    reduce_range=st.booleans(),
    seed=st.integers(0, 2**16),
)
@pytest.mark.parametrize("engine", ENGINES)
def test_sums_of_extreme_values_never_overflow(
    engine: str, columns: int, rows: int, batch: int, bias: bool, reduce_range: bool, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randint(0, 2, (rows, columns), generator=draw) * 2.0 - 1.0
    weight[0] = 1.0
    # Codes of 0 and 255 alone: the largest sums that there are.
    x = torch.randint(0, 2, (batch, columns), generator=draw) * 255.0
    x[0] = 255.0
    form = dynamic(weight, torch.randn(rows, generator=draw) if bias else None, reduce_range)
    with running(engine):
        got = form(x).double()
        torch.testing.assert_close(got, by_integers(x, form), rtol=1e-4, atol=1e-2)
    exact = x @ weight.T + (0.0 if form.bias is None else form.bias)  # 127 halves aren't 63 or 64 whole ones
    torch.testing.assert_close(got, exact.double(), rtol=0.02, atol=0.01 * 255 * columns)


def test_8_bit_codes_would_overflow_where_7_bits_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    form = dynamic(torch.ones(4, 64), None, reduce_range=False)
    monkeypatch.setattr(linear, "needs_reduced_range", lambda engine: False)
    overflows = form(torch.full((2, 64), 255.0))[0, 0].item() < 0.9 * 64 * 255
    assert not overflows or int8.needs_reduced_range()  # a convolution may overflow where this doesn't


@pytest.mark.parametrize(("reduced", "largest"), [(False, 127), (True, 64)])
def test_the_file_holds_8_bits_and_the_kernel_what_the_cpu_can_add(
    monkeypatch: pytest.MonkeyPatch, reduced: bool, largest: int
) -> None:
    form = dynamic(torch.randn(8, 32), None, reduce_range=False)
    codes_, scale_ = form.state_dict()["weight"], form.state_dict()["weight_scale"]
    assert codes_.abs().max() == 127
    monkeypatch.setattr(linear, "needs_reduced_range", lambda engine: reduced)
    codes, scales = packed_codes(form)
    assert np.abs(codes).max() == largest
    step = scale_[:, None].double().numpy() * (2 if reduced else 1)
    assert (np.abs(codes * scales[:, None] - form.weight.numpy()) <= 0.51 * step).all()


def test_7_bit_codes_are_the_same_on_every_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    form = dynamic(torch.randn(8, 32), None, reduce_range=True)
    found = []
    for reduced in (False, True):
        monkeypatch.setattr(linear, "needs_reduced_range", lambda engine, reduced=reduced: reduced)
        found.append(packed_codes(form)[0])
    assert (found[0] == found[1]).all() and (found[0] == form.state_dict()["weight"].numpy()).all()


@pytest.mark.parametrize("vnni", [False, True])
def test_a_file_with_8_bits_says_that_it_is_rounded_where_it_must_be(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, vnni: bool
) -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    save_compressed(quantize(model, DynamicInt8(reduce_range=False)), tmp_path / "eight.pt")
    monkeypatch.setattr(schemes, "needs_reduced_range", lambda *_: not vnni)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_compressed(tmp_path / "eight.pt", nn.Sequential(nn.Linear(8, 4)))
    said = [str(one.message) for one in caught if "rounded to 7 bits here" in str(one.message)]
    assert bool(said) == (not vnni)


def test_asks_the_kernel_where_the_cpu_says_that_it_has_vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    # As ONEDNN_MAX_CPU_ISA does it on a CPU with VNNI.
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    monkeypatch.setattr(int8, "_kernel_overflows", lambda engine: True)
    assert int8.needs_reduced_range() and not int8.needs_reduced_range("qnnpack")
    monkeypatch.setattr(int8, "_kernel_overflows", lambda engine: False)
    assert not int8.needs_reduced_range()


@pytest.mark.parametrize("engine", ENGINES)
def test_the_probe_of_a_kernel_leaves_the_engine_as_it_was(engine: str) -> None:
    before = torch.backends.quantized.engine
    overflows = int8._kernel_overflows.__wrapped__(engine)
    assert torch.backends.quantized.engine == before
    assert engine != "qnnpack" or not overflows


SHAPES = [(4, 7, 6), (3, 6), (6,), (0, 6), (2, 0, 6), (1, 1, 1, 6)]


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("engine", ENGINES, indirect=True)
def test_any_shape_and_dtype(engine: str, shape: tuple[int, ...], dtype: torch.dtype, per_token: bool) -> None:
    layer = nn.Linear(6, 5)
    form = dynamic(layer.weight, layer.bias, True, per_token)
    x = torch.randn(shape).to(dtype)
    got, expected = form(x), layer(x.float())
    assert got.dtype == dtype and got.shape == expected.shape
    assert (got.float() - expected).abs().sum() <= 0.05 * expected.numel()


@pytest.mark.parametrize("per_token", [False, True])
def test_inputs_that_are_not_contiguous_and_stay_as_they_are(per_token: bool) -> None:
    form = dynamic(torch.randn(5, 6), torch.randn(5), True, per_token)
    x = torch.randn(6, 8, 4).permute(2, 1, 0)
    before = x.clone()
    torch.testing.assert_close(form(x), form(x.contiguous()))
    torch.testing.assert_close(form(x[:, ::2]), form(x[:, ::2].contiguous()))
    assert torch.equal(x, before)


def test_a_single_column_and_constant_inputs() -> None:
    form = dynamic(torch.tensor([[2.0], [-3.0]]), torch.tensor([1.0, 1.0]), True)
    torch.testing.assert_close(
        form(torch.tensor([[1.0], [-4.0], [0.0]])),
        torch.tensor([[3.0, -2.0], [-7.0, 13.0], [1.0, 1.0]]),
        atol=0.1,
        rtol=0.0,
    )
    torch.testing.assert_close(form(torch.zeros(2, 1)), torch.ones(2, 2))
    torch.testing.assert_close(form(torch.full((2, 1), 5.0)), torch.tensor([[11.0, -14.0]] * 2), atol=0.1, rtol=0.0)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("engine", ENGINES, indirect=True)
def test_a_broken_value_breaks_its_row_and_no_other(engine: str, value: float, per_token: bool) -> None:
    # torch's kernel turns NaN into a number, and an infinity into NaN for all rows.
    layer = nn.Linear(6, 5)
    form = dynamic(layer.weight, layer.bias, True, per_token)
    x = torch.randn(4, 3, 6)
    expected = layer(x)
    x[1, 2, 3] = value
    got = form(x)
    assert got[1, 2].isnan().all()
    got[1, 2] = expected[1, 2]
    torch.testing.assert_close(got, expected, atol=0.1, rtol=0.0)


def test_packs_once_and_anew_for_other_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, other = (dynamic(torch.randn(4, 6), torch.randn(4), True) for _ in range(2))
    x = torch.randn(3, 6)
    packs: list[Any] = []
    pack = linear.packed_kernel
    monkeypatch.setattr(linear, "packed_kernel", lambda *args: packs.append(args) or pack(*args))
    first = layer(x)
    assert torch.equal(layer(x), first) and len(packs) == 1 and torch.equal(packs[0][2], layer.bias)
    with torch.inference_mode():
        assert torch.equal(layer(x), first)
    assert len(packs) == 1
    bias = layer.bias.detach().clone()
    layer.bias.data += 1.0  # where no version counts
    torch.testing.assert_close(layer(x), first + 1.0)
    layer.bias = nn.Parameter(torch.zeros(4))
    torch.testing.assert_close(layer(x), first - bias)
    stream = io.BytesIO()
    torch.save(other.state_dict(), stream)
    stream.seek(0)
    layer.load_state_dict(torch.load(stream, weights_only=True))
    assert torch.equal(layer(x), other(x)) and torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_per_token_is_checked_and_comes_back_from_a_file(tmp_path: Path) -> None:
    with pytest.raises(CompressionError, match="`per_token` must be true, false or none. Received: per_token='yes'"):
        DynamicInt8(per_token="yes")  # type: ignore[arg-type]
    model, x = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 4)), torch.randn(5, 8) * 10
    int8 = quantize(model, DynamicInt8(per_token=True), overrides={"2": "int8_dynamic"})
    assert [form.product.per_token for form in routed_modules(int8).values()] == [True, False]
    twin = copy.deepcopy(model)
    rebuild_(twin, record_of(int8) or {})
    twin.load_state_dict(int8.state_dict())
    assert torch.equal(twin(x), int8(x))
