"""Dynamic int8 LSTM and GRU against torch's own layers with the same rounded weights."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

from lightning_compress.errors import CompressionError
from lightning_compress.quantization.layers.schemes import DynamicInt8
from tests.quantization.layers.layer_views import routed

SCHEME = DynamicInt8(reduce_range=True)  # that of any CPU

STEP = 2 / 127
"""The quantization step of states in (-1, 1) with 7 bits; with the small weights here outputs move by less."""

BOTH = pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])


def rounded(layer: Any) -> Any:
    """The same layer in float with weights that int8 can hold: the oracle."""
    twin = copy.deepcopy(layer).eval()
    with torch.no_grad():
        for name, weight in twin.named_parameters():
            if name.startswith("weight"):
                scale = weight.abs().amax(dim=1, keepdim=True) / 127
                weight.copy_(torch.round(weight / scale) * scale)
    return twin


def flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, PackedSequence):
        return [result.data]
    return [tensor for part in result for tensor in flat(part)]


def assert_near(result: Any, expected: Any, tolerance: float = STEP) -> None:
    got, want = flat(result), flat(expected)
    assert [tensor.shape for tensor in got] == [tensor.shape for tensor in want]
    assert [tensor.dtype for tensor in got] == [tensor.dtype for tensor in want]
    for tensor, other in zip(got, want, strict=True):
        assert (tensor - other).abs().max() <= tolerance


def assert_same(result: Any, expected: Any) -> None:
    for tensor, other in zip(flat(result), flat(expected), strict=True):
        assert torch.equal(tensor, other)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def states(layer: Any, *batch: int) -> Any:
    shape = (layer.num_layers * (1 + layer.bidirectional), *batch, layer.hidden_size)
    return (torch.rand(shape) * 2 - 1, torch.randn(shape)) if isinstance(layer, nn.LSTM) else torch.rand(shape) * 2 - 1


@BOTH
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_computes_what_the_float_layer_with_rounded_weights_does(
    kind: Any, num_layers: int, bidirectional: bool, batch_first: bool, bias: bool
) -> None:
    layer = kind(5, 12, num_layers, bias=bias, batch_first=batch_first, bidirectional=bidirectional)
    layer.dropout = 0.5  # left out in evaluation; set here, as the constructor warns where there is one layer
    dynamic, oracle = routed(layer, SCHEME), rounded(layer)
    x = torch.randn(3, 7, 5) if batch_first else torch.randn(7, 3, 5)
    for args in [(x,), (x, states(layer, 3)), (x[0],), (x[0], states(layer))]:
        assert_near(dynamic(*args), oracle(*args))
    assert type(dynamic(x)[1]) is type(oracle(x)[1])
    assert not torch.equal(dynamic(x)[0], oracle(x)[0])  # else it would be float


@BOTH
@pytest.mark.parametrize("bidirectional", [False, True])
@torch.no_grad()
def test_packed_sequences_come_back_packed(kind: Any, bidirectional: bool) -> None:
    layer = kind(5, 12, 2, bidirectional=bidirectional)
    dynamic, oracle = routed(layer, SCHEME), rounded(layer)
    sequences = [torch.randn(length, 5) for length in (2, 6, 4)]
    ordered = sorted(sequences, key=len, reverse=True)
    padded = pack_padded_sequence(nn.utils.rnn.pad_sequence(sequences), torch.tensor([2, 6, 4]), enforce_sorted=False)
    for packed in (padded, pack_sequence(ordered)):
        for args in [(packed,), (packed, states(layer, 3))]:
            result, expected = dynamic(*args), oracle(*args)
            assert_near(result, expected)
            assert isinstance(result[0], PackedSequence)
            for field, other in zip(result[0][1:], expected[0][1:], strict=True):
                assert (field is None and other is None) or torch.equal(field, other)


@BOTH
@torch.no_grad()
def test_an_outlier_channel_costs_the_others_nothing(kind: Any) -> None:
    layer = kind(64, 64, bidirectional=True)
    x = torch.randn(20, 8, 64)
    x[..., 3] *= 50
    # One scale for the whole input gives 0.98.
    assert cosine(routed(layer, SCHEME)(x)[0], layer(x)[0]) > 0.9995


@BOTH
@pytest.mark.parametrize("engine", [e for e in torch.backends.quantized.supported_engines if e != "none"])
@pytest.mark.filterwarnings("ignore:Currently, qnnpack incorrectly ignores reduce_range")
@torch.no_grad()
def test_runs_on_any_engine(kind: Any, engine: str) -> None:
    layer = kind(16, 24, 2)
    dynamic, x = routed(layer, SCHEME), torch.randn(9, 4, 16)
    before = torch.backends.quantized.engine
    try:
        torch.backends.quantized.engine = engine
        assert cosine(dynamic(x)[0], layer(x)[0]) > 0.99
    finally:
        torch.backends.quantized.engine = before


@BOTH
@torch.no_grad()
def test_a_fresh_layer_and_the_state_dict_give_the_same_bits(kind: Any) -> None:
    layer, x = kind(5, 12, 2, bidirectional=True), torch.randn(7, 3, 5)
    dynamic, fresh = (routed(each, SCHEME) for each in (layer, kind(5, 12, 2, bidirectional=True)))
    expected = dynamic(x)
    assert not torch.equal(fresh(x)[0], expected[0])  # and it has packed the weights that now go
    stream = io.BytesIO()
    torch.save(dynamic.state_dict(), stream)
    stream.seek(0)
    fresh.load_state_dict(torch.load(stream, weights_only=True))
    assert_same(fresh(x), expected)


@BOTH
@torch.no_grad()
def test_copies_and_pickles_after_use(kind: Any) -> None:
    dynamic, x = routed(kind(5, 12), SCHEME), torch.randn(7, 3, 5)
    expected = dynamic(x)
    for twin in (copy.deepcopy(dynamic), pickle.loads(pickle.dumps(dynamic))):
        assert_same(twin(x), expected)


@BOTH
def test_holds_int8_weights_in_place_of_the_floats(kind: Any) -> None:
    for bias in (False, True):
        layer = kind(50, 64, 2, bidirectional=True, bias=bias)
        before = copy.deepcopy(layer.state_dict())
        dynamic = routed(layer, SCHEME)
        assert [name for name, _ in dynamic.named_parameters()] == [name for name, _ in layer.named_parameters()]
        assert all(parameter.dtype == torch.int8 for parameter in dynamic.parameters() if parameter.dim() > 1)
        size, float_size = (sum(t.nbytes for t in m.state_dict().values()) for m in (dynamic, layer))
        assert size < 0.3 * float_size
        assert_same(list(layer.state_dict().values()), list(before.values()))


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_moves_as_the_float_layer_does(kind: Any, dtype: torch.dtype) -> None:
    dynamic, x = routed(kind(5, 12), SCHEME), torch.randn(7, 3, 5)
    moved = copy.deepcopy(dynamic).to(dtype)
    assert moved.weight_hh_l0.dtype == moved.bias_hh_l0.dtype == moved(x.to(dtype))[0].dtype == dtype
    torch.testing.assert_close(moved(x.to(dtype))[0].float(), dynamic(x)[0], rtol=0.0, atol=0.05)
    assert dynamic.to("meta")(x.to("meta"))[0].device.type == "meta"


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_keeps_the_dtype_and_the_random_state_in_inference_mode(kind: Any, dtype: torch.dtype) -> None:
    layer = kind(5, 12, 2).to(dtype)
    x, hx = torch.randn(7, 3, 5), states(layer, 3)
    narrow = tuple(t.to(dtype) for t in hx) if isinstance(hx, tuple) else hx.to(dtype)
    before = torch.get_rng_state()
    with torch.inference_mode():
        dynamic = routed(layer, SCHEME)
        expected = layer(x.to(dtype), narrow)
        assert_near(dynamic(x.to(dtype), narrow), expected, 2 * STEP)
    assert torch.equal(torch.get_rng_state(), before)
    # What was packed in inference mode serves outside of it.
    assert flat(dynamic(x.to(dtype)))[0].dtype == dtype


@BOTH
def test_initial_states_of_another_shape_are_refused(kind: Any) -> None:
    layer = kind(5, 12, 2)
    dynamic, x = routed(layer, SCHEME), torch.randn(7, 3, 5)
    lstm = kind is nn.LSTM
    wrong = [states(layer, 1), states(layer), torch.zeros(2, 3, 12) if lstm else torch.zeros(1, 3, 12)]
    for hx in wrong:
        with pytest.raises(CompressionError, match=r"`hx` must hold [12] of shape \(2, 3, 12\)"):
            dynamic(x, hx)
