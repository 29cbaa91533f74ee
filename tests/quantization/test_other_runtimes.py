"""Weights of few bits in files of `torch.onnx`, `torch.export` and `torch.jit`: they compute the same there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import NF4, WeightOnly, quantize
from lightning_compress.quantization.layers.schemes import Packed
from tests.support.few_bits import rounded
from tests.support.onnx_sessions import open_session


class Mixed(nn.Module):
    """A layer of each kind, among them one that torch's 4-bit kernel takes."""

    def __init__(self) -> None:
        super().__init__()
        self.ids = nn.Embedding(11, 20)
        self.conv = nn.Conv1d(20, 32, 3, padding=1, groups=4)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.kernel = nn.Linear(32, 64)
        self.head = nn.Linear(64, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.ids(ids).transpose(1, 2)).relu().transpose(1, 2)
        return self.head(self.kernel(self.attention(x, x, x)[0]).tanh())


NARROW = {"ids": WeightOnly(2, 7), "conv": WeightOnly(3, 5), "attention": WeightOnly(5), "head": WeightOnly(4, 8)}
WIDE = {"ids": WeightOnly(8), "conv": NF4(6), "attention": WeightOnly(6, 9), "head": WeightOnly(7)}
SHIFTED = {path: WeightOnly(one.bits, one.group_size, symmetric=False) for path, one in NARROW.items()}
MIXES: dict[str, dict[str, Packed]] = {
    "narrow": {**NARROW, "kernel": WeightOnly(4, 32)},
    "wide": {**WIDE, "kernel": WeightOnly(8, symmetric=False)},
    "with zero points": {**SHIFTED, "kernel": WeightOnly(4, 32, symmetric=False)},
}


def onnx_file(model: nn.Module, ids: Tensor, path: Path, **options: Any) -> Any:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.onnx.export(model, (ids,), path, verbose=False, **options)
    session = open_session(path)
    return lambda x: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def openvino_file(model: nn.Module, ids: Tensor, path: Path) -> Any:
    openvino = pytest.importorskip("openvino")
    onnx_file(model, ids, path, dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},))
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    compiled = openvino.Core().compile_model(str(path), "CPU", exact)
    return lambda x: torch.from_numpy(compiled([x.numpy()])[0])


def exported(model: nn.Module, ids: Tensor, path: Path) -> Any:
    torch.export.save(torch.export.export(model, (ids,), dynamic_shapes=({0: torch.export.Dim("batch")},)), path)
    return torch.export.load(path).module()


def traced(model: nn.Module, ids: Tensor, path: Path) -> Any:
    torch.jit.trace(model, ids).save(str(path))
    return torch.jit.load(str(path))


WAYS = {
    "onnx": lambda *args: onnx_file(*args, dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},)),
    "onnx by tracing": lambda *args: onnx_file(
        *args, dynamo=False, input_names=["ids"], dynamic_axes={"ids": {0: "batch"}}
    ),
    "openvino": openvino_file,
    "torch.export": exported,
    "torch.jit": traced,
}


SLOW = pytest.mark.slow
CASES = [
    # Few bits in OpenVINO: tests/export/test_kernels.py.
    *(pytest.param(way, "with zero points", True, marks=[SLOW] * (way == "openvino")) for way in WAYS),
    *(pytest.param(way, mix, False, marks=SLOW) for way in WAYS for mix in MIXES),
]


@pytest.mark.parametrize(("way", "mix", "used"), CASES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:Constant folding:UserWarning")  # of torch's exporter, which leaves slices unfolded
def test_another_runtime_computes_with_the_weights_that_are_stored(
    way: str, mix: str, used: bool, tmp_path: Path
) -> None:
    model, ids = Mixed().eval(), torch.randint(11, (3, 6))
    quantized = quantize(model, "int8_weight_only", overrides=MIXES[mix]).eval()
    stored = rounded(model, quantized)
    if used:
        quantized(ids[:1, :2])  # the kernel has its codes in another order from now on
    run = WAYS[way](quantized, ids, tmp_path / "file.onnx")
    for size in (3, 1, 8):
        ids = torch.randint(11, (size, 6))
        with torch.no_grad():
            torch.testing.assert_close(run(ids), stored(ids), rtol=1e-4, atol=1e-5)
