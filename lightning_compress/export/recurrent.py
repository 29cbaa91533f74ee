"""Recurrent layers as one operator for sequences of any length, which torch.export traces for one length each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.overrides import TorchFunctionMode

from lightning_compress.quantization.numerics.operators import STORED
from lightning_compress.quantization.static.graphs import aten, evaluate


def _operator(name: str) -> Any:
    """Return an operator of ours that computes what torch's does, into which nothing looks."""
    torchs: Any = getattr(aten, name).input

    def compute(*args: Any) -> Any:
        return torchs(*args)

    schema = str(torchs._schema).partition(".input")[2]
    operator = torch.library.custom_op(f"lightning_compress::any_{name}", compute, mutates_args=(), schema=schema)

    @operator.register_fake
    def _(x: Tensor, hx: Any, *options: Any) -> tuple[Tensor, ...]:
        states = [hx] if isinstance(hx, Tensor) else hx
        width = (1 + options[5]) * states[0].shape[2]
        return x.new_empty(*x.shape[:2], width), *map(torch.empty_like, states)

    return getattr(torch.ops.lightning_compress, f"any_{name}").default


TORCHS = {_operator(name): getattr(aten, name).input for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")}
"""The operators of whole layers, each with torch's, whose arguments it has."""

_WHOLE = {function: own for own, torchs in TORCHS.items() for function in (torchs, getattr(torch, torchs._opname))}


class WholeRecurrences(TorchFunctionMode):
    """Lets whole layers be called, in evaluation; not those of packed sequences, or with projections."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = _WHOLE.get(func)
        if own is None or not _is_taken(*args):
            return func(*args, **(kwargs or {}))
        return own(*args[:5], 0.0, False, *args[7:])


def _is_taken(x: Tensor, _: Any, params: Sequence[Any], has_biases: Any, layers: int, *options: Any) -> bool:
    if x.dtype != torch.float32 or not isinstance(has_biases, bool):  # of packed sequences there is one more before it
        return False
    return bool(len(params) == layers * (1 + options[2]) * (4 if has_biases else 2))


def in_torchs_(graph: GraphModule) -> None:
    """Let a graph call torch's operators: as an exported one they run at any length too."""
    for node in graph.graph.nodes:
        node.target = TORCHS.get(node.target, node.target)
    graph.recompile()


_ONNX: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "lstm": ("LSTM", (0, 3, 1, 2), {}),
    "gru": ("GRU", (1, 0, 2), {"linear_before_reset": 1}),
    "rnn_tanh": ("RNN", (0,), {"activations": ["Tanh"]}),
    "rnn_relu": ("RNN", (0,), {"activations": ["Relu"]}),
}
"""ONNX's operators, with the places of their gates among torch's, and attributes."""


def layers(
    name: str, x: Tensor, hx: Sequence[Tensor], weights: Sequence[Any], directions: int, batch_first: bool
) -> tuple[Tensor, ...]:
    """Compute layers by ONNX's operators, each with its weights of input and state, and its biases."""
    kind, _, own = _ONNX[name]
    attributes = {key: value * directions if isinstance(value, list) else value for key, value in own.items()}
    steps, lasts = x.transpose(0, 1) if batch_first else x, []
    for layer, (of_input, of_state, bias) in enumerate(weights):
        first = [state[layer * directions : (layer + 1) * directions] for state in hx]
        _, batch, size = first[0].shape
        y, *last = torch.onnx.ops.symbolic_multi_out(
            kind,
            (steps, of_input, of_state, bias, None, *first),
            {"hidden_size": size, "direction": ("forward", "bidirectional")[directions - 1], **attributes},
            dtypes=(torch.float32,) * (1 + len(first)),
            shapes=((steps.shape[0], directions, batch, size), *(state.shape for state in first)),
        )
        steps = y.permute(0, 2, 1, 3).flatten(2)
        lasts.append(last)
    states = [torch.cat(parts) for parts in zip(*lasts, strict=True)]
    return steps.transpose(0, 1) if batch_first else steps, *states


def stored_layers(name: str, graph: GraphModule, stored: Any, *args: Any) -> Any:
    """Return arguments of `layers` for those of torch's operator; int8 codes are stored as such."""
    x, hx, params, has_biases, count, _, _, bidirectional, batch_first = args
    directions, cell, order = 1 + bidirectional, 4 if has_biases else 2, _ONNX[name][1]

    def gates(parts: Sequence[Node]) -> Tensor:
        """Return a layer's tensors of all directions, with the gates in ONNX's order."""
        rows = [evaluate(graph, part).chunk(len(order)) for part in parts]
        return torch.stack([torch.cat([gate[place] for place in order]) for gate in rows])

    def matrix(key: str, parts: Sequence[Node]) -> Node:
        if any(part.target is not STORED for part in parts):
            whole: Node = stored(key, gates(parts))
            return whole
        codes, scales = zip(*(part.args for part in parts), strict=True)
        return graph.graph.call_function(_values, (stored(key, gates(codes)), stored(f"{key}_scale", gates(scales))))

    weights = []
    for layer in range(count):
        own = params[layer * directions * cell : (layer + 1) * directions * cell]
        of_input, of_state, *biases = (own[place::cell] for place in range(cell))
        bias = stored(f"bias_{layer}", torch.cat([*map(gates, biases)], 1)) if biases else None
        weights.append((matrix(f"input_{layer}", of_input), matrix(f"state_{layer}", of_state), bias))
    return name, x, [hx] if isinstance(hx, Node) else hx, weights, directions, batch_first


def _values(codes: Tensor, scale: Tensor) -> Tensor:
    """Dequantize codes in a way that onnxruntime computes when it loads a file, and not at every call."""
    return codes.float() * scale.unsqueeze(-1)
