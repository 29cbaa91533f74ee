"""Judges exported int8 graphs: layer by layer against the layers that were observed, and compiled as a whole.

Uncompiled, such a graph computes in float between two roundings; its int8 kernels are the compiler's, which fuses
layers. So what it computes uncompiled is the measure of what it computes compiled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from lightning_compress.modules.outputs import same_structure
from lightning_compress.quantization.static.flows.kernels import steps_apart

_CODES = 255  # steps in the range of an output that isn't rounded itself


@torch.no_grad()
def exported_steps(
    int8: GraphModule, observed: GraphModule, inputs: list[Tensor], generator: torch.Generator | None
) -> dict[str, float]:
    """Measure how far each layer of a converted graph is off the layer that was observed, given the same inputs."""
    converted = _Converted(int8, generator)
    converted.run(*inputs)
    layers = _Observed(observed, converted)
    layers.run(*inputs)
    return layers.steps


def _rounds(node: Node) -> bool:
    return str(node.target).startswith("quantized_decomposed.quantize_per_tensor")


class _Converted(Interpreter):
    """Runs a converted graph, and keeps what each operation gives and what each rounding passes on."""

    def __init__(self, graph: GraphModule, generator: torch.Generator | None) -> None:
        super().__init__(graph)
        self._generator = generator
        self.given: dict[str, Tensor] = {}
        self.rounded: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if _rounds(n):
            scale, zero_point, low, high = self.fetch_args_kwargs_from_env(n)[0][1:5]
            if self._generator is not None:
                codes = torch.randint(low, high + 1, value.shape, generator=self._generator)
                value = codes.to(value.dtype)
            self.rounded[n.all_input_nodes[0].name] = (value.float() - zero_point) * scale
        elif n.op == "call_function" and isinstance(value, Tensor):
            self.given[n.name] = value.clone()  # what comes behind may work in place
        return value


class _Observed(Interpreter):
    """Runs an observed graph with the roundings of a converted one, and compares what each operation gives."""

    def __init__(self, graph: GraphModule, converted: _Converted) -> None:
        super().__init__(graph)
        self._converted = converted
        self.steps: dict[str, float] = {}

    def run_node(self, n: Node) -> Any:
        if n.op == "call_module" and hasattr(observer := self.fetch_attr(str(n.target)), "calculate_qparams"):
            values = self.fetch_args_kwargs_from_env(n)[0][0]
            rounded = self._converted.rounded.get(n.all_input_nodes[0].name)
            return _fake_quantized(values, observer) if rounded is None else rounded.clone()
        value = super().run_node(n)
        given = self._converted.given.get(n.name) if n.op == "call_function" else None
        if given is None or not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        finite = value.isfinite()
        step = (value[finite].max() - value[finite].min()).abs() / _CODES if finite.any() else torch.ones(())
        path, far = _layer_of(n), steps_apart(given, value, step.clamp(min=1e-12), finite)
        self.steps[path] = max(far, self.steps.get(path, 0.0))
        return given.clone()


def _fake_quantized(weight: Tensor, observer: Any) -> Tensor:
    scale, zero_point = observer.calculate_qparams()
    limits = observer.quant_min, observer.quant_max
    if scale.numel() == 1:
        return torch.fake_quantize_per_tensor_affine(weight, scale.float(), zero_point.int(), *limits)
    return torch.fake_quantize_per_channel_affine(weight, scale.float(), zero_point.int(), observer.ch_axis, *limits)


def _layer_of(node: Node) -> str:
    """Return the path of the layer of torch that an operation came from; empty for a function."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path, kind = stack[-1] if stack else ("", "")
    return str(path).removeprefix("module.") if str(kind).startswith("torch.nn.modules.") else ""


@torch.no_grad()
def compiled_is_off(graph: GraphModule, inputs: tuple[Tensor, ...], compiled: Any) -> str:
    """Say why rounding can't explain what a compiled graph gave; empty if it can.

    A kernel may put any activation one code beside where the uncompiled graph has it. So the outputs may move as far
    as they do when all activations are put one code aside, at random.
    """
    expected, moved = graph(*inputs), _OneAside(graph).run(*inputs)
    if not same_structure(expected, compiled):
        return "it gives outputs of another structure"
    for leaf, aside, got in zip(*map(pytree.tree_leaves, (expected, moved, compiled)), strict=True):
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or not leaf.numel():
            continue
        finite = leaf.isfinite() & aside.isfinite()
        error, explained = ((other - leaf)[finite].double().square().mean().sqrt().item() for other in (got, aside))
        tolerance = 1e-3 * leaf[finite].double().square().mean().sqrt().nan_to_num(0.0).item()
        if finite.any() and not error <= explained + tolerance:
            return f"it computes something else, by {error:.2g} where rounding explains {explained:.2g}"
    return ""


class _OneAside(Interpreter):
    """Runs a converted graph with every activation one code beside its own."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self._generator = torch.Generator().manual_seed(0)

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if not _rounds(n):
            return value
        low, high = self.fetch_args_kwargs_from_env(n)[0][3:5]
        aside = torch.randint(0, 2, value.shape, generator=self._generator) * 2 - 1
        return (value.int() + aside).clamp(low, high).to(value.dtype)
