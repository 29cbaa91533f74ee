"""Exported graphs as the rest of the house takes them: paths of the module, new tensors, paddings in numbers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from lightning_compress.errors import CompressionError
from lightning_compress.modules.paths import clean_name
from lightning_compress.quantization.static.graphs import aten, is_view, owner_path, value_read


class Opaque(nn.Module):
    """Calls a module of the tree, which isn't looked into."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.__dict__["module"] = module

    def forward(self, *args: Any) -> Any:
        return self.__dict__["module"](*args)


_WRAPPED = "module"


def rooted(exported: GraphModule) -> tuple[GraphModule, nn.Module]:
    """Return an exported graph with the paths in the module that was exported as a child, and its guards."""
    guards: nn.Module = nn.Identity()
    for node in list(exported.graph.nodes):
        if node.op == "call_module":  # it has no others
            guards = exported.get_submodule(str(node.target))
            exported.graph.erase_node(node)
    exported.graph.eliminate_dead_code()
    root, constant = dict[str, Any](), 0
    for node in exported.graph.nodes:
        target = str(node.target)
        if node.op == "get_attr":
            value = value_read(exported, node)
            if target.startswith(f"{_WRAPPED}."):
                node.target = target.removeprefix(f"{_WRAPPED}.")
            else:
                node.target, constant = f"constant_{constant}", constant + 1
            root[str(node.target)] = value
        if (stack := node.meta.get("nn_module_stack")) is not None:
            node.meta["nn_module_stack"] = {
                key: (clean_name(f".{path}".removeprefix(f".{_WRAPPED}").removeprefix(".")), kind)
                for key, (path, kind) in stack.items()
            }
    return GraphModule(root, exported.graph), guards


def functionalize_(graph: GraphModule) -> None:
    """Let operators make new tensors that change one in place which nothing else sees by then under another name."""
    order = {node: place for place, node in enumerate(graph.graph.nodes)}
    for node in list(graph.graph.nodes):
        packet, _, overload = getattr(node.target, "__name__", "").partition(".")
        plain = getattr(getattr(aten, packet[:-1], None), overload, None) if packet.endswith("_") else None
        changed = node.args[0] if node.args else None
        if plain is None or not isinstance(changed, Node) or changed.op != "call_function":
            continue
        names = [changed, *(user for user in changed.users if user is not node)]
        if not any(is_view(name) for name in names):
            for user in [user for user in changed.users if order[user] > order[node]]:
                user.replace_input_with(changed, node)
            node.target = plain
    graph.recompile()


_PADDED = {
    **{aten.conv1d.padding: aten.conv1d.default, aten.conv2d.padding: aten.conv2d.default},
    aten.conv3d.padding: aten.conv3d.default,
}


def number_paddings_(graph: GraphModule) -> None:
    """Give convolutions their padding in numbers; what one side has more than the other is padded before."""
    node: Any
    for node in graph.graph.nodes:
        if node.target not in _PADDED:
            continue
        size = node.args[1].meta["val"].dim() - 2
        defaults: list[Any] = [None, [1], "valid", [1], 1]
        bias, stride, padding, dilation, groups = list(node.args[2:]) + defaults[len(node.args) - 2 :]
        steps = list(dilation) * (size // len(dilation))
        kernel = node.args[1].meta["val"].shape[2:]
        total = [0 if padding == "valid" else step * (width - 1) for step, width in zip(steps, kernel, strict=True)]
        x = node.args[0]
        if any(width % 2 for width in total):
            with graph.graph.inserting_before(node):
                rest = [side for width in reversed(total) for side in (0, width % 2)]
                x = graph.graph.call_function(aten.constant_pad_nd.default, (x, rest, 0.0))
                x.meta = {**node.meta, "val": node.args[0].meta["val"]}
        node.target = _PADDED[node.target]
        node.args = (x, node.args[1], bias, stride, [width // 2 for width in total], dilation, groups)
    graph.recompile()


def hide_(graph: GraphModule, path: str, layer: nn.Module) -> None:
    """Call a layer as it is where its only operator stands.

    Raises:
        CompressionError: it has more of them.
    """
    inside = [node for node in graph.graph.nodes if node.op == "call_function" and owner_path(node) == path]
    activations = [[source for source in node.all_input_nodes if source.op != "get_attr"] for node in inside]
    if not all(
        len(sources) == 1 and sources[0] not in inside and isinstance(node.meta.get("val"), Tensor)
        for node, sources in zip(inside, activations, strict=True)
    ):
        raise CompressionError(f"its `{path}` has a scheme of its own, and is more than one operator")
    for node, sources in zip(inside, activations, strict=True):
        with graph.graph.inserting_before(node):
            call = graph.graph.create_node("call_module", path, tuple(sources))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph.graph.erase_node(node)
    for node in list(graph.graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.graph.erase_node(node)
    graph.delete_all_unused_submodules()
    graph.set_submodule(path, Opaque(layer))
    graph.recompile()
