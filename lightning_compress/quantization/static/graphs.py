"""Traced graphs: their int8 layers, what else reads weights, and which operators depend on the mode."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

aten = torch.ops.aten

LAYERS: tuple[Any, ...] = (aten.linear.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
"""The operators that int8 has kernels for; the second argument is the weight, the third the bias."""

MODES: dict[Any, int] = {
    **{aten.batch_norm.default: 5, aten.instance_norm.default: 5, aten.rrelu.default: 3},
    **{getattr(aten, f"{name}dropout").default: 2 for name in ("", "alpha_", "feature_", "feature_alpha_")},
    **{getattr(aten, name).input: 6 for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")},
    aten.scaled_dot_product_attention.default: 4,
}
"""Which argument of an operator tells whether it trains; of attention it is a probability."""

DROPOUTS = [operator for operator in MODES if "dropout" in str(operator)]

COMPUTED = "__of_"
"""Parts the name of a tensor from that of the operation whose weight is computed of it."""


def copy_graph(graph: GraphModule) -> GraphModule:
    """Return a graph of copied nodes, around the same tensors and modules."""
    copied, nodes = Graph(), dict[Node, Node]()
    copied.output(copied.graph_copy(graph.graph, nodes))
    return GraphModule(graph, copied)


def read_through_(graph: GraphModule, node: Node, users: Collection[str] | None, *call: Any) -> None:
    """Let the ``users`` of a node (None: all) read what a ``call`` makes of it: kind, target, further arguments."""
    readers = [user for user in node.users if users is None or user.name in users]
    kind, target, *arguments = call
    with graph.graph.inserting_after(node):
        between = graph.graph.create_node(kind, target, (node, *arguments))
    for user in readers:
        user.replace_input_with(node, between)


def value_read(graph: GraphModule, node: Node) -> Any:
    """Return what a node reads of the graph's own: a tensor or module; None if it reads nothing."""
    value: Any = graph if node.op == "get_attr" else None
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    return value


def constants(graph: GraphModule) -> set[Node]:
    """Return the nodes that are computed of the graph's own tensors alone."""
    found: set[Node] = set()
    for node in graph.graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "get_attr" or (
            node.op == "call_function" and inputs and all(source in found for source in inputs)
        ):
            found.add(node)
    return found


def evaluate(graph: GraphModule, node: Node) -> Any:
    """Return the value of a node among the `constants`."""
    if node.op == "get_attr":
        return value_read(graph, node)
    args, kwargs = map_arg((node.args, node.kwargs), lambda source: evaluate(graph, source))
    return node.target(*args, **kwargs)  # type: ignore[operator]


_VIEWS = (
    *("view", "reshape", "flatten", "unflatten", "slice", "select", "transpose", "permute", "squeeze", "unsqueeze"),
    *("expand", "t", "detach", "chunk", "split", "unbind", "narrow", "getitem", "contiguous"),
)


def is_view(node: Node) -> bool:
    """Tell whether a node may give the memory of its input under another name."""
    return getattr(node.target, "__name__", "").partition(".")[0] in _VIEWS


def overwritten(graph: GraphModule) -> set[Node]:
    """Return the nodes whose values an operator in place changes later, under whichever name."""
    names: dict[Node, set[Node]] = {}
    found: set[Node] = set()
    for node in graph.graph.nodes:
        in_place = node.op == "call_function" and node.target.__name__.partition(".")[0].endswith("_")
        if (in_place or is_view(node)) and node.all_input_nodes:
            names[node] = names.setdefault(node.args[0], {node.args[0]})
            if in_place:
                found |= names[node]
            names[node].add(node)
    return found


def path_of(layer: Node) -> str:
    """Return the path in the module of the layer whose weight an operation reads, or that of a weight of no layer.

    Of a computed weight it is the name of the first tensor that it is computed of, and that of the operation.
    """
    weight: Any = layer.args[1]
    if weight.op == "get_attr":
        owner, _, name = str(weight.target).rpartition(".")
        return owner if name == "weight" else str(weight.target)
    while weight.op != "get_attr":
        weight = weight.all_input_nodes[0]
    return f"{weight.target}{COMPUTED}{layer.name}"


def own_path(path: str) -> str:
    """Return the path of a layer, or of the tensor that its weight is computed of."""
    return path.partition(COMPUTED)[0]


def is_one_of(path: str, layers: Collection[str]) -> bool:
    """Tell whether a layer is one of these, or has its weight from within one."""
    own = own_path(path)
    return any(own == own_path(layer) or own.startswith(f"{layer}.") for layer in layers)


def int8_layers(graph: GraphModule, floats: Collection[str] = ()) -> dict[Node, str]:
    """Find the operations that can have codes of their weights, with the paths of their layers, but for ``floats``.

    There are no codes of a parameter that anything else reads, too, nor of a buffer.
    """
    constant = constants(graph)
    found = {}
    for node in graph.graph.nodes:
        if node.target not in LAYERS or (weight := node.args[1]) not in constant:
            continue
        if weight.op == "get_attr" and not (
            isinstance(value_read(graph, weight), nn.Parameter)
            and all(user.target in LAYERS and user.args[1] is weight for user in weight.users)
        ):
            continue
        if not is_one_of(path := path_of(node), floats):
            found[node] = path
    return found


def float_weights(graph: GraphModule, layers: Collection[Node]) -> dict[str, str]:
    """Find the matrices that a graph reads beside those of its int8 ``layers``, each with the reason.

    The reason is empty where it is a table, or the kind of layer.
    """
    constant = constants(graph)
    found = {}
    for node in graph.graph.nodes:
        value = value_read(graph, node)
        if node.users and isinstance(value, nn.Parameter) and value.dim() > 1:
            users = list(_users(node, constant))
            if not all(user in layers for user in users):
                found[str(node.target)] = next((reason for user in users if (reason := _what(user))), "")
    return found


def _users(node: Node, constant: set[Node]) -> Iterator[Node]:
    """Yield what brings a constant together with activations."""
    for user in node.users:
        if user in constant:
            yield from _users(user, constant)
        else:
            yield user


_PRODUCTS = (
    *("linear", "matmul", "mm", "bmm", "mv", "addmm", "addmv", "baddbmm", "einsum", "tensordot", "bilinear"),
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    *("embedding", "embedding_bag"),
)
"""Operations whose matrix is a weight; one that is only added or looked up in is a table."""


def _what(node: Node) -> str:
    name = str(node.target).split(".")[1] if node.op == "call_function" and "." in str(node.target) else ""
    inside = [str(kind) for _, kind in (node.meta.get("nn_module_stack") or {}).values()][-1:]
    if name not in _PRODUCTS or "torch.nn.modules." in "".join(inside):  # of a layer its kind is the reason
        return ""
    return f"`{name}` takes it as a weight, for which there is no static int8 kernel"


def owner_path(node: Node) -> str:
    """Return the path of the innermost module whose forward has an operation."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""


def trains(node: Node) -> bool:
    """Tell whether an operation computes something else in evaluation than it was traced for."""
    place = MODES.get(node.target)
    without_statistics = node.target in (aten.batch_norm.default, aten.instance_norm.default) and node.args[3] is None
    return place is not None and len(node.args) > place and bool(node.args[place]) and not without_statistics


def in_evaluation(operator: Any, args: Sequence[Any]) -> tuple[Any, ...]:
    """Return the arguments of an operator that depends on the mode, as they are in evaluation."""
    place = MODES[operator]
    return (*args[:place], type(args[place])(0), *args[place + 1 :])


def evaluate_modes_(graph: GraphModule) -> None:
    """Let the operations of a graph compute as in evaluation, and take out what only passes values on."""
    for node in list(graph.graph.nodes):
        if trains(node):
            node.args = in_evaluation(node.target, node.args)
        if node.target is aten.alias.default or (node.target in DROPOUTS and not node.args[2]):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.recompile()
