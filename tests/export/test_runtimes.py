"""What runtimes compute in int8, read from their own graphs."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress import StaticInt8, export, quantize
from lightning_compress.errors import CompressionError
from lightning_compress.export.lowering import int8_layers
from lightning_compress.export.onnx_file import write_onnx
from lightning_compress.export.runtimes import RUNTIMES, readers_of_codes
from lightning_compress.quantization.numerics.int8 import needs_reduced_range
from tests.export.networks import Residual, Words, program_for

NETWORKS = pytest.mark.parametrize("kind", [Residual, Words])


@NETWORKS
def test_every_quantized_layer_is_int8_in_onnxruntime(kind: type[nn.Module], tmp_path: Path) -> None:
    program, path = program_for(kind, "onnxruntime"), tmp_path / "model.onnx"
    write_onnx(program, path)
    layers = int8_layers(program.graph)
    assert len(list(readers_of_codes(onnx.load(path).graph, set(layers.values())))) == len(layers) == 4
    floats = RUNTIMES["onnxruntime"].float_layers(path, set(layers.values()))
    # A transposed weight that two products of larger tensors read is dequantized once, for both.
    assert floats.keys() == ({"twice.weight"} if kind is Words else set())


@NETWORKS
def test_every_quantized_layer_is_int8_in_openvino(kind: type[nn.Module], tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    program, path = program_for(kind, "openvino"), tmp_path / "model.onnx"
    write_onnx(program, path)
    assert RUNTIMES["openvino"].float_layers(path, set(int8_layers(program.graph).values())) == {}


@pytest.mark.parametrize("vnni", [True, False])
def test_weights_are_unsigned_in_onnxruntime_only_where_vnni_is_missing(
    vnni: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its kernels of unsigned weights don't overflow, and take twice the time where those of signed ones are right too.
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    program, path = program_for(Residual, "onnxruntime"), tmp_path / "model.onnx"
    write_onnx(program, path)
    RUNTIMES["onnxruntime"]._open(path, "extended", None, str(tmp_path / "optimized.onnx"))
    stored = onnx.load(tmp_path / "optimized.onnx").graph.initializer
    unsigned = [array for array in stored if array.data_type == onnx.TensorProto.UINT8 and len(array.dims) > 1]
    assert bool(unsigned) == (not vnni)


def test_a_convolution_whose_output_stays_float_is_float_in_onnxruntime_and_said(tmp_path: Path) -> None:
    program, path = program_for(Residual, "tensorrt"), tmp_path / "model.onnx"  # which rounds no outputs
    write_onnx(program, path)
    reasons = RUNTIMES["onnxruntime"].float_layers(path, set(int8_layers(program.graph).values()))
    assert reasons["stem.weight"] == "onnxruntime's int8 convolutions give codes, and its output stays float"


def test_what_openvino_is_told_to_leave_float_is_said(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    program, path = program_for(Words, "openvino"), tmp_path / "model.onnx"
    write_onnx(program, path)
    model = onnx.load(path)
    rounding = next(node for node in model.graph.node if node.op_type == "QuantizeLinear")
    back = next(node for node in model.graph.node if rounding.output[0] in node.input)
    for node in model.graph.node:  # the first layer reads the value itself
        node.input[:] = [rounding.input[0] if name == back.output[0] else name for name in node.input]
    onnx.save(model, path)
    reasons = RUNTIMES["openvino"].float_layers(path, set(int8_layers(program.graph).values()))
    assert list(reasons) == ["twice.weight"] and reasons["twice.weight"].startswith("OpenVINO computes it in")


class Padded(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode
        self.first, self.second = nn.Conv2d(3, 16, 3, stride=2), nn.Conv2d(16, 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.first(x).relu(), 2)
        return self.second(F.pad(x, (1, 2, 2, 0), mode=self.mode)).relu().mean((2, 3))


@pytest.mark.parametrize("mode", ["constant", pytest.param("reflect", marks=pytest.mark.slow)])
def test_paddings_of_a_models_own_are_int8_in_openvino(mode: str, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    torch.manual_seed(0)
    x = torch.randn(4, 3, 25, 25) + 1  # so that 0 isn't the middle of the codes
    scheme = StaticInt8(target="openvino", reduce_range=needs_reduced_range())
    int8 = quantize(Padded(mode).eval(), scheme, calibration=[x])
    exported = export(int8, x, tmp_path / "model.onnx", "openvino")
    assert (exported.int8, exported.float_layers) == (("first", "second"), {})
    pads = [node for node in onnx.load(exported.path).graph.node if node.op_type == "Pad"]
    assert bool(pads) is (mode == "reflect")


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_what_a_runtime_rejects_it_tells_nothing_of(name: str, tmp_path: Path) -> None:
    pytest.importorskip(name)
    (path := tmp_path / "model.onnx").write_bytes(b"nothing")
    with pytest.raises(CompressionError, match=rf"must be a file that {name} runs. Received: model.onnx, "):
        RUNTIMES[name].float_layers(path, {"layer.weight"})
