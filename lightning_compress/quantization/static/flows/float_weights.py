"""Which matrices a graph leaves in float, and what it does with them."""

from __future__ import annotations

from collections.abc import Iterator
from types import FunctionType

from torch import nn
from torch.fx import GraphModule, Node

from lightning_compress.quantization.static.flows.functional import LAYERS
from lightning_compress.quantization.static.flows.graphs import Function, constants, name_of, value_read

_PRODUCTS = (
    *("linear", "matmul", "mm", "bmm", "mv", "addmm", "addmv", "baddbmm", "einsum", "tensordot", "bilinear"),
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    *("embedding", "embedding_bag"),
)
"""Operations whose matrix is a weight; one that is only added or looked up in is a table."""


def weights_read(graph: GraphModule) -> Iterator[tuple[str, str]]:
    """Names of the matrices that a graph reads, each with what is done with it, as a reason to be float.

    The reason is empty where it is a table.
    """
    constant = constants(graph)
    for node in graph.graph.nodes:
        value = value_read(graph, node)
        is_matrix = isinstance(value, nn.Parameter) and value.dim() > 1
        if node.users and (is_matrix or (isinstance(value, nn.Module) and any(True for _ in value.parameters()))):
            reasons = [_what(graph, user) for user in _users(node, constant)]
            yield str(node.target), next((reason for reason in reasons if reason), "")


def _users(node: Node, constant: set[Node]) -> list[Node]:
    """What brings a constant together with activations."""
    found, ahead = dict[Node, None](), [node]
    for current in ahead:
        for user in current.users:
            if user not in constant:
                found[user] = None
            elif user not in ahead:
                ahead.append(user)
    return list(found)


def _what(graph: GraphModule, node: Node) -> str:
    if node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        is_layer = isinstance(module, Function) and module.function in LAYERS
        return "its forward computes the weight, which static int8 doesn't follow" if is_layer else ""
    name = name_of(node)
    if isinstance(node.target, FunctionType) and not (node.target.__module__ or "").startswith("torch."):
        return f"`{name}` computes with it, which torch.fx doesn't see into; flow='pt2e' may"
    inside = [str(kind) for _, kind in (node.meta.get("nn_module_stack") or {}).values()][-1:]
    if name not in _PRODUCTS or "torch.nn.modules." in "".join(inside):  # of a layer its kind is the reason
        return ""
    return f"`{name}` takes it as a weight, for which there is no static int8 kernel"
