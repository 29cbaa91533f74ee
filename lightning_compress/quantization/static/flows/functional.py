"""Layers that are written as functions, or whose weight is computed: those that can be become layers of torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from lightning_compress.quantization.static.flows.graphs import (
    Function,
    constants,
    drop_unused_,
    evaluate,
    replace_,
    source_of,
    value_read,
)

_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
LAYERS: dict[Any, Any] = {
    functional.linear: nn.Linear,
    functional.conv1d: nn.Conv1d,
    functional.conv2d: nn.Conv2d,
    functional.conv3d: nn.Conv3d,
}
_KINDS = ("dtype", "shape", "ndim", "size", "dim", "numel", "is_floating_point")


def name_layers_(graph: GraphModule) -> None:
    """Call a layer of torch in the place of each function whose weight and bias are parameters as they stand."""
    _settle_kinds_(graph)
    for node in list(graph.graph.nodes):
        if node.target in LAYERS:
            weight, bias = (node_of(node, name) for name in ("weight", "bias"))
            found = [value_read(graph, each) for each in (weight, bias) if each is not None]
            if all(isinstance(each, nn.Parameter) for each in found):
                _call_layer_(graph, node, str(weight.target), *found)  # type: ignore[union-attr]


def _settle_kinds_(graph: GraphModule) -> None:
    """What is read of a tensor's type, shape and device doesn't need the tensor, which int8 takes away."""
    first = next((node for node in graph.graph.nodes if node.op == "placeholder"), None)
    for node in list(graph.graph.nodes):
        tensor = value_read(graph, node.args[0]) if node.args and isinstance(node.args[0], Node) else None
        if not isinstance(tensor, Tensor):
            continue
        if node.target is getattr and node.args[1] == "device" and first is not None:
            node.replace_input_with(node.args[0], first)
        elif (node.target is getattr and node.args[1] in _KINDS) or (
            node.op == "call_method" and node.target in _KINDS
        ):
            value = evaluate(graph, node)
            for user in list(node.users):
                user.args, user.kwargs = _replaced((user.args, user.kwargs), node, value)
            graph.graph.erase_node(node)
    drop_unused_(graph, [node for node in graph.graph.nodes if node.op == "get_attr"])


def _replaced(tree: Any, node: Node, value: Any) -> Any:
    return map_arg(tree, lambda each: value if each is node else each)


@torch.no_grad()
def fold_layers_(graph: GraphModule) -> None:
    """Call a layer of torch, too, where weight or bias is computed of tensors of the graph alone: of their values now.

    It must be right that they never change.
    """
    constant = constants(graph)
    for node in list(graph.graph.nodes):
        if node.target in LAYERS:
            parts = [part for part in (node_of(node, "weight"), node_of(node, "bias")) if part is not None]
            if all(part in constant for part in parts):
                values = [nn.Parameter(evaluate(graph, part), requires_grad=False) for part in parts]
                _call_layer_(graph, node, source_of(parts[0]), *values)
    drop_unused_(graph, constant)


@torch.no_grad()
def without_parametrization(layer: nn.Module) -> nn.Module | None:
    """A layer of torch with the weight that a parametrization gives this one now; None if it isn't so."""
    kind: Any = type(layer).__mro__[1]
    if not is_parametrized(layer, "weight") or kind not in LAYERS.values():
        return None
    plain = kind.__new__(kind)
    vars(plain).update(vars(layer) | {"_modules": {}})
    values = {name: getattr(layer, name) for name in ("weight", "bias")}
    plain._parameters = {
        name: None if value is None else nn.Parameter(value.detach().clone(), requires_grad=False)
        for name, value in values.items()
    }
    return with_padding_in_numbers(plain)


def hide_functions_(graph: GraphModule) -> None:
    """Put what is left of such functions into modules, which stay float: no int8 kernel takes a computed weight."""
    for node in list(graph.graph.nodes):
        if node.target in LAYERS:
            replace_(graph, node, f"float_{node.name}", Function(node.target), node.args, node.kwargs)


def _call_layer_(graph: GraphModule, node: Node, source: str, weight: Tensor, bias: Tensor | None = None) -> None:
    layer = _layer(node, weight, bias)
    if layer is not None:
        layer.train(graph.training)
        replace_(graph, node, source.removesuffix(".weight"), layer, (node_of(node, "input"),), {})


def _layer(node: Node, weight: Any, bias: Any) -> nn.Module | None:
    """The layer that a function is with these parameters; None where its options are computed."""
    options = {name: value for name in _NAMES[3:] if (value := _argument(node, name)) is not None}
    if any(isinstance(leaf, Node) for value in options.values() for leaf in _leaves(value)):
        return None
    outputs, inputs, *size = weight.shape
    sizes = {"kernel_size": tuple(size)} if size else {}
    # Without values of its own: it draws none.
    layer = LAYERS[node.target](
        inputs * options.get("groups", 1), outputs, bias=bias is not None, device="meta", **sizes, **options
    )
    layer.weight, layer.bias = weight, bias
    return with_padding_in_numbers(layer)


def _argument(node: Node, name: str) -> Any:
    place = _NAMES.index(name)
    return node.args[place] if place < len(node.args) else node.kwargs.get(name)


def node_of(node: Node, name: str) -> Node | None:
    """The node of an argument of a layer that is written as a function, if it is one."""
    value = _argument(node, name)
    return value if isinstance(value, Node) else None


def _leaves(tree: Any) -> list[Any]:
    return list(tree) if isinstance(tree, tuple | list) else [tree]


def with_padding_in_numbers(layer: nn.Module) -> nn.Module:
    """``layer``; if it is a convolution of padding ``same``, with that in numbers, where both sides have the same."""
    if isinstance(layer, _ConvNd) and isinstance(layer.padding, str):
        layer.padding = in_numbers(layer.padding, layer.kernel_size, layer.dilation)
    return layer


def in_numbers(padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> Any:
    """``padding`` (``same`` or ``valid``) as one number for each dimension; itself where the two sides differ."""
    both = [0 if padding == "valid" else (size - 1) * step for size, step in zip(kernel, dilation, strict=True)]
    return padding if any(size % 2 for size in both) else tuple(size // 2 for size in both)
