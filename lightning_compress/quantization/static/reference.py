"""The reference form of static int8: float operations of torch between activations that are rounded to 8 bits.

It is what a trace, roundings and codes stand for. Kernels are made of it, and it is written down for other runtimes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from lightning_compress.quantization.layers.int8_weight import Int8Weight, Rescaled
from lightning_compress.quantization.static.graphs import (
    aten,
    copy_graph,
    evaluate,
    evaluate_modes_,
    int8_layers,
    read_through_,
)
from lightning_compress.quantization.static.rounding import Rounding, rounded


@torch.no_grad()
def reference(
    graph: GraphModule,
    roundings: Sequence[Rounding],
    weights: Mapping[str, Any],
    floats: Collection[str] = (),
    reduced: bool = False,
) -> GraphModule:
    """Return the reference form of a traced graph, around the same tensors; the graph is left as it is.

    A BatchNorm behind an int8 layer is folded into the scales of its weight, and into its bias: ``γ / σ`` multiplies
    the scales, whose sign may change, and the codes stay.

    Args:
        graph: of a `Trace`.
        roundings: where activations are rounded.
        weights: the codes of layers, by their paths. Of a layer that isn't here, whose weight is computed, they are
            made of the weight as it is now.
        floats: paths of what stays float.
        reduced: whether these have 7 bits.
    """
    form = copy_graph(graph)
    layers = int8_layers(form, floats)
    nodes = {node.name: node for node in form.graph.nodes}
    for rounding in roundings:
        numbers = rounding.scale, rounding.zero_point, rounding.low, rounding.high
        read_through_(form, nodes[rounding.after], rounding.users, "call_function", rounded, *numbers)
    evaluate_modes_(form)
    for layer, path in layers.items():
        codes = weights.get(path) or Int8Weight.nearest(evaluate(form, layer.args[1]), reduced)  # type: ignore[arg-type]
        norm = _norm_behind(layer)
        if norm is not None:
            codes = _fold_(form, layer, norm, codes)
        form.add_submodule(f"weight_{layer.name}", codes)
        with form.graph.inserting_before(layer):
            layer.update_arg(1, form.graph.call_module(f"weight_{layer.name}"))
    for node in reversed(list(form.graph.nodes)):
        if not node.users and node.op in ("get_attr", "call_function") and not node.is_impure():
            form.graph.erase_node(node)
    form.recompile()
    form.delete_all_unused_submodules()
    return form.eval()


def _norm_behind(layer: Node) -> Node | None:
    """Return the BatchNorm with statistics that alone reads a layer's output, by the layer's own channels."""
    behind = next(iter(layer.users), None)
    if len(layer.users) != 1 or behind is None or behind.target is not aten.batch_norm.default or behind.args[5]:
        return None
    return None if layer.target is aten.linear.default and layer.meta["val"].dim() != 2 else behind


def _fold_(form: GraphModule, layer: Node, norm: Node, codes: Any) -> Rescaled:
    reads: Any = norm.args
    values: Any = (None if source is None else evaluate(form, source) for source in reads[1:5])
    gamma, beta, mean, variance = values
    ratio = (variance + reads[7]).rsqrt() * (1.0 if gamma is None else gamma)
    before: Any = layer.args[2] if len(layer.args) > 2 else None
    bias = mean.neg() if before is None else evaluate(form, before) - mean
    form.register_buffer(f"bias_{layer.name}", (bias * ratio + (0.0 if beta is None else beta)).detach())
    with form.graph.inserting_before(layer):
        read = form.graph.get_attr(f"bias_{layer.name}")
    layer.args = (*layer.args[:2], read, *layer.args[3:])
    norm.replace_all_uses_with(layer)
    form.graph.erase_node(norm)
    return Rescaled(codes, codes.scale * ratio)
