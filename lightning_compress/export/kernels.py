"""Whole layers as operators of ONNX: the standard's, and those of onnxruntime, which OpenVINO reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from lightning_compress.export.recurrent import TORCHS, layers, stored_layers
from lightning_compress.quantization.numerics.nbits import kernel_codes
from lightning_compress.quantization.numerics.operators import DYNAMIC, LSTM, PACKED
from lightning_compress.quantization.static.graphs import copy_graph, evaluate


def dynamic(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Any:
    """Multiply with int8 codes ``(columns, rows)``."""
    return _own("DynamicQuantizeMatMul", (x, codes, scale, None, bias), {}, (*x.shape[:-1], codes.shape[1]))


def packed(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, attributes: dict[str, Any]
) -> Any:
    """Multiply with codes of few bits; see `kernel_codes`."""
    return _own("MatMulNBits", (x, codes, scale, zero, None, bias), attributes, (*x.shape[:-1], attributes["N"]))


def lstm(x: Tensor, codes: Sequence[Tensor], scales: Sequence[Tensor], bias: Tensor, h: Tensor, c: Tensor) -> Any:
    """Compute a layer with int8 codes of input and state, ``(directions, columns, 4 * hidden_size)``."""
    zeros = [torch.zeros(scale.shape, dtype=torch.int8) for scale in scales]
    (directions, batch, size), steps = h.shape, x.shape[0]
    y, *last = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::DynamicQuantizeLSTM",
        (x, *codes, bias, None, h, c, None, scales[0], zeros[0], scales[1], zeros[1]),
        {"hidden_size": size, "direction": ("forward", "bidirectional")[directions - 1]},
        dtypes=(torch.float32,) * 3,
        shapes=((steps, directions, batch, size), h.shape, h.shape),
        version=1,
    )
    return (y.permute(0, 2, 1, 3).flatten(2), *last)


def _own(name: str, inputs: Any, attributes: dict[str, Any], shape: Any) -> Any:
    kind = f"com.microsoft::{name}"
    return torch.onnx.ops.symbolic(kind, inputs, attributes, dtype=torch.float32, shape=shape, version=1)


KERNELS: dict[Any, Callable[..., Any]] = {
    **{DYNAMIC: dynamic, PACKED: packed, LSTM: lstm},
    **dict.fromkeys(TORCHS, layers),
}


def owners(graph: GraphModule) -> dict[Node, str]:
    """Return the calls of such kernels, with the name of the first one of the same weights."""
    first: dict[str, str] = {}
    calls = [node for node in graph.graph.nodes if node.target in KERNELS]
    weights = {node: node.args[2] if node.target in TORCHS else node.args[1:3] for node in calls}
    return {node: first.setdefault(_formula(weights[node]), node.name) for node in calls}


def _formula(constants: Any) -> str:
    """Return what constants are computed of."""
    return str(map_arg(constants, lambda node: f"{node.target}{_formula(node.args)}"))


@torch.no_grad()
def with_kernels(graph: GraphModule) -> GraphModule:
    """Return a copy of a graph that calls such kernels; weights are stored once for all calls with the same ones."""
    graph = copy_graph(graph)
    for node, owner in owners(graph).items():

        def stored(name: str, value: Tensor | None, owner: str = owner) -> Node | None:
            if value is None:
                return None
            if not hasattr(graph, f"{owner}_{name}"):
                graph.register_buffer(f"{owner}_{name}", value.contiguous())
            return graph.graph.get_attr(f"{owner}_{name}")

        with graph.graph.inserting_before(node):
            node.args = _ARGUMENTS[node.target](graph, stored, *node.args)
        node.target = KERNELS[node.target]
    graph.graph.eliminate_dead_code()
    graph.recompile()
    graph.delete_all_unused_submodules()
    return graph


def _dynamic(graph: GraphModule, stored: Any, x: Node, codes: Node, scale: Node, bias: Any, _: bool) -> Any:
    return x, stored("codes", evaluate(graph, codes).T), stored("scale", evaluate(graph, scale)), bias


def _packed(graph: GraphModule, stored: Any, x: Node, *weight: Any) -> Any:
    *tensors, bias, bits, block_size, rounds = weight
    values: Any = (None if tensor is None else evaluate(graph, tensor) for tensor in tensors)
    codes, scale, zero = values
    *parts, attributes = kernel_codes(codes, scale, zero, bits, block_size)
    names = ("codes", "scale", "zero")
    return x, *map(stored, names, parts), bias, {**attributes, "accuracy_level": 4 if rounds else 0}


def _lstm(graph: GraphModule, stored: Any, x: Node, *weight: Any) -> Any:
    *parts, h, c = weight
    codes, scales, biases = ([_gates(evaluate(graph, part)) for part in sequence] for sequence in parts)
    bias = [torch.cat(biases[place : place + 2]) for place in range(0, len(biases), 2)]
    both = (("", 0), ("state_", 1))
    kernel = [stored(f"{of}codes", torch.stack([part.T for part in codes[kind::2]])) for of, kind in both]
    steps = [stored(f"{of}scale", torch.stack(scales[kind::2])) for of, kind in both]
    return x, kernel, steps, stored("bias", torch.stack(bias)), h, c


def _gates(rows: Tensor) -> Tensor:
    """Bring gates into ONNX's order."""
    enter, forget, candidate, leave = rows.chunk(4)
    return torch.cat([enter, leave, forget, candidate])


_ARGUMENTS: dict[Any, Callable[..., Any]] = {
    **{DYNAMIC: _dynamic, PACKED: _packed, LSTM: _lstm},
    **{own: partial(stored_layers, torchs._opname) for own, torchs in TORCHS.items()},
}
"""Arguments of `KERNELS` in the place of those of our operators."""
