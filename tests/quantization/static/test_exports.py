"""What int8 modules compute when they leave the process."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress import StaticInt8, quantize
from lightning_compress.quantization.numerics.int8 import needs_reduced_range
from lightning_compress.quantization.static.int8_layer import Int8Layer
from tests.quantization.test_quantize import batches
from tests.support.oracles import assert_same_state
from tests.support.zoo import row

SCHEME = StaticInt8(reduce_range=needs_reduced_range())
EXPORTED = ["mlp", "conv_bn_relu", "residual", "depthwise", "attention", "weight_norm"]
KEYWORDS = ["keyword_only", "dict"]  # to bind these calls, dynamo warns of a cache


@functools.cache
def int8_of(name: str) -> tuple[tuple[Any, ...], dict[str, Any], nn.Module]:
    """A batch of the row, and its network in int8, whose sums overflow on no CPU; an export changes neither."""
    args, kwargs = row(name).inputs(0)
    return args, kwargs, quantize(row(name).build().eval(), SCHEME, calibration=batches(row(name), 3)).eval()


def assert_close(expected: Any, got: Any, tolerance: float = 1e-3) -> None:
    pairs = list(zip(pytree.tree_leaves(expected), pytree.tree_leaves(got), strict=True))
    assert pairs
    for a, b in pairs:
        torch.testing.assert_close(torch.as_tensor(b), a, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("name", "strict"), [*[(name, False) for name in EXPORTED + KEYWORDS], *[(name, True) for name in EXPORTED]]
)
def test_q10_an_export_computes_what_the_int8_module_does(name: str, strict: bool) -> None:
    args, kwargs, int8 = int8_of(name)
    exported = torch.export.export(int8, args, kwargs, strict=strict)
    assert_close(int8(*args, **kwargs), exported.module()(*args, **kwargs))
    assert torch.int8 in {tensor.dtype for tensor in (*exported.state_dict.values(), *exported.constants.values())}
    if name != "weight_norm":  # else not their float values
        floats = {key for key, tensor in exported.state_dict.items() if tensor.dtype == torch.float32}
        assert not [key for key in floats if exported.state_dict[key].dim() > 1]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kernels", [True, False])
def test_after_an_export_the_module_computes_as_before(
    strict: bool, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernels:  # as on a CPU on which they are wrong
        monkeypatch.setattr(Int8Layer, "wrong", lambda layer: "they overflow")
    args, _, int8 = int8_of("conv_bn_relu")
    for fresh in (copy.deepcopy(int8), quantize(row("conv_bn_relu").build(), calibration=[args])):
        before, state = fresh(*args), copy.deepcopy(fresh.state_dict())
        torch.export.export(fresh, args, strict=strict)
        assert torch.equal(fresh(*args), before)
        assert_same_state(state, fresh.state_dict())
        assert torch.equal(copy.deepcopy(fresh)(*args), before)


@pytest.mark.parametrize("name", ["conv_bn_relu", "attention", "keyword_only"])
def test_q17_onnxruntime_computes_what_the_int8_module_does(name: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    args, kwargs, int8 = int8_of(name)
    torch.onnx.export(int8, args, tmp_path / "int8.onnx", kwargs=kwargs, dynamo=True, verbose=False)
    proto = onnx.load(tmp_path / "int8.onnx")
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in proto.graph.node}
    stored = {onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in proto.graph.initializer}
    assert "INT8" in stored
    session = runtime.InferenceSession(tmp_path / "int8.onnx", providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    values = [leaf.numpy() for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    outputs = session.run(None, dict(zip(names, values, strict=True)))
    assert_close(pytree.tree_leaves(int8(*args, **kwargs)), outputs, 2e-3)


def run_optimized(int8: nn.Module, x: Tensor, folder: Path) -> tuple[Counter[str], Tensor]:
    """Count the operators that onnxruntime makes of a file, whose matrices must be in int8, and run them."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    torch.onnx.export(int8, (x,), folder / "int8.onnx", dynamo=True, verbose=False)
    stored = [tensor.data_type for tensor in onnx.load(folder / "int8.onnx").graph.initializer if len(tensor.dims) > 1]
    assert set(stored) == {onnx.TensorProto.INT8}
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath, options.log_severity_level = str(folder / "run.onnx"), 3
    session = runtime.InferenceSession(folder / "int8.onnx", options, providers=["CPUExecutionProvider"])
    kinds = Counter(node.op_type for node in onnx.load(folder / "run.onnx").graph.node)
    return kinds, torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def assert_in_steps(int8: nn.Module, x: Tensor, got: Tensor) -> None:
    """What a code that lay between two moves is less than a step of the outputs' own range in 8 bits."""
    expected = torch.export.export(int8, (x,)).module()(x)
    assert (got - expected).abs().max() < (expected.max() - expected.min()) / 255


def test_onnxruntime_runs_a_residual_block_that_is_quantized_by_default_in_int8(tmp_path: Path) -> None:
    (x,), _, int8 = int8_of("residual")
    kinds, got = run_optimized(int8, x, tmp_path)
    assert kinds["QLinearConv"] == 3 and kinds["QLinearAdd"] == 1 and not kinds.keys() & {"Conv", "FusedConv", "Add"}
    assert_in_steps(int8, x, got)


def test_onnxruntime_runs_linear_layers_in_int8(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 32, bias=False), nn.ReLU(), nn.Linear(32, 4, bias=False))
    x = torch.randn(8, 16)
    int8 = quantize(model.eval(), SCHEME, calibration=[x])
    kinds, got = run_optimized(int8, x, tmp_path)
    assert kinds["QGemm"] == 2 and "Gemm" not in kinds
    assert_in_steps(int8, x, got)
