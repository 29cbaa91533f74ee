"""Dynamic int8 and weights of few bits in ONNX files: the runtimes' own kernels compute what the model computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_compress import GPTQ, DynamicInt8, WeightOnly, quantize
from lightning_compress.export.export import ExportedModel, export
from lightning_compress.quantization.numerics.operators import DYNAMIC, PACKED
from tests.support.few_bits import rounded
from tests.support.onnx_sessions import open_session

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class Mixed(nn.Module):
    """Attention to itself and to another sequence, a layer that is called twice, and one without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.twice = nn.Linear(32, 32)
        self.head = nn.Linear(32, 7, bias=False)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = self.twice(self.twice(self.attention(x, x, x)[0]).tanh())
        return self.head(self.attention(x, memory, memory)[0])


def file_of(model: nn.Module, path: Path, target: str, **options: Any) -> tuple[ExportedModel, list[Any]]:
    """An exported model, with the operations in its file."""
    written = export(model, (torch.randn(3, 5, 32), torch.randn(3, 6, 32)), path / "model.onnx", target, **options)
    return written, list(onnx.load(written.path).graph.node)


def run(path: str, *tensors: Tensor) -> Tensor:
    session = open_session(path)
    names = [entry.name for entry in session.get_inputs()]
    return torch.from_numpy(session.run(None, dict(zip(names, map(Tensor.numpy, tensors), strict=True)))[0])


def test_a_dynamic_product_is_that_of_the_standards_rounding_and_of_integers() -> None:
    x, codes = torch.randn(2, 5, 24), torch.randint(-127, 128, (6, 24), dtype=torch.int8)
    scale, bias = torch.rand(6), torch.randn(6)
    low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    step = np.float32((high - low) / 255)
    zero = np.clip(np.rint(-low / step), 0, 255).astype(np.int64)
    integers = np.clip(np.rint(x.numpy() / step) + zero, 0, 255).astype(np.int64) - zero
    expected = integers @ codes.numpy().astype(np.int64).T * (step * scale.numpy()) + bias.numpy()
    torch.testing.assert_close(DYNAMIC(x, codes, scale, bias, True), torch.from_numpy(expected).float())
    torch.testing.assert_close(
        DYNAMIC(x, codes, scale, bias, False), nn.functional.linear(x, codes.float() * scale[:, None], bias)
    )


def test_a_packed_product_rounds_activations_by_blocks_if_at_all() -> None:
    x, codes = torch.randn(4, 40), torch.randint(16, (6, 40), dtype=torch.uint8)
    scale = torch.rand(6, 2)
    weight = (codes.float() - 8) * scale.repeat_interleave(20, 1)
    torch.testing.assert_close(PACKED(x, codes, scale, None, None, 4, 20, 0), x @ weight.T)
    steps = torch.cat(
        [x[:, place : place + 16].abs().amax(1, keepdim=True).expand(-1, 16) / 127 for place in (0, 16, 32)], 1
    )
    nearest = (x / steps[:, :40]).round() * steps[:, :40]
    torch.testing.assert_close(PACKED(x, codes, scale, None, None, 4, 20, 16), nearest @ weight.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("per_token", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_dynamic_layers_are_int8_products_in_onnxruntime(per_token: bool, tmp_path: Path) -> None:
    model = Mixed().eval()
    quantized = quantize(model, DynamicInt8(per_token=per_token))
    written, nodes = file_of(quantized, tmp_path, "onnxruntime")
    products = [node for node in nodes if node.op_type == "DynamicQuantizeMatMul"]
    assert len(products) == 9
    assert len({node.input[1] for node in products}) == 7  # of `twice` and `out_proj` once
    assert set(written.int8) >= {"attention.out_proj", "twice", "head"}
    assert written.facts["parity"]["difference"] < 0.02  # of what is allowed
    x, memory = torch.randn(2, 5, 32), torch.randn(2, 6, 32)
    with torch.no_grad():
        exact = model(x, memory)
    assert torch.cosine_similarity(run(written.path, x, memory).flatten(), exact.flatten(), dim=0) > 0.999


def test_dynamic_layers_are_exact_products_of_int8_weights_in_openvino(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    written, nodes = file_of(quantize(Mixed().eval(), "int8_dynamic"), tmp_path, "openvino")
    assert sum(node.op_type == "DynamicQuantizeMatMul" for node in nodes) == 9
    assert written.facts["parity"]["difference"] < 0.1
    assert 0.99 < written.facts["parity"]["own_cosine"] <= 1.0


SCHEMES = [
    WeightOnly(4, 32),
    pytest.param(WeightOnly(3, 16, symmetric=False), marks=pytest.mark.slow),
    pytest.param(WeightOnly(2), marks=pytest.mark.slow),
    pytest.param(GPTQ(4, 32, symmetric=False), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_weights_of_few_bits_are_multiplied_as_codes(scheme: Any, target: str, tmp_path: Path) -> None:
    pytest.importorskip(target)
    model, data = Mixed().eval(), [{"x": torch.randn(4, 5, 32), "memory": torch.randn(4, 6, 32)}]
    quantized = quantize(model, scheme, calibration=data if isinstance(scheme, GPTQ) else None)
    written, nodes = file_of(quantized, tmp_path, target)
    products = [node for node in nodes if node.op_type == "MatMulNBits"]
    assert len(products) == 8  # the scheme leaves `head`, the last layer, in float
    assert len({node.input[1] for node in products}) == 6
    assert written.facts["parity"]["difference"] < 0.1
    x, memory = torch.randn(2, 5, 32), torch.randn(2, 6, 32)
    with torch.no_grad():
        expected = rounded(model, quantized)(x, memory)
    torch.testing.assert_close(run(written.path, x, memory), expected, rtol=0.0, atol=0.02)


UNTAKEN = [WeightOnly(8), pytest.param(WeightOnly(4, 10), marks=pytest.mark.slow)]


@pytest.mark.parametrize("scheme", UNTAKEN, ids=str)
def test_weights_that_the_kernel_does_not_take_are_exact(scheme: WeightOnly, tmp_path: Path) -> None:
    model = Mixed().eval()
    quantized = quantize(model, scheme)
    written, nodes = file_of(quantized, tmp_path, "onnxruntime")
    assert all(node.op_type != "MatMulNBits" for node in nodes)
    x, memory = torch.randn(2, 5, 32), torch.randn(2, 6, 32)
    with torch.no_grad():
        torch.testing.assert_close(run(written.path, x, memory), rounded(model, quantized)(x, memory))


class Recurrent(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.rnn = nn.LSTM(12, 16, **options)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, (hidden, _) = self.rnn(x)
        return y, hidden


OPTIONS = [
    {"num_layers": 2, "bidirectional": True},
    pytest.param({"num_layers": 2, "bias": False}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_lstm_is_int8_in_onnxruntime_behind_its_first_layer_at_any_length(
    options: dict[str, Any], tmp_path: Path
) -> None:
    model = Recurrent(batch_first=True, **options).eval()
    quantized = quantize(model, "int8_dynamic")
    written = export(quantized, torch.randn(3, 5, 12), tmp_path / "model.onnx", dynamic={"x": [1]})
    kinds = [node.op_type for node in onnx.load(written.path).graph.node]
    assert kinds.count("DynamicQuantizeLSTM") == model.rnn.num_layers - 1 and kinds.count("LSTM") == 1
    assert written.facts["dequantized"] == ["rnn"]
    assert written.facts["parity"]["difference"] < 0.02
    x = torch.randn(4, 9, 12)
    with torch.no_grad():
        torch.testing.assert_close(run(written.path, x), model(x)[0], rtol=0.0, atol=0.02)


def test_outliers_in_a_sequence_leave_the_other_channels_their_steps(tmp_path: Path) -> None:
    model = Recurrent(batch_first=True).eval()
    x = torch.randn(3, 5, 12)
    x[..., 0] *= 200
    quantized = quantize(model, "int8_dynamic")
    written = export(quantized, x, tmp_path / "model.onnx")
    with torch.no_grad():
        torch.testing.assert_close(run(written.path, x), quantized(x)[0], rtol=0.0, atol=0.01)
