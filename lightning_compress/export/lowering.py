"""What a graph needs before a runtime takes it whole: all of it leaves the values as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from lightning_compress.errors import CompressionError
from lightning_compress.export.kernels import owners
from lightning_compress.quantization.layers.int8_weight import dequantized
from lightning_compress.quantization.numerics.operators import DYNAMIC, LSTM, ROUNDED, STORED
from lightning_compress.quantization.static.graphs import LAYERS, aten, copy_graph, value_read
from lightning_compress.quantization.static.placement import PADS, TARGETS, code_sources
from lightning_compress.quantization.static.rounding import rounded

PLAIN: dict[Any, Callable[..., Any]] = {ROUNDED: rounded, STORED: dequantized}
"""Our operators as functions of torch's operators, or of ONNX's in an export to ONNX."""


def in_plain_operators(graph: GraphModule) -> GraphModule:
    """Return a copy of a graph in which functions stand for our operators."""
    copied = copy_graph(graph)
    for node in copied.graph.nodes:
        node.target = PLAIN.get(node.target, node.target)
    copied.recompile()
    return copied


def shift_codes_(graph: GraphModule, target: str) -> None:
    """Give the codes of activations the sign that the target's kernels take: 128 more or less, with the zero point.

    Raises:
        CompressionError: the target has no kernels between these roundings.
    """
    wanted = TARGETS[target]
    for node in graph.graph.find_nodes(op="call_function", target=ROUNDED):
        x, scale, zero_point, low, high = node.args
        shift = wanted.low - low
        if (wanted.symmetric and zero_point + shift) or (wanted.last and low == 0):
            raise CompressionError(
                f"`target` must be one whose kernels take the model's roundings. Received: target={target!r}, for a "
                f"model that is rounded for another. Quantize or train it with StaticInt8(target={target!r})."
            )
        node.args = (x, scale, zero_point + shift, low + shift, high + shift)
    graph.recompile()


def round_again_(graph: GraphModule) -> None:
    """Round what passes codes on once more: runtimes look for codes at the operators themselves."""
    for node in list(graph.graph.nodes):
        if not isinstance(node.meta.get("val"), Tensor) or all(user.target is ROUNDED for user in node.users):
            continue
        roundings = {_rounding_of(source) for source in code_sources(node)}
        if len(roundings) == 1 and None not in roundings:
            with graph.graph.inserting_after(node):
                again = graph.graph.call_function(ROUNDED, (node, *roundings.pop()))
            again.meta = dict(node.meta)
            node.replace_all_uses_with(again, delete_user_cb=lambda user, again=again: user is not again)
    graph.recompile()


def _rounding_of(node: Node) -> Any:
    """Return scale, zero point and limits of a node's codes, or of what a list is split of; None if it has none."""
    while node.target is not ROUNDED and not isinstance(node.meta.get("val"), Tensor) and code_sources(node):
        node = code_sources(node)[0]
    return node.args[1:] if node.target is ROUNDED else None


_REPEATING = {"reflect", "replicate", "circular"}


@torch.no_grad()
def absorb_paddings_(graph: GraphModule) -> None:
    """Let convolutions pad with zeros themselves, on both sides alike: OpenVINO's int8 can't pad between roundings.

    Where one side has more, the kernel gets zeros at the other side: ``pad(x, 0, 1) * w = pad(x, 1, 1) * (0, w)``.
    """
    for conv in [
        node for node in graph.graph.nodes if node.target in LAYERS and node.target is not aten.linear.default
    ]:
        before: Any = conv.args[0]
        padding: Any = before.args[0] if before.target is ROUNDED else before
        weight: Any = conv.args[1].args[0] if conv.args[1].target is STORED else conv.args[1]
        values = value_read(graph, weight)
        size = conv.args[0].meta["val"].dim() - 2
        defaults: list[Any] = [None, [1], [0], [1], 1]
        bias, *counts, groups = list(conv.args[2:]) + defaults[len(conv.args) - 2 :]
        stride, own, dilation = (list(count) * (size // len(count)) for count in counts)  # OpenVINO takes no fewer
        if padding.target not in PADS or not code_sources(padding) or {*padding.args[2:]} & _REPEATING:
            continue
        sides = list(padding.args[1])
        if len(sides) > 2 * size or min(sides) < 0 or set(dilation) != {1} or len(weight.users) > 1:
            continue
        sides += [0] * (2 * size - len(sides))  # of the last dimension first
        pairs = [
            (left + pad, right + pad) for left, right, pad in zip(sides[::2], sides[1::2], reversed(own), strict=True)
        ]
        taps = [tap for left, right in pairs for tap in (max(right - left, 0), max(left - right, 0))]
        *owner, name = str(weight.target).split(".")
        holder: Any = graph.get_submodule(".".join(owner))
        holder._parameters.pop(name, None)
        holder.register_buffer(name, torch.nn.functional.pad(values, taps))
        widened = [max(pair) for pair in reversed(pairs)]
        conv.args = (padding.args[0], conv.args[1], bias, stride, widened, dilation, groups)
    graph.graph.eliminate_dead_code()
    graph.recompile()


@torch.no_grad()
def store_biases_(graph: GraphModule) -> None:
    """Bring the biases of int8 linear layers to where onnxruntime has a kernel with them.

    Of matrices they are stored in int32, at the scale of their products, of which a bias is rounded to a step (about a
    millionth of them). Before a ReLU that stays float they are added by themselves: onnxruntime would compute product,
    bias and ReLU together, in float. Of larger tensors they are added in float anyway.
    """
    for layer in graph.graph.find_nodes(op="call_function", target=aten.linear.default):
        x, weight, *rest = layer.args
        bias = value_read(graph, rest[0]) if rest and isinstance(rest[0], Node) else None
        if x.target is not ROUNDED or weight.target is not STORED or not isinstance(bias, Tensor):
            continue
        if x.meta["val"].dim() != 2:
            continue
        if any(user.target is aten.relu.default and not _is_rounded(user) for user in layer.users):
            layer.args = (x, weight)
            with graph.graph.inserting_after(layer):
                biased = graph.graph.call_function(aten.add.Tensor, (layer, rest[0]))
            biased.meta = dict(layer.meta)
            layer.replace_all_uses_with(biased, delete_user_cb=lambda user, biased=biased: user is not biased)
            continue
        scale = value_read(graph, weight.args[1]) * x.args[1]
        graph.register_buffer(f"{layer.name}_bias", (bias / scale).round().to(torch.int32))
        graph.register_buffer(f"{layer.name}_bias_scale", scale)
        with graph.graph.inserting_before(layer):
            codes, scales = (graph.graph.get_attr(f"{layer.name}_{part}") for part in ("bias", "bias_scale"))
            layer.update_arg(2, graph.graph.call_function(STORED, (codes, scales)))
    graph.recompile()


def _is_rounded(node: Node) -> bool:
    return all(user.target is ROUNDED for user in node.users)


def int8_layers(graph: GraphModule) -> dict[Node, str]:
    """Return the products with int8 weights and rounded inputs, and the names of the codes of these weights."""
    found = {node: f"{name}_codes" for node, name in owners(graph).items() if node.target in (DYNAMIC, LSTM)}
    for weight in graph.graph.find_nodes(op="call_function", target=STORED):
        for node in weight.users:
            if len(node.args) > 1 and node.args[1] is weight and getattr(node.args[0], "target", None) is ROUNDED:
                found[node] = str(weight.args[0].target)
    return found


def stored_path(weight: Any) -> str:
    """Return the path of the tensor that a weight, or the first one of a cell, is computed of."""
    weight = weight if isinstance(weight, Node) else weight[0]
    while weight.op != "get_attr":
        weight = weight.all_input_nodes[0]
    return str(weight.target)
