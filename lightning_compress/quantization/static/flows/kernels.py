"""Judges the int8 kernels of a converted graph one by one, by what each one's own rounding explains.

A flow has a second, slow graph of the same function, whose layers compute in float between two roundings. Each of them
is given the inputs that the int8 kernel had, so what is left between the two is rounding, or the kernel is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

STEPS = 2.0
"""Steps of its output that rounding explains. A kernel and its layer round the same sum, which float32 may put on the
other side of a code's border: that is one step; the other is for kernels that round their bias too."""

_SAMPLES = (1, 3)

Run = Callable[[list[Tensor], torch.Generator | None], dict[str, float]]
"""Takes the tensors of a call and what draws the activations (None: they are what they are); returns path and steps."""


def furthest(run: Run, inputs: Sequence[Tensor], drawn_only: bool = False) -> dict[str, float]:
    """Measure how far each layer's kernel is off at most, in steps of its output, over several runs.

    A kernel that reads memory that isn't its own is right by chance at times, and any kernel is right on zeros: so
    further runs have other batch sizes, and activations that are drawn from all codes. With ``drawn_only`` there is no
    run with the activations as they are.
    """
    runs = [] if drawn_only else [run(list(inputs), None)]
    several = list(_other_sizes(inputs))
    drawn = [steps for seed, tensors in enumerate(several) if (steps := _try(run, tensors, seed)) is not None]
    if not drawn and (steps := _try(run, list(inputs), 0)) is not None:
        drawn = [steps]
    worst: dict[str, float] = {}
    for steps in (*runs, *drawn):
        worst |= {path: max(value, worst.get(path, 0.0)) for path, value in steps.items()}
    return worst


def _other_sizes(inputs: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    sizes = {len(tensor) for tensor in inputs if tensor.dim()}
    if len(sizes) == 1 and all(sizes):
        for samples in _SAMPLES:
            rows = torch.arange(samples) % min(sizes)
            yield [tensor[rows] if tensor.dim() else tensor for tensor in inputs]


def _try(run: Run, inputs: list[Tensor], seed: int) -> dict[str, float] | None:
    try:
        return run(inputs, torch.Generator().manual_seed(seed))
    except Exception:  # not every graph takes other sizes, or values that no layer before them gave
        return None


def reasons(steps: Mapping[str, float], kinds: Mapping[str, str]) -> dict[str, str]:
    """Return the layers whose kernels are further off than rounding explains, each with the reason why it isn't used.

    The path is empty where a kernel is no layer's.
    """
    return {
        path: f"its int8 kernel{f' of {kinds[path]}' if path in kinds else ''} computes something else than the layer, "
        f"by {value:.0f} steps of its output"
        for path, value in steps.items()
        if value > STEPS
    }


def steps_apart(got: Tensor, expected: Tensor, step: float | Tensor, where: Tensor) -> float:
    """Return the largest difference of two tensors in units of ``step``, ``where`` it counts; inf for other shapes."""
    if got.shape != expected.shape:
        return math.inf
    difference = ((got - expected).abs() / step)[where]
    return difference.nan_to_num(math.inf).max().item() if difference.numel() else 0.0


# Graphs with kernels of torch.ao: activations are quantized tensors, and a kernel is a node.


@torch.no_grad()
def quantized_steps(
    int8: GraphModule, reference: GraphModule, inputs: list[Tensor], generator: torch.Generator | None
) -> dict[str, float]:
    """Measure how far each kernel of ``int8`` is off its layer in ``reference``; nodes have their names as traces."""
    kernels = _Kernels(int8, generator)
    kernels.run(*inputs)
    layers = _Layers(reference, kernels)
    layers.run(*inputs)
    return layers.steps


class _Kernels(Interpreter):
    """Runs an int8 graph and keeps what each kernel gives, and what goes on from there in its place."""

    def __init__(self, graph: GraphModule, generator: torch.Generator | None) -> None:
        super().__init__(graph)
        self._generator = generator
        self.given: dict[str, Tensor] = {}
        self.passed_on: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if not isinstance(value, Tensor) or not value.is_quantized:
            return value
        names = {n.name, n.stack_trace or n.name}
        self.given |= dict.fromkeys(names, value.clone())
        if self._generator is not None:
            codes = value.int_repr()
            limits = torch.iinfo(codes.dtype)
            codes.random_(limits.min, limits.max + 1, generator=self._generator)
            value = torch._make_per_tensor_quantized_tensor(codes, value.q_scale(), value.q_zero_point())
        self.passed_on |= dict.fromkeys(names, value.clone())  # a kernel behind it may work in place
        return value


class _Layers(Interpreter):
    """Runs a reference graph with the activations of the int8 graph, and compares what each layer makes of them."""

    def __init__(self, graph: GraphModule, kernels: _Kernels) -> None:
        super().__init__(graph)
        self._kernels = kernels
        self.steps: dict[str, float] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.target is not torch.quantize_per_tensor:
            return value
        between = [n, *_between_roundings(n)]
        name = next((node.name for node in between if node.name in self._kernels.given), None)
        if name is None:
            return value
        before = self.fetch_args_kwargs_from_env(n)[0][0]
        # What only passes codes on keeps those that this rounding would clip.
        given = _clipped_as(value, self._kernels.given[name].dequantize())
        far = steps_apart(given, value.dequantize(), value.q_scale(), before.isfinite())
        for path in [str(node.target) for node in between if node.op == "call_module"] or [""]:
            self.steps[path] = max(far, self.steps.get(path, 0.0))
        return self._kernels.passed_on[name].clone()


def _clipped_as(rounded: Tensor, values: Tensor) -> Tensor:
    limits, zero_point = torch.iinfo(rounded.int_repr().dtype), rounded.q_zero_point()
    return values.clamp(*(rounded.q_scale() * (limit - zero_point) for limit in (limits.min, limits.max)))


def _between_roundings(rounding: Node) -> list[Node]:
    """Return the nodes that compute in float what ``rounding`` rounds, the last first."""
    found: list[Node] = []
    ahead = list(rounding.all_input_nodes[:1])
    while ahead:
        node = ahead.pop(0)
        if node.op in ("placeholder", "get_attr") or node.target == "dequantize" or node in found:
            continue
        found.append(node)
        ahead += node.all_input_nodes
    return found
