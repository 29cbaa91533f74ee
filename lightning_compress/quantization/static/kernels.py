"""Gives the reference form of static int8 int8 kernels; between them activations stay codes of 8 bits."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from lightning_compress.quantization.static.graphs import LAYERS, copy_graph, owner_path
from lightning_compress.quantization.static.int8_layer import NOTHING, Codes, Int8Layer, PostOp, decode, encode
from lightning_compress.quantization.static.placement import code_sources
from lightning_compress.quantization.static.rounding import rounded

aten = torch.ops.aten


def lower(form: GraphModule, additions: bool = True) -> GraphModule:
    """Return a reference form with int8 kernels, around the same weights; ``form`` is left as it is.

    With ``additions`` a convolution adds a residual branch to its sums, as long as they are in a register.
    """
    lowered = copy_graph(form)
    _encode_(lowered.graph)
    _move_codes_(lowered.graph)
    for node in [node for node in lowered.graph.nodes if node.target in LAYERS]:
        if _is_decoded(node.args[0]) and (weight := _int8_weight(lowered, node)) is not None:
            _place_kernel_(lowered, node, weight, additions)
            lowered.graph.eliminate_dead_code()
    lowered.graph.eliminate_dead_code()
    lowered.delete_all_unused_submodules()
    lowered.recompile()
    return lowered


def wrong(lowered: nn.Module) -> dict[str, str]:
    """Find the layers whose kernels aren't used on this CPU, with reasons; they compute in float."""
    layers = [layer for layer in lowered.modules() if isinstance(layer, Int8Layer)]
    return {layer.path: reason for layer in layers if (reason := layer.wrong())}


def _encode_(graph: Graph) -> None:
    """Write each rounding as two steps: to codes, and back."""
    for node in list(graph.nodes):
        if node.target is aten.view.default:
            node.target = aten.reshape.default  # kernels give channels_last, which not every view can be of
        if node.target is not rounded:
            continue
        x, *numbers = node.args
        codes = Codes(*numbers).unsigned()
        with graph.inserting_before(node):
            encoded = graph.call_function(encode, (x, *astuple(codes)))
            decoded = graph.call_function(decode, (encoded, codes.scale, codes.zero_point))
        decoded.meta = dict(x.meta)
        node.replace_all_uses_with(decoded)
        graph.erase_node(node)


def _is_decoded(node: Any) -> bool:
    return isinstance(node, Node) and node.target is decode


def max_pool(
    codes: Tensor, kernel: Any, stride: Any = (), padding: Any = (0,), dilation: Any = (1,), ceil: bool = False
) -> Tensor:
    """Return the largest codes in windows: torch's own operator is slow in uint8, and fails in channels_last."""
    flat = codes.dim() == 3
    lists = [[*numbers] for numbers in (kernel, stride or kernel, padding, dilation)]
    if flat:
        lists = [[first, *numbers] for first, numbers in zip((1, 1, 0, 1), lists, strict=True)]
    samples = (codes.unsqueeze(2) if flat else codes).contiguous(memory_format=torch.channels_last)
    largest: Tensor = torch.ops.quantized.max_pool2d(
        samples, *(numbers * (2 // len(numbers)) for numbers in lists), ceil
    )
    return largest.squeeze(2) if flat else largest


def max_pool3d(codes: Tensor, *window: Any) -> Tensor:
    """Return the largest codes in windows: of channels_last torch counts places in 8 bits, and refuses 256 of them."""
    return aten.max_pool3d.default(codes.contiguous(), *window)  # type: ignore[no-any-return]


_POOLS = {aten.max_pool1d.default: 3, aten.max_pool2d.default: 4}
"""The dimensions of batches."""


def _move_codes_(graph: Graph) -> None:
    """Let what only moves numbers, or chooses some, do so with codes."""
    tuples: dict[Node, Any] = {}  # of codes, with what these stand for
    for node in list(graph.nodes):
        sources = code_sources(node)
        numbers: set[Any] = {source.args[1:] if _is_decoded(source) else tuples.get(source) for source in sources}
        if len(numbers) != 1 or None in numbers:
            continue
        scale, zero_point = numbers.pop()
        node.args = map_arg(node.args, lambda source: source.args[0] if _is_decoded(source) else source)
        _on_codes_(node, zero_point)
        if not isinstance(node.meta["val"], Tensor):
            tuples[node] = scale, zero_point
            continue
        with graph.inserting_after(node):
            decoded = graph.call_function(decode, (node, scale, zero_point))
        decoded.meta = dict(node.meta)
        node.replace_all_uses_with(decoded, delete_user_cb=lambda user, decoded=decoded: user is not decoded)


def _on_codes_(node: Node, zero_point: int) -> None:
    """Let an operator that moves numbers compute on codes, among which zero is another."""
    if node.target in _POOLS and node.meta["val"].dim() == _POOLS[node.target]:
        node.target = max_pool
    elif node.target is aten.max_pool3d.default:
        node.target = max_pool3d
    elif node.target is aten.relu.default:
        node.target, node.args = aten.clamp_min.default, (node.args[0], zero_point)
    elif node.target is aten.constant_pad_nd.default:
        node.args = (*node.args[:2], zero_point)
    elif node.target is aten.pad.default and node.args[2:3] in ((), ("constant",)):
        node.args = (*node.args[:2], "constant", zero_point)


def _int8_weight(graph: GraphModule, layer: Node) -> nn.Module | None:
    node: Any = layer.args[1]
    module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
    return module if isinstance(getattr(module, "codes", None), Tensor) else None


def _place_kernel_(graph: GraphModule, node: Node, weight: nn.Module, additions: bool) -> None:
    """Put a kernel where a layer stands, with as much of what follows as it can do."""
    defaults: list[Any] = [None] if node.target is aten.linear.default else [None, [1], [0], [1], 1]
    arguments: list[Any] = [*node.args, *defaults[len(node.args) - 2 :]]
    x, _, bias, *options = arguments
    last, post_op, output = _end(node)
    inputs: list[Any] = [x]
    if additions and (addition := _addition(node)) is not None:
        end, after, rounding = _end(addition[0])
        if rounding is not None and after[0] in ("none", "relu"):
            last, post_op, output = end, after, rounding
            inputs.append(addition[1])
    activations = [Codes(decoded.args[1], decoded.args[2], 0, 255) for decoded in inputs]
    first, *others = [decoded.args[0] for decoded in inputs]
    name = f"int8_{node.name}"
    graph.add_submodule(name, Int8Layer(owner_path(node), node.target, options, weight, activations, post_op, output))
    with graph.graph.inserting_before(last):
        call = graph.graph.call_module(name, (first, bias, *others))
    call.meta = dict(node.meta)
    last.replace_all_uses_with(call)


def _end(node: Node) -> tuple[Node, PostOp, Codes | None]:
    """Find the last of what one kernel can compute from a layer's sum on: an activation, and its rounding."""
    post_op, user = NOTHING, _only_user(node)
    if user is not None and (found := _post_op(user)) is not None:
        behind = _only_user(user)
        if node.target is not aten.conv3d.default:
            post_op, node, user = found, user, behind
        elif found[0] == "relu" and behind is not None and behind.target is encode and behind.args[2] == behind.args[3]:
            # Its kernels have no activations; where zero is the least code, codes are clipped.
            node, user = user, behind
    if user is None or user.target is not encode:
        return node, post_op, None
    numbers: Any = user.args[1:]
    return user, post_op, Codes(*numbers)


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


_POST_OPS = {aten.relu.default: "relu", aten.silu.default: "swish", aten.hardswish.default: "hardswish"}


def _post_op(node: Node) -> PostOp | None:
    arguments: Any = node.args or (None,)
    x, *numbers = arguments
    if node.target is aten.relu6.default:
        return "hardtanh", [0.0, 6.0], ""
    if node.target in (aten.hardtanh.default, aten.clamp.default) and len(numbers) == 2 and None not in numbers:
        return "hardtanh", [float(number) for number in numbers], ""
    if node.target is aten.gelu.default and isinstance(x, Node) and x.target is aten.linear.default:
        return "gelu", [], str(node.kwargs.get("approximate", "none"))
    return (_POST_OPS[node.target], [], "") if node.target in _POST_OPS else None


def _addition(node: Node) -> tuple[Node, Node] | None:
    """Find the sum of what a convolution gives, rounded or not, and an activation that there are codes of.

    The rounding between the two is left out: what isn't rounded twice is nearer to float.
    """
    if node.target is not aten.conv2d.default:
        return None
    branch, encoded = node, _only_user(node)
    if encoded is not None and encoded.target is encode:
        decoded = _only_user(encoded)
        branch = decoded if decoded is not None and _is_decoded(decoded) else node
    add = _only_user(branch)
    if add is None or add.target is not aten.add.Tensor or len(add.args) != 2 or add.kwargs:
        return None
    other: Any = add.args[1] if add.args[0] is branch else add.args[0]
    if other is branch or not _is_decoded(other):
        return None
    shapes = {str(source.meta["val"].shape) for source in (node, other)}
    return (add, other) if len(shapes) == 1 else None
