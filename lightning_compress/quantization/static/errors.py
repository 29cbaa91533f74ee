"""How much rounding changes what each layer of a calibrated unit gives, or the unit itself, by that layer alone."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from lightning_compress.quantization.static.graphs import int8_layers, own_path
from lightning_compress.quantization.static.rounding import ActivationQuantizer, WeightQuantizer
from lightning_compress.quantization.static.traced import Traced


@torch.no_grad()
def layer_errors(form: Traced, tensors: list[Tensor]) -> dict[str, float]:
    """Return ``|y' - y|^2 / |y|^2`` by layer: y of exact inputs and weight, y' of the same, rounded.

    Args:
        form: knows the ranges.
        tensors: of a call.
    """
    run = _Run(form)
    run.run(*tensors)
    return run.errors


class _Run(Interpreter):
    def __init__(self, form: Traced) -> None:
        super().__init__(form.graph, garbage_collect_values=False)
        self._layers = int8_layers(form.trace.graph, form.unit.floats)
        self._paths = {node.name: own_path(path) for node, path in self._layers.items()}
        self._weight = WeightQuantizer(form.scheme.largest_code)
        self.errors: dict[str, float] = {}

    def run_node(self, n: Node) -> Any:
        if n.op == "call_module" and isinstance(self.fetch_attr(str(n.target)), ActivationQuantizer | WeightQuantizer):
            return self.fetch_args_kwargs_from_env(n)[0][0]  # exact, for what comes behind
        value = super().run_node(n)
        if n.name in self._paths:
            x, weight, *rest = self.fetch_args_kwargs_from_env(n)[0]
            got = n.target(self._rounded(n.args[0], x), self._weight(weight), *rest)  # type: ignore[operator]
            error = ((got - value).square().sum() / value.square().sum().clamp_min(1e-12)).item()
            self.errors[self._paths[n.name]] = max(error, self.errors.get(self._paths[n.name], 0.0))
        return value

    def _rounded(self, node: Any, exact: Any) -> Any:
        """Return the value of a node if what it passes on is rounded; else the ``exact`` one."""
        if node.op == "call_module" and isinstance(quantizer := self.fetch_attr(node.target), ActivationQuantizer):
            return quantizer.round(exact)
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
            return exact
        source = node.args[0]
        before = self._rounded(source, self.env[source])
        return (
            node.target(before, *self.fetch_args_kwargs_from_env(node)[0][1:])
            if before is not self.env[source]
            else exact
        )


def layers_of(form: Traced) -> list[str]:
    """Return the paths of a unit's int8 layers, from the unit."""
    return list(dict.fromkeys(map(own_path, int8_layers(form.trace.graph, form.unit.floats).values())))


def round_alone_(form: Traced, layer: str) -> None:
    """Let a calibrated unit, of a copy that is thrown away, compute with one layer in int8 and no other.

    Its weight is rounded, and what it reads and gives wherever that is rounded.
    """
    run = _Alone(form, layer)
    vars(form)["run"] = lambda training, tensors: form.trace.structure.rebuild(run.run(*tensors))


class _Alone(Interpreter):
    def __init__(self, form: Traced, path: str) -> None:
        super().__init__(form.graph)
        self._weight = WeightQuantizer(form.scheme.largest_code)
        layers = int8_layers(form.trace.graph, form.unit.floats)
        everyone = {node.name for node in layers}
        self._names = {node.name for node, own in layers.items() if own_path(own) == path}
        self._rounds = {
            node.name
            for node in form.graph.graph.nodes
            if self._is(node, ActivationQuantizer) and self._names & _before(node, everyone)
        } | {
            source.name
            for node in form.graph.graph.nodes
            if node.name in self._names and (source := self._source(node)) is not None
        }

    def _is(self, node: Node, *kinds: type) -> bool:
        return node.op == "call_module" and isinstance(self.fetch_attr(str(node.target)), kinds)

    def _source(self, layer: Node) -> Node | None:
        """Return the quantizer whose value a layer reads, as it is or moved; None if it reads exact values."""
        node: Any = layer.args[0]
        while isinstance(node, Node) and not self._is(node, ActivationQuantizer):
            node = node.args[0] if node.op == "call_function" and node.args else None
        return node if isinstance(node, Node) else None

    def run_node(self, n: Node) -> Any:
        if self._is(n, ActivationQuantizer, WeightQuantizer):
            exact = self.fetch_args_kwargs_from_env(n)[0][0]
            return self.fetch_attr(str(n.target)).round(exact) if n.name in self._rounds else exact
        if n.name in self._names:
            x, weight, *rest = self.fetch_args_kwargs_from_env(n)[0]
            return n.target(x, self._weight(weight), *rest)  # type: ignore[operator]
        return super().run_node(n)


def _before(node: Node, layers: Collection[str]) -> set[str]:
    """Return those ``layers`` whose value comes to a node without another layer between."""
    found, ahead = set[str](), list(node.all_input_nodes)
    while ahead:
        source = ahead.pop()
        if source.name in layers:
            found.add(source.name)
        else:
            ahead += source.all_input_nodes
    return found
