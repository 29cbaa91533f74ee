"""Exported graphs before they are quantized: weights, paddings and sources in the form in which upstream takes them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from lightning_compress.quantization.static.flows.graphs import (
    constants,
    drop_unused_,
    evaluate,
    in_numbers,
    source_of,
    value_read,
)
from lightning_compress.quantization.static.flows.names import AGAIN, COMPUTED, is_one_of

LAYERS: tuple[Any, ...] = (
    *(torch.ops.aten.linear.default, torch.ops.aten.conv1d.default, torch.ops.aten.conv2d.default),
    *(torch.ops.aten.conv1d.padding, torch.ops.aten.conv2d.padding),
)
_PADDED = {
    torch.ops.aten.conv1d.padding: torch.ops.aten.conv1d.default,
    torch.ops.aten.conv2d.padding: torch.ops.aten.conv2d.default,
}


def simplify_exported_(graph: GraphModule) -> None:
    """Give an exported graph weights and paddings in the form in which upstream takes them."""
    _number_paddings_(graph)
    _fold_weights_(graph)
    _part_weights_(graph)


def path_of(tensor: Node) -> str:
    """Return the path in the module of the layer whose weight a node reads, or that of a weight of no layer."""
    return str(tensor.target).removeprefix("module.").removesuffix(".weight")


def _number_paddings_(graph: GraphModule) -> None:
    """Give convolutions of an exported graph their padding in numbers, where both sides have the same."""
    for node in graph.graph.nodes:
        if node.target in _PADDED and (weight := value_read(graph, node.args[1])) is not None:
            size: int = weight.dim() - 2
            defaults: list[Any] = [None, [1], "valid", [1], 1]
            bias, stride, padding, dilation, groups = [*list(node.args[2:]), *defaults[len(node.args) - 2 :]]
            sizes = in_numbers(padding, weight.shape[2:], [*dilation] * (size // len(dilation)))
            if not isinstance(sizes, str):
                node.target = _PADDED[node.target]
                node.args = (*node.args[:2], bias, stride, list(sizes), dilation, groups)
    graph.recompile()


@torch.no_grad()
def _fold_weights_(graph: GraphModule) -> None:
    """Read the values that computed weights of an exported graph have now; see `graphs.fold_layers_`."""
    constant = constants(graph)
    for node in list(graph.graph.nodes):
        weight = node.args[1] if node.target in LAYERS else None
        if weight in constant and weight.op != "get_attr":
            name = f"{source_of(weight)}{COMPUTED}{node.name}"
            parent, _, leaf = name.rpartition(".")
            setattr(graph.get_submodule(parent), leaf, nn.Parameter(evaluate(graph, weight), requires_grad=False))
            with graph.graph.inserting_before(node):
                node.update_arg(1, graph.graph.get_attr(name))
    drop_unused_(graph, constant)


def _part_weights_(graph: GraphModule) -> None:
    """Give each call of a layer a weight and a bias of its own where a BatchNorm is to be folded into one of them."""
    for shared in [node for node in graph.graph.nodes if node.op == "get_attr"]:
        layers = [user for user in shared.users if user.target in LAYERS and user.args[1] is shared]
        if not any(behind.target is torch.ops.aten.batch_norm.default for layer in layers for behind in layer.users):
            continue
        for count, layer in enumerate(layers[1:], 2):
            path = f"{str(shared.target).removesuffix('.weight')}{AGAIN}{count}"
            graph.add_submodule(path, nn.Module())
            for place, name in enumerate(("weight", "bias"), 1):
                if place < len(layer.args) and (read := layer.args[place]) is not None:
                    values = nn.Parameter(value_read(graph, read).detach(), requires_grad=False)
                    graph.get_submodule(path).register_parameter(name, values)
                    with graph.graph.inserting_before(layer):
                        layer.update_arg(place, graph.graph.get_attr(f"{path}.{name}"))
    graph.recompile()


_SOURCES = {
    **{torch.ops.aten.linear.default: nn.Linear},
    **{torch.ops.aten.conv1d.default: nn.Conv1d, torch.ops.aten.conv2d.default: nn.Conv2d},
    **{torch.ops.aten.relu.default: nn.ReLU, torch.ops.aten.relu_.default: nn.ReLU},
    **{torch.ops.aten.relu6.default: nn.ReLU6, torch.ops.aten.relu6_.default: nn.ReLU6},
    **{torch.ops.aten.hardtanh.default: nn.Hardtanh, torch.ops.aten.hardtanh_.default: nn.Hardtanh},
    **{torch.ops.aten.hardswish.default: nn.Hardswish, torch.ops.aten.hardswish_.default: nn.Hardswish},
    **{torch.ops.aten.silu.default: nn.SiLU, torch.ops.aten.silu_.default: nn.SiLU},
    **{torch.ops.aten.leaky_relu.default: nn.LeakyReLU, torch.ops.aten.leaky_relu_.default: nn.LeakyReLU},
    **{torch.ops.aten.gelu.default: nn.GELU, torch.ops.aten.tanh.default: nn.Tanh},
}
"""The layers by which upstream's quantizer knows operations, for itself and in patterns that it fuses."""


def name_sources_(graph: GraphModule, floats: Collection[str]) -> None:
    """Give each operation a source of its own, by what it computes.

    Upstream goes by the module that called it: the calls of one module would be one operation, and those in a layer of
    the user's own, or in attention, none that it knows.
    """
    for node in graph.graph.nodes:
        source = _SOURCES.get(node.target, node.target)
        if source in (nn.Linear, nn.Conv1d, nn.Conv2d):
            weight = node.args[1]
            # There are no codes of what anything else reads, too.
            is_own = weight.op == "get_attr" and all(user.target in LAYERS for user in weight.users)
            if not is_own or is_one_of(path_of(weight), floats):
                source = node.target
        node.meta["source_fn_stack"] = [(node.name, source)]
