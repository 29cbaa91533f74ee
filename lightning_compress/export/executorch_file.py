"""Writes a program as a file for ExecuTorch (`.pte`), with XNNPACK's kernels."""

from __future__ import annotations

import importlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim
from torch.fx import GraphModule, Node

from lightning_compress.errors import CompressionError, in_a_line
from lightning_compress.export.lowering import int8_layers
from lightning_compress.export.program import BATCH, Program
from lightning_compress.export.recurrent import in_torchs_
from lightning_compress.quantization.numerics.operators import ROUNDED, STORED
from lightning_compress.quantization.static.graphs import aten, copy_graph, value_read
from lightning_compress.quantization.static.trace import quiet

MAX_BATCH = 32


@dataclass(frozen=True)
class Lowered:
    """What a file for ExecuTorch holds, which can't be asked of it.

    Attributes:
        max_batch: the most samples of a call, for which its memory is planned; None where their number is fixed.
        float_layers: quantized layers that XNNPACK doesn't compute in int8, by their codes, each with the reason.
        outside: what XNNPACK doesn't take at all, and ExecuTorch's portable kernels compute.
    """

    max_batch: int | None
    float_layers: dict[str, str]
    outside: tuple[str, ...]


@torch.no_grad()
def write_executorch(program: Program, path: Path, max_batch: int = MAX_BATCH) -> Lowered:
    """Write a program for ExecuTorch; what is rounded for it is int8 there.

    Memory is planned for the largest call: of ``max_batch`` samples, or of as many as the example has if these are
    more. Other dimensions that vary are no larger than in the example.

    Raises:
        CompressionError: ExecuTorch can't lower an operator.
    """
    exir: Any = importlib.import_module("executorch.exir")
    partitioner: Any = importlib.import_module("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    importlib.import_module("executorch.kernels.quantized")  # the roundings that XNNPACK leaves
    layers = Counter(int8_layers(program.graph).values())
    graph = copy_graph(program.graph)
    in_torchs_(graph)
    in_codes_of_torch_(graph)
    name_strides_(graph)
    program = _largest_call(program, max_batch)
    largest = tuple(
        {place: Dim.DYNAMIC(max=tensor.shape[place]) for place in sizes}
        for tensor, sizes in zip(program.example, program.sizes, strict=True)
    )
    try:
        with quiet():
            exported = torch.export.export(graph, program.example, dynamic_shapes=largest)
            edge = exir.to_edge_transform_and_lower(exported, partitioner=[partitioner.XnnpackPartitioner()])
            lowered = edge.exported_program().graph_module
            outside, floats = sorted(_outside(lowered)), _float_layers(lowered, layers)
            buffer = edge.to_executorch().buffer
    except Exception as error:
        raise _unlowered(error) from error
    path.write_bytes(buffer)
    batches = [x.shape[0] for x, sizes in zip(program.example, program.sizes, strict=True) if sizes.get(0) == BATCH]
    return Lowered(max(batches, default=None), floats, tuple(outside))


def in_codes_of_torch_(graph: GraphModule) -> None:
    """Write stored weights and roundings in torch's operators for codes; XNNPACK wants one for each reader."""
    nodes, ops = graph.graph, torch.ops.quantized_decomposed
    for node in nodes.find_nodes(op="call_function", target=STORED):
        codes, scale = node.args
        graph.register_buffer(f"{node.name}_zeros", torch.zeros(len(value_read(graph, scale)), dtype=torch.int64))
        with nodes.inserting_before(node):
            zeros = nodes.get_attr(f"{node.name}_zeros")
        _read_again(node, ops.dequantize_per_channel.default, (codes, scale, zeros, 0, -128, 127, torch.int8))
    for node in nodes.find_nodes(op="call_function", target=ROUNDED):
        x, *affine = node.args
        rounding: list[Any] = [*affine, torch.int8]
        with nodes.inserting_before(node):
            codes = nodes.call_function(ops.quantize_per_tensor.default, (x, *rounding))
        _read_again(node, ops.dequantize_per_tensor.default, (codes, *rounding))
    graph.recompile()


def _read_again(node: Node, operator: Any, arguments: tuple[Any, ...]) -> None:
    """Put calls of an operator in the place of a node, one for each user."""
    for user in list(node.users):
        with node.graph.inserting_before(user):
            user.replace_input_with(node, node.graph.call_function(operator, arguments))
    node.graph.erase_node(node)


def name_strides_(graph: GraphModule) -> None:
    """Write out the strides of pools that are those of their kernels: XNNPACK reads them."""
    for node in graph.graph.find_nodes(op="call_function", target=aten.max_pool2d.default):
        if len(node.args) == 2 or not node.args[2]:
            node.args = (*node.args[:2], node.args[1], *node.args[3:])
    graph.recompile()


def _largest_call(program: Program, max_batch: int) -> Program:
    """Return the program with as many samples in its example as a call may have.

    Tracing narrows the sizes that it has seen no example of, as where a kernel is chosen by them, and ExecuTorch plans
    its memory for the largest that is left.
    """
    example = []
    for tensor, sizes in zip(program.example, program.sizes, strict=True):
        if sizes.get(0) == BATCH and len(tensor) < max_batch:
            tensor = tensor[torch.arange(max_batch) % len(tensor)]
        example.append(tensor)
    return replace(program, example=tuple(example))


def _outside(graph: GraphModule) -> set[str]:
    """Name what no delegate computes."""
    calls = {_operator(node) for node in graph.graph.nodes if node.op == "call_function"}
    return calls - {"getitem", "executorch_call_delegate", "sym_size.int"}


def _float_layers(graph: GraphModule, layers: Counter[str]) -> dict[str, str]:
    """Say why layers of these codes, so many of each, aren't int8 in the delegates of a lowered graph."""
    parts = [module.original_module for module in graph.modules() if hasattr(module, "original_module")]
    taken = [(node, codes) for part in parts for node, codes in _readers_of_codes(part)]
    int8 = Counter(codes for node, codes in taken if _is_int8(node))
    there = Counter(codes for _, codes in taken)
    reasons = (
        "XNNPACK has no kernel for it",
        "XNNPACK's int8 kernels give codes, and its output isn't rounded: quantize for target='executorch'",
    )
    return {codes: reasons[there[codes] >= count] for codes, count in layers.items() if int8[codes] < count}


def _readers_of_codes(part: Any) -> Iterator[tuple[Node, str]]:
    """Yield the operations of a delegate that take a stored weight, each with the name of its codes."""
    signature = part.graph_signature
    stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    for node in part.graph.nodes:
        weight = node.args[1] if len(node.args) > 1 else None
        if isinstance(weight, Node) and "dequantize_per_channel" in _operator(weight):
            yield node, stored[weight.args[0].name]  # type: ignore[union-attr]


def _is_int8(node: Node) -> bool:
    """Tell whether a layer reads codes and gives some, as XNNPACK's int8 kernels do, with an activation in between."""
    if "dequantize_per_tensor" not in _operator(node.args[0]):
        return False
    while len(node.users) == 1 and _operator(user := next(iter(node.users))) in _ACTIVATIONS:
        node = user
    return all(_operator(user).startswith("quantized_decomposed.quantize_per_tensor") for user in node.users)


_ACTIVATIONS = ("aten.relu.default", "aten.hardtanh.default", "aten.clamp.default")


def _operator(node: Any) -> str:
    """Name what a node calls, such as ``aten.mean.dim``."""
    return str(getattr(getattr(node, "target", ""), "__name__", ""))


def _unlowered(error: Exception) -> CompressionError:
    """Name the operator that ExecuTorch has no kernel for, or the size that it fixes."""
    if "Constraints violated" in str(error):
        return CompressionError(
            "`dynamic` must name sizes that ExecuTorch leaves open. Received: one that it fixes, as the length of what "
            "a recurrent layer reads, which it computes step after step. Export it for this size alone."
        )
    found = re.search(r"\b(?:aten|torchvision|lightning_compress)(?:::|\.)[\w.]+", str(error))
    what = f"its operator {found[0].replace('::', '.')}" if found else in_a_line(error)
    return CompressionError(
        f"`model` must be made of operators that ExecuTorch has. Received: {what}, which it can't lower. Write it in "
        "other operations, or export the part without it."
    )
