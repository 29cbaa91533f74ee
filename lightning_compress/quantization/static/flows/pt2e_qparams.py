"""What a converted graph of the flow pt2e computes with, in plain numbers: read out of it, and put into another.

Places are nodes of the exported graph, whose names upstream keeps.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from lightning_compress.quantization.static.flows.exported_weights import path_of
from lightning_compress.quantization.static.flows.flow import Rounding
from lightning_compress.quantization.static.flows.names import called, chain, reads
from lightning_compress.quantization.static.flows.pt2e_trace import Exported


def roundings(graph: nn.Module, prepared: nn.Module, floats: Collection[str] = ()) -> list[Rounding]:
    """List where a graph rounds activations once it is converted; see `Flow`."""
    found = []
    for after, users, observer in _observers(graph, prepared):
        scale, zero_point = observer.calculate_qparams()
        limits = observer.quant_min, observer.quant_max
        found.append(Rounding(after, users, float(scale), int(zero_point), *limits))
    return found


def fix_(graph: nn.Module, prepared: nn.Module, roundings: Sequence[Rounding]) -> None:
    """Let a prepared graph be converted with these scales and zero points; see `Flow`."""
    for (_, _, observer), rounding in zip(_observers(graph, prepared), roundings, strict=True):
        vars(observer)["calculate_qparams"] = rounding.qparams


def _observers(graph: nn.Module, prepared: nn.Module) -> Iterator[tuple[str, tuple[str, ...] | None, Any]]:
    """Yield the observers of activations: where in ``graph``, who reads on from there, and the observer."""
    assert isinstance(graph, Exported) and isinstance(prepared, Exported)
    places = {node.name: node for node in graph.graph.graph.nodes}
    kept = {node.name for node in prepared.graph.graph.nodes}
    for node in prepared.graph.graph.nodes:
        observer: Any = module_called(prepared.graph, node)
        if hasattr(observer, "calculate_qparams") and not hasattr(observer, "ch_axis"):  # weights are by channel
            after = chain(places[node.all_input_nodes[0].name], kept)[-1]
            yield after.name, reads(after, [user.name for user in node.users]), observer


def module_called(graph: GraphModule, node: Node) -> nn.Module | None:
    """Return the module that a node calls, if it calls one."""
    return graph.get_submodule(str(node.target)) if node.op == "call_module" else None


def weight_paths(prepared: GraphModule) -> dict[str, str]:
    """Find where in the module the layers of a prepared graph have their weights; of those that are int8."""
    found = {}
    for node in prepared.graph.nodes:
        observed = node.args[1] if len(node.args) > 1 else None
        if isinstance(observed, Node) and hasattr(module_called(prepared, observed), "ch_axis"):
            found[node.name] = path_of(observed.all_input_nodes[0])
    return found


def int8_layers(prepared: nn.Module) -> set[str]:
    """Return the paths of the layers that become int8; see `Flow`."""
    assert isinstance(prepared, Exported)
    return {called(path) for path in weight_paths(prepared.graph).values()}
