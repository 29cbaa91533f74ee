"""Gives the channels between two layers like ranges before calibration; the float function stays what it was.

Works on the traced form of a module, whose layers are the module's own: it is their weights that change.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn import functional

from lightning_compress.modules.outputs import cosine, same_outputs
from lightning_compress.quantization.static.flows.graphs import value_read
from lightning_compress.quantization.static.inner_layer import CONVOLUTIONS

ALPHA = 0.5
"""How much of an outlier's range moves from the activations into the weights."""

_ROUNDS = 20
_LIKENESS = 0.999
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# All f with f(s x) = s f(x) for each channel's s > 0: elementwise, or over the positions of one channel.
_ELEMENTWISE = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_ELEMENTWISE_FUNCTIONS = (functional.relu, torch.relu, functional.leaky_relu, functional.dropout)
_POOLING: tuple[type[nn.Module], ...] = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d),
)
_POOLING_FUNCTIONS: tuple[Any, ...] = (
    *(functional.max_pool1d, functional.max_pool2d, functional.avg_pool1d, functional.avg_pool2d),
    *(functional.adaptive_avg_pool1d, functional.adaptive_avg_pool2d),
)


@torch.no_grad()
def adjust_(
    graph: GraphModule, inputs: list[Tensor], fixed: set[int], *, equalize: bool, smooth: bool, widen: bool
) -> tuple[list[str], Moved]:
    """Equalize and smooth a traced graph; return the ReLU6 that became ReLU, and what was moved between layers.

    The outputs are compared before and after: where ReLU for ReLU6 changes them, or anything else does, the weights are
    put back. The graph is from the flow `fx`, in evaluation. Parameters of its layers change in place, but for those
    with ``fixed`` ids: excluded ones, and those that have other owners. To ``widen`` is to make ReLU of ReLU6.
    """
    before = graph(*inputs)
    weights = {parameter: parameter.clone() for parameter in graph.parameters()}
    for wider in (True, False) if widen and equalize else (False,):
        accepted, relu6, moved = False, list[str](), Moved()
        try:
            relu6 = equalize_(graph, fixed, wider, moved) if equalize else []
            widen_(graph, relu6)
            if smooth:
                smooth_(graph, fixed, inputs, moved)
            after = graph(*inputs)
            accepted = cosine(before, after) >= _LIKENESS if relu6 else same_outputs(before, after)
        finally:
            if not accepted:
                widen_(graph, relu6, nn.ReLU6)
                for parameter, weight in weights.items():
                    parameter.copy_(weight)
        if accepted:
            return relu6, moved
    return [], Moved()


class Moved(dict[nn.Module, dict[str, Tensor]]):
    """Holds by which scales the outputs (``out``) and inputs (``in``) of layers have been divided."""

    def add(self, layer: nn.Module, side: str, scales: Tensor) -> None:
        """Note one more division."""
        found = self.setdefault(layer, {})
        found[side] = found[side] * scales if side in found else scales


@dataclass(frozen=True)
class Pair:
    """Pairs two layers with nothing between them that isn't positively homogeneous in each channel.

    Attributes:
        first: a convolution or linear layer.
        norm: the BatchNorm behind it, or None.
        second: the layer that reads its output alone.
        relu6: paths of the ReLU6 between them, which must become ReLU for the pair to hold.
    """

    first: Any
    norm: Any
    second: Any
    relu6: tuple[str, ...] = ()

    def scales(self) -> Tensor:
        """Find ``s = sqrt(r1 / r2)`` for each channel, of ranges r1 of the first and r2 of the second layer's weights.

        Divided by their geometric mean: see `_centred`.
        """
        r1 = self.first.weight.abs().flatten(1).amax(dim=1)
        if self.norm is not None:
            r1 = r1 * self.norm.weight.abs() * (self.norm.running_var + self.norm.eps).rsqrt()
        r2 = _by_input(self.second, len(r1)).abs().amax(dim=(1, 3)).flatten()
        return _centred((r1 / r2).sqrt())

    def divide_(self, scales: Tensor, moved: Moved) -> None:
        """Divide the first layer's channels by ``scales``, and multiply the second's inputs by them."""
        first = self.first if self.norm is None else self.norm
        _divide_output_(first, scales)
        weight = _by_input(self.second, len(scales))
        weight *= scales.view(len(weight), 1, -1, 1)
        moved.add(first, "out", scales)
        inputs = self.second.weight.shape[1] * getattr(self.second, "groups", 1)
        moved.add(self.second, "in", scales.repeat_interleave(inputs // len(scales)))


def _centred(scales: Tensor) -> Tensor:
    """Return scales whose geometric mean is 1; 1 for channels without a range.

    A factor that all channels share changes no rounding, for each tensor is quantized with a scale of its own; but it
    would change how far an optimizer's step moves the two layers, which costs a fit that begins with random weights.
    """
    usable = (scales > 0) & scales.isfinite()
    mean = scales[usable].log().mean().exp()
    return torch.where(usable, scales / mean, 1.0).clamp(1e-4, 1e4)


def _by_input(layer: Any, channels: int) -> Tensor:
    """View a layer's weight as ``(groups, outputs, inputs of a group, rest)``; flattened inputs are the rest."""
    groups = getattr(layer, "groups", 1)
    weight: Tensor = layer.weight
    return weight.view(groups, len(weight) // groups, channels // groups, -1)


def _divide_output_(layer: Any, scales: Tensor) -> None:
    layer.weight /= scales.view(-1, *[1] * (layer.weight.dim() - 1))
    if layer.bias is not None:
        layer.bias /= scales


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
            pair.divide_(scales, moved)
            furthest = max(furthest, scales.log().abs().max().item())
        if furthest < 1e-2:
            break
    return sorted({path for pair in found for path in pair.relu6})


def pairs(graph: GraphModule, fixed: set[int]) -> Iterator[Pair]:
    """Yield the pairs of layers of ``graph`` that can be equalized."""
    layer = _OwnLayers(graph, fixed)

    for node in graph.graph.nodes:
        if (first := layer(node, (*CONVOLUTIONS, nn.Linear))) is None:
            continue
        norm, relu6, flat, current = None, list[str](), isinstance(first, nn.Linear), node
        while len(current.users) == 1:
            previous, current = current, next(iter(current.users))
            if (second := layer(current, (nn.Linear,) if flat else CONVOLUTIONS)) is not None:
                if second.weight.shape[1] * getattr(second, "groups", 1) % len(first.weight) == 0:
                    yield Pair(first, norm, second, tuple(relu6))
                break
            if (found := layer(current, _NORMS)) is not None and previous is node and _scales(found, first):
                norm = found
            elif layer(current, (nn.ReLU6,)) is not None:
                relu6.append(str(current.target))
            elif list(current.all_input_nodes) != [previous]:
                break
            elif not flat and _flattens(graph, current):
                flat = True
            elif not _is_homogeneous(graph, current, flat):
                break


class _OwnLayers:
    """Finds the layers of a graph that a single node calls, with parameters that no other has."""

    def __init__(self, graph: GraphModule, fixed: set[int]) -> None:
        self._graph = graph
        called = [node for node in graph.graph.nodes if node.op == "call_module"]
        self._calls = Counter(node.target for node in called)
        owners = Counter(id(tensor) for node in called for tensor in graph.get_submodule(str(node.target)).parameters())
        owners.update(id(value_read(graph, node)) for node in graph.graph.nodes if node.op == "get_attr")
        self._fixed = fixed | {key for key, count in owners.items() if count > 1}

    def __call__(self, node: Node, kinds: tuple[type[nn.Module], ...]) -> Any:
        """Return the module that ``node`` calls, if it is one and just of one of these kinds."""
        if node.op != "call_module" or self._calls[node.target] > 1:
            return None
        module = self._graph.get_submodule(str(node.target))
        own = not any(id(parameter) in self._fixed for parameter in module.parameters())
        return module if own and type(module) in kinds else None


def _scales(norm: Any, first: Any) -> bool:
    return bool(norm.affine and norm.running_var is not None and len(norm.weight) == len(first.weight))


def _is_homogeneous(graph: GraphModule, node: Node, flat: bool) -> bool:
    if node.op == "call_module":
        return isinstance(graph.get_submodule(str(node.target)), _ELEMENTWISE if flat else (*_ELEMENTWISE, *_POOLING))
    if node.op == "call_method":
        return node.target in ("relu", "relu_", "contiguous")
    return node.target in (_ELEMENTWISE_FUNCTIONS if flat else (*_ELEMENTWISE_FUNCTIONS, *_POOLING_FUNCTIONS))


def _flattens(graph: GraphModule, node: Node) -> bool:
    """Tell whether a node leaves a vector in which the values of each channel lie together."""
    options = (*node.args[1:], *node.kwargs.values())
    if node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        return isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1)
    if node.target in ("mean", torch.mean):
        return len(options) == 1 and options[0] in ([2, 3], (2, 3), [-2, -1], (-2, -1))
    return node.target in ("flatten", torch.flatten) and options == (1,)


@torch.no_grad()
def smooth_(graph: GraphModule, fixed: set[int], inputs: list[Tensor], moved: Moved) -> None:
    """Move the ranges of LayerNorms' channels into the linear layers that read them, and them alone.

    ``s_j = max|X_j|^a / max|W_j|^(1-a)`` with a = 0.5, divided by their geometric mean; the LayerNorm is divided by it,
    the layers' inputs are multiplied. X are the activations that ``inputs`` give.

    References:
        Xiao et al., "SmoothQuant", 2022 (arXiv:2211.10438), equation 4.
    """
    seen, layer = _Outputs(graph), _OwnLayers(graph, fixed)
    seen.run(*inputs)
    for node, largest in seen.largest.items():
        norm = layer(node, (nn.LayerNorm,))
        layers = [layer(user, (nn.Linear,)) for user in node.users]
        if norm is None or None in layers or not norm.elementwise_affine or len(norm.normalized_shape) > 1:
            continue
        weights = torch.stack([layer.weight.abs().amax(dim=0) for layer in layers]).amax(dim=0)
        scales = _centred(largest**ALPHA / weights ** (1 - ALPHA))
        _divide_output_(norm, scales)
        moved.add(norm, "out", scales)
        for linear in layers:
            linear.weight *= scales
            moved.add(linear, "in", scales)


class _Outputs(torch.fx.Interpreter):
    """Runs a graph and keeps each LayerNorm's largest magnitudes, by channel."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.largest: dict[Node, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        output = super().run_node(n)
        if n.op == "call_module" and type(self.fetch_attr(str(n.target))) is nn.LayerNorm and n.users:
            self.largest[n] = output.abs().flatten(0, -2).amax(dim=0)
        return output


def widen_(graph: nn.Module, relu6: Collection[str], kind: type[nn.Module] = nn.ReLU) -> None:
    """Put a ReLU in the place of each of these ReLU6 of a traced graph; the traced module keeps its own."""
    for path in relu6:
        graph.set_submodule(path, kind())
