"""What int8 modules compute when they leave the process."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress import (
    quantize,
)
from tests.quantization.static.flows.children import resized, uncompiled
from tests.quantization.test_quantize import agreement, batches
from tests.support.oracles import assert_same_state
from tests.support.zoo import row

# What leaves the process.

EXPORTED = ["mlp", "conv_bn_relu", "depthwise", "attention", "keyword_only", "dict"]


@functools.cache
def int8_of(name: str) -> tuple[tuple[Any, ...], dict[str, Any], nn.Module]:
    """A batch of the row, and what flow pt2e makes of its network; an export changes neither."""
    args, kwargs = row(name).inputs(0)
    with uncompiled():
        int8 = quantize(row(name).build().eval(), calibration=batches(row(name), 3), flow="pt2e").eval()
    return args, kwargs, int8


@pytest.mark.parametrize("name", EXPORTED)
def test_q10_an_export_computes_what_the_int8_module_does(name: str) -> None:
    args, kwargs, int8 = int8_of(name)
    with uncompiled():
        expected = int8(*args, **kwargs)
        exported = torch.export.export(int8, args, kwargs)
        got = exported.module()(*args, **kwargs)
    for a, b in zip(pytree.tree_leaves(expected), pytree.tree_leaves(got), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
    assert torch.int8 in {tensor.dtype for tensor in exported.state_dict.values()}  # not their float values
    assert not [
        name for name, tensor in exported.state_dict.items() if tensor.dtype == torch.float32 and tensor.dim() > 1
    ]


@pytest.mark.parametrize("name", ["conv_bn_relu", "attention", "keyword_only"])
def test_q17_onnxruntime_computes_what_the_int8_module_does(name: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    args, kwargs, int8 = int8_of(name)
    with uncompiled():
        expected = pytree.tree_leaves(int8(*args, **kwargs))
        torch.onnx.export(int8, args, tmp_path / "int8.onnx", kwargs=kwargs, dynamo=True, verbose=False)
    proto = onnx.load(tmp_path / "int8.onnx")
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in proto.graph.node}
    stored = {onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in proto.graph.initializer}
    assert "INT8" in stored
    session = runtime.InferenceSession(tmp_path / "int8.onnx", providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    values = [leaf.numpy() for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    outputs = session.run(None, dict(zip(names, values, strict=True)))
    for a, b in zip(expected, outputs, strict=True):
        torch.testing.assert_close(torch.from_numpy(b), a, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["conv_bn_relu", "attention"])
def test_compiled_by_inductor_it_computes_what_it_does_uncompiled(name: str, tmp_path: Path) -> None:
    torch._dynamo.reset()
    (args, kwargs), model = row(name).inputs(0), row(name).build().eval()
    int8 = quantize(model, calibration=batches(row(name), 3), flow="pt2e").eval()
    with uncompiled():
        expected = int8(*args, **kwargs)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        got = int8(*args, **kwargs)
    assert agreement(expected, got) > 0.999
    called = {event.key for event in profile.key_averages()}
    assert any("qconv" in one or "qlinear" in one for one in called), called
    for size in (1, 7):
        args, kwargs = resized(row(name).inputs(1), size)
        assert agreement(model(*args, **kwargs), int8(*args, **kwargs)) > 0.98
    with torch.inference_mode():
        assert agreement(model(*args, **kwargs), int8(*args, **kwargs)) > 0.98
    assert_same_state(quantize(model, calibration=batches(row(name), 3), flow="pt2e"), int8)
