"""What a converted graph of the flow fx computes with, in plain numbers: read out of it, and put into another.

Places are nodes of the traced graph: upstream's own trace of it gives them the same names, and one kernel has the name
of the first of the nodes that it computes.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.ao.quantization.observer import _is_activation_post_process
from torch.fx import GraphModule, Node

from lightning_compress.quantization.static.flows.flow import Rounding
from lightning_compress.quantization.static.flows.graphs import name_of
from lightning_compress.quantization.static.flows.names import chain, is_one_of, reads


def roundings(graph: nn.Module, prepared: nn.Module, floats: Collection[str] = ()) -> list[Rounding]:
    """List where a graph rounds activations once it is converted; see `Flow`."""
    assert isinstance(graph, GraphModule) and isinstance(prepared, GraphModule)
    schemes = dict(prepared.meta["_observed_graph_module_attrs"].node_name_to_qconfig)
    for node in prepared.graph.nodes:
        if node.op == "call_module" and is_one_of(str(node.target), floats):
            schemes[node.name] = None
    found, known = list[Rounding](), dict[Node, tuple[Any, float, int]]()
    for node, after, users, observer in _observers(graph, prepared):
        # Upstream drops an observer between two that stay float.
        if any(schemes.get(other.name, observer) is not None for other in (*node.all_input_nodes, *node.users)):
            scale, zero_point = _given(node.all_input_nodes[0], observer, known)
            known[node] = observer, scale, zero_point
            limits = torch.iinfo(observer.dtype)
            found.append(Rounding(after, users, scale, zero_point, limits.min, limits.max))
    return found


def _given(node: Node, observer: Any, known: Mapping[Node, tuple[Any, float, int]]) -> tuple[float, int]:
    """Return the scale and zero point that a kernel gives its output.

    That of a tensor and a number changes them for the codes, and what only moves codes keeps them. There the observer
    is that of the input, and isn't asked: it would clip.
    """
    if node.op in ("call_function", "call_method") and name_of(node).startswith("relu"):
        source = node.all_input_nodes[0]
        node = node if source in known else source  # one kernel
    numbers = [value for value in node.args if isinstance(value, (int, float))]
    for source in node.all_input_nodes:
        if source in known:
            shared, scale, zero_point = known[source]
            if numbers and node.target in (operator.add, torch.add):
                return _shifted(scale, zero_point, numbers[0])
            if numbers and node.target in (operator.mul, torch.mul):
                return scale * abs(numbers[0]) or 1.0, zero_point if numbers[0] >= 0 else _LARGEST - zero_point
            if shared is observer:
                return scale, zero_point
    scale, zero_point = observer.calculate_qparams()
    return float(scale), int(zero_point)


_LARGEST = 255


def _shifted(scale: float, zero_point: int, number: float) -> tuple[float, int]:
    """Return what the kernel of a sum with a number makes of scale and zero point, in which it puts the number."""
    shifted = zero_point - round(number / scale)
    if shifted < 0:
        return scale * (_LARGEST - shifted) / _LARGEST, 0
    return (scale * shifted / _LARGEST, _LARGEST) if shifted > _LARGEST else (scale, shifted)


def fix_(graph: nn.Module, prepared: nn.Module, roundings: Sequence[Rounding]) -> None:
    """Let a prepared graph be converted with these scales and zero points; see `Flow`."""
    assert isinstance(graph, GraphModule) and isinstance(prepared, GraphModule)
    ahead, done = list(roundings), set[Any]()
    for _, after, users, observer in _observers(graph, prepared):
        if ahead and (ahead[0].after, ahead[0].users) == (after, users):
            rounding = ahead.pop(0)
            if observer not in done:  # what shares the observer of its input may have given other values: see `_given`
                vars(observer)["calculate_qparams"] = rounding.qparams
            done.add(observer)
    assert not ahead, ahead


def _observers(graph: GraphModule, prepared: GraphModule) -> Iterator[tuple[Node, str, tuple[str, ...] | None, Any]]:
    """Yield the observers of activations: the node, where it is in ``graph``, who reads on from there, and itself."""
    kept = {node.name for node in prepared.graph.nodes}
    places = {node.name: node for node in graph.graph.nodes}
    for node in prepared.graph.nodes:
        observer = prepared.get_submodule(str(node.target)) if node.op == "call_module" else None
        if observer is not None and _is_activation_post_process(observer):
            observed = node.all_input_nodes[0]
            after = chain(places[observed.name], kept)[-1]
            yield node, after.name, reads(after, [user.name for user in node.users]), observer
