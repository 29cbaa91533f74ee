"""Exported graphs before they are quantized: their weights and paddings in the form in which upstream takes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from lightning_compress.quantization.static.flows.functional import in_numbers
from lightning_compress.quantization.static.flows.graphs import constants, drop_unused_, evaluate, source_of, value_read

_EXPORTED = (torch.ops.aten.linear.default, torch.ops.aten.conv1d.default, torch.ops.aten.conv2d.default)


_PADDED = {
    torch.ops.aten.conv1d.padding: torch.ops.aten.conv1d.default,
    torch.ops.aten.conv2d.padding: torch.ops.aten.conv2d.default,
}


def number_paddings_(graph: GraphModule) -> None:
    """In an exported graph, give convolutions their padding in numbers, where both sides have the same."""
    for node in graph.graph.nodes:
        if node.target in _PADDED and (weight := value_read(graph, node.args[1])) is not None:
            size: int = weight.dim() - 2
            defaults: list[Any] = [None, [1], "valid", [1], 1]
            bias, stride, padding, dilation, groups = [*list(node.args[2:]), *defaults[len(node.args) - 2 :]]
            numbers = in_numbers(padding, weight.shape[2:], [*dilation] * (size // len(dilation)))
            if not isinstance(numbers, str):
                node.target = _PADDED[node.target]
                node.args = (*node.args[:2], bias, stride, list(numbers), dilation, groups)
    graph.recompile()


@torch.no_grad()
def fold_weights_(graph: GraphModule) -> None:
    """In an exported graph, read the values that computed weights have now; see `functional.fold_layers_`."""
    constant = constants(graph)
    for node in list(graph.graph.nodes):
        weight = node.args[1] if node.target in _EXPORTED else None
        if weight in constant and weight.op != "get_attr":
            name = f"{source_of(weight)}_of_{node.name}"
            parent, _, leaf = name.rpartition(".")
            setattr(graph.get_submodule(parent), leaf, nn.Parameter(evaluate(graph, weight), requires_grad=False))
            with graph.graph.inserting_before(node):
                node.update_arg(1, graph.graph.get_attr(name))
    drop_unused_(graph, constant)
