"""Gives the channels between two layers like ranges before calibration; the float function stays what it was.

Works on the traced form of a module, whose parameters are the module's own: it is they that change.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from lightning_compress.modules.outputs import cosine, same_outputs
from lightning_compress.quantization.static.graphs import aten, copy_graph, owner_path, value_read

ALPHA = 0.5
"""How much of an outlier's range moves from the activations into the weights."""

_ROUNDS = 20
_LIKENESS = 0.999
_LINEAR, _NORM, _LAYER_NORM = aten.linear.default, aten.batch_norm.default, aten.layer_norm.default
_CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
_RELU6 = ((aten.relu6.default, ()), (aten.hardtanh.default, (0, 6)))
# All f with f(s x) = s f(x) for each channel's s > 0: elementwise, or over the positions of one channel.
_ELEMENTWISE = [getattr(aten, name).default for name in ("relu", "leaky_relu", "prelu", "contiguous")]
_POOLS = [f"{kind}_pool{size}d" for kind in ("max", "avg", "adaptive_avg") for size in (1, 2, 3)]
_OF_ONE_ROW = (aten.unsqueeze.default, aten.squeeze.dim)  # around pools of one dimension, see `trace`
_POOLING = [getattr(aten, name).default for name in _POOLS]
_PADDING = [(aten.pad.default, (mode,)) for mode in ("reflect", "replicate", "circular")]
# These leave a vector in which the values of each channel lie together.
_FLATTENING: list[Any] = [(aten.flatten.using_ints, (1,)), (aten.flatten.using_ints, (1, -1))]
_FLATTENING += [(aten.mean.dim, (dims,)) for dims in ([2, 3], [-2, -1], [-1, -2])]


@torch.no_grad()
def adjust_(
    graph: GraphModule, inputs: list[Tensor], fixed: set[int], *, equalize: bool, smooth: bool, widen: bool
) -> tuple[list[str], Moved]:
    """Equalize and smooth a traced graph; return the ReLU6 to be made ReLU, and what was moved between layers.

    The outputs are compared before and after: where ReLU for ReLU6 changes them, or anything else does, the weights are
    put back. The graph is one in evaluation, of a module whose parameters change in place, but for those with ``fixed``
    ids: excluded ones, and those that have other owners. To ``widen`` is to make ReLU of ReLU6, which `widen_` does.
    """
    before = list(graph(*inputs))
    weights = {parameter: parameter.clone() for parameter in graph.parameters()}
    for wider in (True, False) if widen and equalize else (False,):
        accepted, trial, relu6, moved = False, copy_graph(graph), list[str](), Moved()
        try:
            relu6 = equalize_(trial, fixed, wider, moved) if equalize else []
            widen_(trial, relu6)
            if smooth:
                smooth_(trial, fixed, inputs, moved)
            after = list(trial(*inputs))
            accepted = cosine(before, after) >= _LIKENESS if relu6 else same_outputs(before, after)
        finally:
            if not accepted:
                for parameter, weight in weights.items():
                    parameter.copy_(weight)
        if accepted:
            return relu6, moved
    return [], Moved()


class Moved(dict[Tensor, dict[str, Tensor]]):
    """Holds by which scales the outputs (``out``) and inputs (``in``) of the layers with these weights were divided."""

    def add(self, layer: Layer, side: str, scales: Tensor) -> None:
        """Note one more division."""
        found = self.setdefault(layer.weight, {})
        found[side] = found[side] * scales if side in found else scales


@dataclass(frozen=True, eq=False)
class Layer:
    """Holds the parameters of an operation, the groups of a convolution, and the deviations a BatchNorm divides by."""

    weight: Tensor
    bias: Tensor | None
    groups: int = 1
    deviation: Tensor | float = 1.0

    def by_input(self, channels: int) -> Tensor:
        """View the weight as ``(groups, outputs, inputs of a group, rest)``; flattened inputs are the rest."""
        return self.weight.view(self.groups, len(self.weight) // self.groups, channels // self.groups, -1)

    def divide_outputs_(self, scales: Tensor, moved: Moved) -> None:
        """Divide each output by its scale."""
        self.weight.div_(scales.view(-1, *[1] * (self.weight.dim() - 1)))
        if self.bias is not None:
            self.bias.div_(scales)
        moved.add(self, "out", scales)

    def multiply_inputs_(self, scales: Tensor, moved: Moved) -> None:
        """Take inputs that are divided by the scales of their channels."""
        self.by_input(len(scales)).mul_(scales.view(self.groups, 1, -1, 1))
        inputs = self.weight.shape[1] * self.groups
        moved.add(self, "in", scales.repeat_interleave(inputs // len(scales)))


@dataclass(frozen=True)
class Pair:
    """Pairs two layers with nothing between them that isn't positively homogeneous in each channel.

    Attributes:
        first: a convolution or linear layer.
        norm: the BatchNorm behind it, or None.
        second: the layer that reads its output alone.
        relu6: paths of the modules with a ReLU6 between them, which must become ReLU for the pair to hold.
    """

    first: Layer
    norm: Layer | None
    second: Layer
    relu6: tuple[str, ...] = ()

    def scales(self) -> Tensor:
        """Find ``s = sqrt(r1 / r2)`` for each channel, of ranges r1 of the first and r2 of the second layer's weights.

        Divided by their geometric mean: see `_centred`.
        """
        r1 = self.first.weight.abs().flatten(1).amax(dim=1)
        if self.norm is not None:
            r1 = r1 * self.norm.weight.abs() / self.norm.deviation
        r2 = self.second.by_input(len(r1)).abs().amax(dim=(1, 3)).flatten()
        return _centred((r1 / r2).sqrt())


def _centred(scales: Tensor) -> Tensor:
    """Return scales whose geometric mean is 1; 1 for channels without a range.

    A factor that all channels share changes no rounding, for each tensor is quantized with a scale of its own; but it
    would change how far an optimizer's step moves the two layers, which costs a fit that begins with random weights.
    """
    usable = (scales > 0) & scales.isfinite()
    mean = scales[usable].log().mean().exp()
    return torch.where(usable, scales / mean, 1.0).clamp(1e-4, 1e4)


@torch.no_grad()
def equalize_(graph: GraphModule, fixed: set[int], widen: bool, moved: Moved) -> list[str]:
    """Equalize all pairs of layers of a traced ``graph`` in evaluation; returns the ReLU6 that are to become ReLU.

    Each channel i of ``W2 f(W1 x)`` is divided by ``s_i`` in ``W1`` and multiplied by it in ``W2``, which leaves the
    function as it is and both ranges equal, but for a factor that all channels share: each layer keeps its mean range.
    Chains of layers are gone through until nothing moves. To ``widen`` is to do it also across ReLU6, which isn't
    homogeneous.

    References:
        Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019
        (arXiv:1906.04721), section 4.1, equation 11, divided by the geometric mean over the channels.
    """
    found = [pair for pair in pairs(graph, fixed) if widen or not pair.relu6]
    for _ in range(_ROUNDS):
        furthest = 0.0
        for pair in found:
            scales = pair.scales()
            (pair.norm or pair.first).divide_outputs_(scales, moved)
            pair.second.multiply_inputs_(scales, moved)
            furthest = max(furthest, scales.log().abs().max().item())
        if furthest < 1e-2:
            break
    return sorted({path for pair in found for path in pair.relu6})


def pairs(graph: GraphModule, fixed: set[int]) -> Iterator[Pair]:
    """Yield the pairs of layers of ``graph`` that can be equalized."""
    layer = _OwnLayers(graph, fixed)
    calls = Counter(owner_path(node) for node in graph.graph.nodes if _is_relu6(node))

    for node in graph.graph.nodes:
        if (first := layer(node, (*_CONVOLUTIONS, _LINEAR))) is None:
            continue
        norm, relu6, flat, current = None, list[str](), node.target is _LINEAR, node
        batched = node.meta["val"].dim() == first.weight.dim()  # else the channels of a BatchNorm are others
        while len(current.users) == 1:
            previous, current = current, next(iter(current.users))
            if current.args[:1] != (previous,):
                break
            if (second := layer(current, (_LINEAR,) if flat else _CONVOLUTIONS)) is not None:
                if second.weight.shape[1] * second.groups % len(first.weight) == 0:
                    yield Pair(first, norm, second, tuple(relu6))
                break
            if previous is node and batched and (found := layer(current, (_NORM,))) is not None:
                norm = found
            elif _is_relu6(current) and calls[owner_path(current)] == 1:
                relu6.append(owner_path(current))
            elif not flat and (current.target, current.args[1:]) in _FLATTENING:
                flat = True
            elif not _is_homogeneous(current, flat):
                break


class _OwnLayers:
    """Finds the operations of a graph whose parameters nothing else reads."""

    def __init__(self, graph: GraphModule, fixed: set[int]) -> None:
        self._graph = graph
        tensors: dict[Any, Any] = {node: value_read(graph, node) for node in graph.graph.nodes if node.op == "get_attr"}
        reads = Counter(id(tensor) for node, tensor in tensors.items() for _ in node.users)
        own = {key for key, count in reads.items() if count == 1} - fixed
        self._own = {
            node: tensor for node, tensor in tensors.items() if id(tensor) in own and isinstance(tensor, nn.Parameter)
        }

    def __call__(self, node: Node, operators: Collection[Any]) -> Layer | None:
        """Return the parameters of an operation if it is one of these, a BatchNorm with its running statistics."""
        args: list[Any] = [*node.args, None, None]
        if node.target not in operators or (node.target is _NORM and args[5]):
            return None
        weight, bias = args[2:4] if node.target is _LAYER_NORM else args[1:3]
        if weight not in self._own or bias not in (None, *self._own):
            return None
        groups = args[6] if node.target in _CONVOLUTIONS and len(node.args) > 6 else 1
        deviation = (value_read(self._graph, args[4]) + args[7]).sqrt() if node.target is _NORM else 1.0
        return Layer(self._own[weight], self._own.get(bias), groups, deviation)


def _is_relu6(node: Node) -> bool:
    return (node.target, node.args[1:]) in _RELU6


def _is_homogeneous(node: Node, flat: bool) -> bool:
    over_positions = node.target in _POOLING or (node.target, node.args[2:]) in _PADDING
    of_one_row = node.target in _OF_ONE_ROW and -2 in node.args
    return node.target in _ELEMENTWISE or ((over_positions or of_one_row) and not flat)


@torch.no_grad()
def smooth_(graph: GraphModule, fixed: set[int], inputs: list[Tensor], moved: Moved) -> None:
    """Move the ranges of LayerNorms' channels into the linear layers that read them, and them alone.

    ``s_j = max|X_j|^a / max|W_j|^(1-a)`` with a = 0.5, divided by their geometric mean; the LayerNorm is divided by it,
    the layers' inputs are multiplied. X are the activations that ``inputs`` give.

    References:
        Xiao et al., "SmoothQuant", 2022 (arXiv:2211.10438), equation 4.
    """
    seen, layer = _LayerNorms(graph), _OwnLayers(graph, fixed)
    seen.run(*inputs)
    for node, largest in seen.largest.items():
        norm = layer(node, (_LAYER_NORM,))
        linears = [linear for user in node.users if (linear := layer(user, (_LINEAR,))) is not None]
        if norm is None or norm.weight.dim() > 1 or len(linears) < len(node.users):
            continue
        weights = torch.stack([linear.weight.abs().amax(dim=0) for linear in linears]).amax(dim=0)
        scales = _centred(largest**ALPHA / weights ** (1 - ALPHA))
        norm.divide_outputs_(scales, moved)
        for linear in linears:
            linear.multiply_inputs_(scales, moved)


class _LayerNorms(torch.fx.Interpreter):
    """Runs a graph and keeps each LayerNorm's largest magnitudes, by channel."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.largest: dict[Node, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        output = super().run_node(n)
        if n.target is _LAYER_NORM and n.users:
            self.largest[n] = output.abs().flatten(0, -2).amax(dim=0)
        return output


def widen_(graph: GraphModule, relu6: Collection[str]) -> None:
    """Put a ReLU in the place of each ReLU6 of a traced graph that comes from one of these paths in the module."""
    for node in graph.graph.nodes:
        if _is_relu6(node) and owner_path(node) in relu6:
            node.target, node.args = aten.relu.default, node.args[:1]
    graph.recompile()
