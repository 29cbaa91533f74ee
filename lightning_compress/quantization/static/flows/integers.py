"""Keeps integers from being quantized: upstream takes every tensor for a float one, and would round it."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from lightning_compress.quantization.static.flows.graphs import Function, name_of, replace_, value_read

_GIVE_INTEGERS = ("long", "int", "bool", "argmax", "argmin", "argsort", "eq", "ne", "lt", "le", "gt", "ge")
_KEEP_INTEGERS = (
    *("add", "iadd", "sub", "mul", "imul", "mod", "remainder", "floordiv", "floor_divide", "clamp", "cat", "stack"),
    *("view", "reshape", "flatten", "squeeze", "unsqueeze", "transpose", "permute", "expand", "repeat", "contiguous"),
    *("clone", "detach", "where", "getitem", "repeat_interleave", "cumsum", "relu", "min", "max"),
)


def hide_integers_(graph: GraphModule, are_integers: Sequence[bool]) -> None:
    """Put operations on integers into modules, which stay as they are.

    Args:
        graph: traced.
        are_integers: of its inputs, in order.
    """
    found, inputs = set[Node](), iter(are_integers)
    for node in list(graph.graph.nodes):
        name, tensor = name_of(node), value_read(graph, node)
        if node.op == "placeholder":
            is_integer = next(inputs)
        elif node.op == "get_attr":
            is_integer = isinstance(tensor, Tensor) and not tensor.is_floating_point()
        else:
            is_operation = node.op in ("call_function", "call_method")
            kept = [each in found for each in node.all_input_nodes if not _is_size(each)]
            hidden = is_operation and name in _KEEP_INTEGERS and any(kept)
            is_integer = (is_operation and name in _GIVE_INTEGERS) or (hidden and all(kept))
            if hidden and name != "getitem" and (all(kept) or name in ("add", "iadd", "mul", "imul")):
                function = getattr(Tensor, name) if node.op == "call_method" else node.target
                node = replace_(graph, node, f"integers_{node.name}", Function(function), node.args, node.kwargs)
        if is_integer:
            found.add(node)


def _is_size(node: Any) -> bool:
    if not isinstance(node, Node):  # the shape of a parameter
        return True
    if node.target is operator.getitem:
        return _is_size(node.args[0])
    return (node.target is getattr and node.args[1] == "shape") or (node.op == "call_method" and node.target == "size")
