"""The reference form of static int8: float operations of torch between activations that are rounded to 8 bits.

It needs nothing of `torch.ao`, so that what was quantized computes where that is gone, and is written down for
elsewhere.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from lightning_compress.quantization.layers.int8_weight import Int8Weight
from lightning_compress.quantization.static.flows.exported_weights import path_of, simplify_exported_
from lightning_compress.quantization.static.flows.flow import Rounding
from lightning_compress.quantization.static.flows.fx_trace import Opaque, shallow_copy, simplify_
from lightning_compress.quantization.static.flows.graphs import value_read
from lightning_compress.quantization.static.flows.names import called
from lightning_compress.quantization.static.flows.pt2e_trace import Exported, quiet

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def reference(
    graph: nn.Module,
    training: bool,
    roundings: Sequence[Rounding],
    weights: Mapping[str, nn.Module],
    computed: Collection[str] = (),
    reduced: bool = False,
) -> GraphModule:
    """Return the reference form of a traced graph, around the same tensors; the graph is left as it is.

    Args:
        graph: of a flow's trace.
        training: whether it was traced for training.
        roundings: where activations are rounded.
        weights: modules that give the weights of layers when they are called, by the layers' paths.
        computed: int8 layers whose weights are computed, and so have no codes of their own.
        reduced: whether these have 7 bits.
    """
    traced = graph.graph if isinstance(graph, Exported) else graph
    assert isinstance(traced, GraphModule)
    with quiet():  # torch warns of its own copies
        form = GraphModule(traced, copy.deepcopy(traced.graph))
    if traced is graph:
        simplify_(form, training)
    else:
        simplify_exported_(form)
    _round_(form, roundings)
    weights = {**weights, **{path: Int8Weight.nearest(_weight(form, path), reduced) for path in computed}}
    for node in list(form.graph.nodes):
        path = path_of(node) if node.op == "get_attr" else str(node.target)
        weight = weights.get(called(path))
        if node.op == "get_attr" and weight is not None:
            form.add_submodule(f"weight_{node.name}", weight)
            with form.graph.inserting_before(node):
                node.replace_all_uses_with(form.graph.call_module(f"weight_{node.name}"))
            form.graph.erase_node(node)
        elif node.op == "call_module":
            module = form.get_submodule(path)
            if isinstance(module, Opaque):
                form.set_submodule(path, shallow_copy(module.__dict__["module"]))  # where a compiler sees its tensors
            elif weight is not None and isinstance(module, _LAYERS):
                form.set_submodule(path, _Layer(shallow_copy(module), weight))
    form.recompile()
    form.delete_all_unused_submodules()
    return form.eval()


def _weight(form: GraphModule, path: str) -> Tensor:
    """Return the weight of a layer of a simplified graph."""
    reads = {path_of(node) if node.op == "get_attr" else called(str(node.target)): node for node in form.graph.nodes}
    node = reads[path]
    if node.op == "get_attr":
        return value_read(form, node)  # type: ignore[no-any-return]
    return form.get_submodule(str(node.target)).weight  # type: ignore[return-value]


def _round_(form: GraphModule, roundings: Sequence[Rounding]) -> None:
    places = {node.name: node for node in form.graph.nodes}
    for rounding in roundings:
        node = places[rounding.after]
        users = [user for user in node.users if rounding.users is None or user.name in rounding.users]
        arguments = (node, rounding.scale, rounding.zero_point, rounding.low, rounding.high)
        with form.graph.inserting_after(node):
            call = form.graph.call_function(rounded, arguments)
        for user in users:
            user.replace_input_with(node, call)


def rounded(x: Tensor, scale: float, zero_point: int, low: int, high: int) -> Tensor:
    """Return ``(clamp(round(x / scale) + zero_point, low, high) - zero_point) * scale``, in plain operators."""
    decomposed = torch.ops.quantized_decomposed
    if torch.onnx.is_in_onnx_export() and hasattr(decomposed, "quantize_per_tensor"):  # QuantizeLinear and its inverse
        options = scale, zero_point, low, high, torch.uint8 if low >= 0 else torch.int8
        return decomposed.dequantize_per_tensor(decomposed.quantize_per_tensor(x, *options), *options)  # type: ignore[no-any-return]
    return ((torch.round(x * (1.0 / scale)) + zero_point).clamp(low, high) - zero_point) * scale


class _Layer(nn.Module):
    """Computes a layer with another weight."""

    def __init__(self, layer: Any, weight: nn.Module) -> None:
        super().__init__()
        self.layer, self.weight = layer, weight
        layer._parameters["weight"] = None

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.layer, nn.Linear):
            return nn.functional.linear(x, self.weight(), self.layer.bias)
        return self.layer._conv_forward(x, self.weight(), self.layer.bias)  # type: ignore[no-any-return]
