"""What flows do with a graph before they hand it to their upstream: read constants, and call modules in it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

AGAIN = "__call"
"""Parts the name of a layer from the number of its call, where a layer is called several times."""


class Function(nn.Module):
    """A function as a module, which upstream takes for a float layer."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def replace_(graph: GraphModule, node: Node, path: str, module: nn.Module, args: Any, kwargs: Any) -> Node:
    """Call ``module`` in the place of ``node``, under ``path`` or a name after it."""
    read = list(node.all_input_nodes)
    with graph.graph.inserting_before(node):
        call = graph.graph.create_node("call_module", "", args, kwargs)
    node.replace_all_uses_with(call)
    graph.graph.erase_node(node)
    for other in read:
        if other.op == "get_attr" and not other.users:
            graph.graph.erase_node(other)
    taken = {str(other.target) for other in graph.graph.nodes if other.op in ("call_module", "get_attr")}
    name, count = path, 1
    while any(f"{other}.".startswith(f"{name}.") or f"{name}.".startswith(f"{other}.") for other in taken - {""}):
        count += 1
        name = f"{path}{AGAIN}{count}"
    call.target = name
    parent, _, leaf = name.rpartition(".")
    holder = graph.get_submodule(parent) if parent else graph
    if hasattr(holder, leaf):  # the weight, which nothing reads any more
        delattr(holder, leaf)
    holder.add_module(leaf, module)
    graph.recompile()
    return call


def drop_unused_(graph: GraphModule, nodes: Collection[Node]) -> None:
    """Erase those of these nodes that nothing uses any more."""
    for node in reversed(list(graph.graph.nodes)):
        if node in nodes and not node.users:
            graph.graph.erase_node(node)
    graph.recompile()


def constants(graph: GraphModule) -> set[Node]:
    """The nodes that are computed of the graph's own tensors alone."""
    found: set[Node] = set()
    for node in graph.graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "get_attr" or (node.op != "output" and inputs and all(each in found for each in inputs)):
            found.add(node)
    return found


def evaluate(graph: GraphModule, node: Node, known: dict[Node, Any] | None = None) -> Any:
    """The value of a node among the `constants`."""
    known = {} if known is None else known
    if node in known:
        return known[node]
    args, kwargs = map_arg((node.args, node.kwargs), lambda each: evaluate(graph, each, known))
    if node.op == "get_attr":
        value = value_read(graph, node).detach()
    elif node.op == "call_module":
        value = graph.get_submodule(str(node.target))(*args, **kwargs)
    elif node.op == "call_method":
        value = getattr(args[0], str(node.target))(*args[1:], **kwargs)
    else:
        value = node.target(*args, **kwargs)  # type: ignore[operator]
    known[node] = value
    return value


def source_of(node: Node) -> str:
    """The name of the first tensor that a constant is computed of."""
    while node.op != "get_attr":
        node = node.all_input_nodes[0]
    return str(node.target)


def value_read(graph: GraphModule, node: Node) -> Any:
    """The tensor (or module) that a node reads; None if it doesn't read one."""
    value: Any = graph if node.op == "get_attr" else None
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    return value


def name_of(node: Node) -> str:
    """What a node calls, without its namespace."""
    return str(getattr(node.target, "__name__", node.target)).partition(".")[0]
