"""TensorRT's rules, in files that keep them and in files that break each one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from torch import nn

from lightning_compress.export.onnx_file import write_onnx
from lightning_compress.export.tensorrt_rules import tensorrt_faults
from tests.export.networks import Residual, Words, program_for


@pytest.fixture(scope="module")
def residual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tensorrt") / "residual.onnx"
    write_onnx(program_for(Residual, "tensorrt"), path)
    return path


@pytest.mark.parametrize("kind", [Residual, Words])
def test_what_is_quantized_for_tensorrt_keeps_its_rules(kind: type[nn.Module], tmp_path: Path) -> None:
    write_onnx(program_for(kind, "tensorrt"), tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert sum(node.op_type == "QuantizeLinear" for node in graph.node) >= 3
    assert tensorrt_faults(tmp_path / "model.onnx") == []


def test_what_is_quantized_for_onnxruntime_breaks_them(tmp_path: Path) -> None:
    write_onnx(program_for(Residual, "onnxruntime"), tmp_path / "model.onnx")
    faults = " ".join(tensorrt_faults(tmp_path / "model.onnx"))
    assert "codes of uint8" in faults and "codes of int32" in faults and "zero point other than 0" in faults


def first(graph: Any, kind: str) -> Any:
    return next(node for node in graph.node if node.op_type == kind)


def replace_stored(graph: Any, name: str, array: np.ndarray) -> None:
    [place] = [place for place, tensor in enumerate(graph.initializer) if tensor.name == name]
    graph.initializer[place].CopyFrom(numpy_helper.from_array(array, name))


def shift_zero(graph: Any) -> None:
    replace_stored(graph, first(graph, "QuantizeLinear").input[2], np.array(3, dtype=np.int8))


def drop_zero(graph: Any) -> None:
    del first(graph, "QuantizeLinear").input[2]


def negate_scale(graph: Any) -> None:
    replace_stored(graph, first(graph, "QuantizeLinear").input[1], np.array(-0.1, dtype=np.float32))


def store_float(graph: Any) -> None:
    conv = first(graph, "Conv")
    [stored] = [node for node in graph.node if conv.input[1] in node.output]
    graph.initializer.append(numpy_helper.from_array(np.ones((8, 3, 3, 3), np.float32), "float"))
    graph.node.remove(stored)
    conv.input[1] = "float"


def leave_branch_float(graph: Any) -> None:
    add = first(graph, "Add")
    makers = {name: node for node in graph.node for name in node.output}
    [place] = [place for place, name in enumerate(add.input) if makers[name].op_type == "DequantizeLinear"]
    add.input[place] = makers[makers[add.input[place]].input[0]].input[0]


def round_end(graph: Any) -> None:
    head, rounding = first(graph, "Gemm"), first(graph, "QuantizeLinear")
    graph.node.append(onnx.helper.make_node("QuantizeLinear", [head.output[0], *rounding.input[1:]], ["end"], "end"))


@pytest.mark.parametrize(
    ("break_", "says"),
    [
        (shift_zero, "zero point other than 0"),
        (drop_zero, "codes of uint8"),
        (negate_scale, "constant and positive"),
        (store_float, "stored as float"),
        (leave_branch_float, "the branch isn't rounded"),
        (round_end, "`end` rounds what no int8 layer reads"),
    ],
)
def test_each_rule_that_is_broken_is_said(
    break_: Callable[[Any], None], says: str, residual: Path, tmp_path: Path
) -> None:
    model = onnx.load(residual)
    break_(model.graph)
    onnx.save(model, tmp_path / "broken.onnx")
    faults = tensorrt_faults(tmp_path / "broken.onnx")
    assert faults and any(says in fault for fault in faults), faults
