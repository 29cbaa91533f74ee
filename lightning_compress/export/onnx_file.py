"""Writes a program as an ONNX file, with its roundings as QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import torch

from lightning_compress.errors import CompressionError, in_a_line
from lightning_compress.export.kernels import with_kernels
from lightning_compress.export.lowering import in_plain_operators
from lightning_compress.export.program import Program
from lightning_compress.quantization.static.trace import quiet

OPSET = 21
_LARGEST = 2**31 - 2**20
"""Bytes of a file of Google's protocol buffers, which ONNX files are."""


def write_onnx(program: Program, path: Path) -> None:
    """Write a program.

    Raises:
        CompressionError: an operator has no translation, or the weights are too large for a file.
    """
    onnx: Any = importlib.import_module("onnx")
    graph = in_plain_operators(with_kernels(program.graph)).eval()
    size = sum(tensor.nbytes for tensor in graph.state_dict().values())
    if size > _LARGEST:
        raise CompressionError(
            f"`model` must have weights of less than 2 GB, the most that an ONNX file holds. Received: {size:,} bytes. "
            "Quantize it further, or write a .pt2 file."
        )
    try:
        with quiet(), torch.no_grad():
            written = torch.onnx.export(
                graph,
                program.example,
                dynamo=True,
                verbose=False,
                optimize=False,
                opset_version=OPSET,
                dynamic_shapes=program.dynamic_shapes,
                input_names=program.inputs,
                output_names=program.outputs,
            )
            assert written is not None
            importlib.import_module("onnxscript.optimizer").optimize_ir(written.model, should_fold=_is_of_no_codes)
    except Exception as error:
        raise _untranslatable(error) from error
    proto = written.model_proto
    _name_sizes_(proto, program)
    _forget_source_(proto)
    _separate_zero_points_(proto.graph)
    onnx.save(proto, str(path))


def _is_of_no_codes(node: Any) -> bool | None:
    """Keep what computes with stored codes from being folded: the codes would become floats in the file."""
    values = (value.const_value for value in node.inputs if value is not None)
    matrices = [value for value in values if value is not None and len(value.shape) > 1]
    return False if any(value.dtype.name in ("UINT8", "INT8") for value in matrices) else None


def _untranslatable(error: BaseException) -> CompressionError:
    causes, cause = [error], error.__cause__
    while cause is not None:
        causes.append(cause)
        cause = cause.__cause__
    text = " ".join(map(str, causes))
    operators = re.findall(r"(?:OpOverload\(op='|torch\.ops\.)([\w.]+)", text)
    what = f"its operator {operators[0]}" if operators else in_a_line(causes[-1])
    return CompressionError(
        f"`model` must be made of operators that ONNX has. Received: {what}, for which torch.onnx has no translation. "
        "Write it in other operations, or export the part without it."
    )


def _name_sizes_(proto: Any, program: Program) -> None:
    """Give dimensions that vary the names that the program has for them."""
    names = {}
    for entry, sizes in zip(proto.graph.input, program.sizes, strict=True):
        dimensions = entry.type.tensor_type.shape.dim
        names.update({dimensions[place].dim_param: name for place, name in sorted(sizes.items(), reverse=True)})
    values = (*proto.graph.input, *proto.graph.output, *proto.graph.value_info)
    for dimension in (dim for value in values for dim in value.type.tensor_type.shape.dim):
        if dimension.dim_param in names:
            dimension.dim_param = names[dimension.dim_param]


def _forget_source_(proto: Any) -> None:
    """Take out torch's notes on where a node comes from: lines and folders of whoever exported it."""
    graph = proto.graph
    for part in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer, graph, proto):
        del part.metadata_props[:]


def _separate_zero_points_(graph: Any) -> None:
    """Give each stored weight zero points of its own.

    Without VNNI onnxruntime stores weights anew as unsigned (``session.x64quantprecision``), and stops where two share
    their zero points.
    """
    stored = {initializer.name: initializer for initializer in graph.initializer}
    taken = set[str]()
    for number, node in enumerate(graph.node):
        if node.op_type != "DequantizeLinear" or len(node.input) < 3 or node.input[0] not in stored:
            continue
        name = node.input[2]
        if name in taken and name in stored:
            node.input[2] = f"{name}_of_{number}"
            graph.initializer.add().CopyFrom(stored[name])
            graph.initializer[-1].name = node.input[2]
        taken.add(name)
