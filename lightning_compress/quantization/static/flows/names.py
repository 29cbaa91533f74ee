"""How nodes and layers of traced graphs are called, by us and by upstream, which traces them again and fuses some."""

from __future__ import annotations

from collections.abc import Collection

from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

AGAIN = "__call"
"""Parts the name of a layer from the number of its call, where a layer is called several times."""
HELD = "__layer"
"""The path in its graph of a layer that is a unit by itself."""
COMPUTED = "__of_"
"""Parts the name of a tensor from that of the operation whose weight is computed of it."""


def rename_(graph: GraphModule) -> None:
    """Name the nodes as if the graph had just been traced, which is how upstream's own trace of it names them."""
    renamed, copies = Graph(), dict[Node, Node]()
    for node in graph.graph.nodes:
        args, kwargs = map_arg((node.args, node.kwargs), copies.__getitem__)
        name = node.name if node.op in ("placeholder", "output") else None
        copies[node] = renamed.create_node(node.op, node.target, args, kwargs, name, node.type)
        copies[node].meta = dict(node.meta)
    graph.graph = renamed


def chain(node: Node, kept: Collection[str]) -> list[Node]:
    """Return a node and those behind it that are computed with it: names that aren't ``kept`` when layers are fused."""
    found = [node]
    while len(found[-1].users) == 1 and (behind := next(iter(found[-1].users))).name not in kept:
        found.append(behind)
    return found


def reads(node: Node, users: Collection[str]) -> tuple[str, ...] | None:
    """Return those users of a node, by name; None if they are all that it has."""
    return None if {user.name for user in node.users} <= set(users) else tuple(users)


def called(path: str) -> str:
    """Return the path of a layer of a graph, whichever of its calls this is, or the name of a computed weight."""
    own = path.partition(AGAIN)[0]
    return "" if own == HELD else own.removeprefix(f"{HELD}.")


def own_path(path: str) -> str:
    """Return where in the module a layer of a graph, or what its weight is computed of, is."""
    return called(path).partition(COMPUTED)[0]


def is_one_of(path: str, layers: Collection[str]) -> bool:
    """Tell whether a module of a graph is one of these layers, or has its weight from within one."""
    own = own_path(path)
    return any(own == own_path(layer) or own.startswith(f"{layer}.") for layer in layers)
