"""Reference forms of modules, with ranges as wide as what one call has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from lightning_compress.quantization.static.graphs import copy_graph, evaluate_modes_, int8_layers
from lightning_compress.quantization.static.placement import TARGETS, places
from lightning_compress.quantization.static.reference import reference
from lightning_compress.quantization.static.rounding import Rounding
from lightning_compress.quantization.static.signature import Signature, canonical
from lightning_compress.quantization.static.trace import trace


class _Ranges(Interpreter):
    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.found: dict[str, tuple[float, float]] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            self.found[n.name] = min(float(value.min()), 0.0), max(float(value.max()), 0.0)
        return value


@torch.no_grad()
def reference_form(
    module: nn.Module, *args: Any, target: str = "onnxruntime", **kwargs: Any
) -> tuple[GraphModule, list[Tensor]]:
    """The reference form of a module, and the tensors of this call."""
    signature = Signature(*canonical(module.eval(), args, kwargs))
    tensors = signature.tensors(*canonical(module, args, kwargs))
    assert tensors is not None
    graph, wanted = trace(module, signature).graph, TARGETS[target]
    evaluated = copy_graph(graph)
    evaluate_modes_(evaluated)
    ranges = _Ranges(evaluated)
    ranges.run(*tensors)
    found = places(graph, int8_layers(graph), wanted)
    roundings = []
    for place in found:
        together = [ranges.found[other.after] for other in found if other.group == place.group]
        low, high = min(pair[0] for pair in together), max(pair[1] for pair in together)
        if wanted.symmetric:
            scale, zero_point = max(-low, high) / wanted.high, 0
        else:
            scale = (high - low) / (wanted.high - wanted.low)
            zero_point = round(wanted.low - low / scale)
        roundings.append(Rounding(place.after, place.users, scale, zero_point, wanted.low, wanted.high))
    return reference(graph, roundings, {}), tensors
