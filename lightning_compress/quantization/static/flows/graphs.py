"""Layers that are written as functions, and weights that are computed: what a graph reads, and what replaces it.

Functions that can be become layers of torch; the others are hidden in modules, which upstream leaves in float.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized
from torch.utils import _pytree as pytree

from lightning_compress.quantization.static.flows.names import AGAIN, COMPUTED


class Function(nn.Module):
    """Wraps a function as a module, which upstream takes for a float layer."""

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
    """Return the nodes that are computed of the graph's own tensors alone."""
    found: set[Node] = set()
    for node in graph.graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "get_attr" or (node.op != "output" and inputs and all(source in found for source in inputs)):
            found.add(node)
    return found


def evaluate(graph: GraphModule, node: Node, known: dict[Node, Any] | None = None) -> Any:
    """Return the value of a node among the `constants`."""
    known = {} if known is None else known
    if node in known:
        return known[node]
    args, kwargs = map_arg((node.args, node.kwargs), lambda source: evaluate(graph, source, known))
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
    """Return the name of the first tensor that a constant is computed of."""
    while node.op != "get_attr":
        node = node.all_input_nodes[0]
    return str(node.target)


def value_read(graph: GraphModule, node: Node) -> Any:
    """Return the tensor (or module) that a node reads; None if it doesn't read one."""
    value: Any = graph if node.op == "get_attr" else None
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    return value


def name_of(node: Node) -> str:
    """Find what a node calls, without its namespace."""
    return str(getattr(node.target, "__name__", node.target)).partition(".")[0]


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
            found = [value_read(graph, part) for part in (weight, bias) if part is not None]
            if all(isinstance(value, nn.Parameter) for value in found):
                _call_layer_(graph, node, str(weight.target), *found)  # type: ignore[union-attr]


def _settle_kinds_(graph: GraphModule) -> None:
    """Find what is read of a tensor's type, shape and device doesn't need the tensor, which int8 takes away."""
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
    return map_arg(tree, lambda leaf: value if leaf is node else leaf)


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
                _call_layer_(graph, node, f"{source_of(parts[0])}{COMPUTED}{node.name}", *values)
    drop_unused_(graph, constant)


@torch.no_grad()
def without_parametrization(layer: nn.Module) -> nn.Module | None:
    """Return a layer of torch with the weight that a parametrization gives this one now; None if it isn't so."""
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
    if (layer := _layer(node, weight, bias)) is not None:
        layer.train(graph.training)
        replace_(graph, node, source.removesuffix(".weight"), layer, (node_of(node, "input"),), {})


def _layer(node: Node, weight: Any, bias: Any) -> nn.Module | None:
    """Return the layer that a function is with these parameters; None where its options are computed."""
    options = {name: value for name in _NAMES[3:] if (value := _argument(node, name)) is not None}
    if any(isinstance(leaf, Node) for leaf in pytree.tree_leaves(options)):
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
    """Return the node of an argument of a layer that is written as a function, if it is one."""
    value = _argument(node, name)
    return value if isinstance(value, Node) else None


def with_padding_in_numbers(layer: nn.Module) -> nn.Module:
    """Write the padding of a convolution of padding ``same`` in numbers, where both sides have the same."""
    if isinstance(layer, _ConvNd) and isinstance(layer.padding, str):
        layer.padding = in_numbers(layer.padding, layer.kernel_size, layer.dilation)
    return layer


def in_numbers(padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> Any:
    """Write ``padding`` (``same`` or ``valid``) as a number for each dimension; keep it where its sides differ."""
    both = [0 if padding == "valid" else (size - 1) * step for size, step in zip(kernel, dilation, strict=True)]
    return padding if any(size % 2 for size in both) else tuple(size // 2 for size in both)


_PRODUCTS = (
    *("linear", "matmul", "mm", "bmm", "mv", "addmm", "addmv", "baddbmm", "einsum", "tensordot", "bilinear"),
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    *("embedding", "embedding_bag"),
)
"""Operations whose matrix is a weight; one that is only added or looked up in is a table."""


def weights_read(graph: GraphModule) -> Iterator[tuple[str, str]]:
    """Yield names of the matrices that a graph reads, each with what is done with it, as a reason to be float.

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
    """Find what brings a constant together with activations."""
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
