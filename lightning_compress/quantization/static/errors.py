"""How much rounding changes what each layer of a calibrated unit gives, alone: its inputs and its weight."""

from __future__ import annotations

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
