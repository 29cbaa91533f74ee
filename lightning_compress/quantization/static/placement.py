"""Where a traced graph is rounded to 8 bits: it depends on what a target's kernels take, and on no value."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

_ATEN = torch.ops.aten


@dataclass(frozen=True)
class Target:
    """Says which activations a target's kernels want rounded, and to which codes.

    Weights are int8 in ±127 for all of them, with a scale for each output channel.

    Attributes:
        low: the least code of an activation.
        high: the largest.
        symmetric: whether the zero point is 0.
        outputs: whether a kernel gives codes: values are rounded as they leave a convolution (with the BatchNorm and
            the activation that it absorbs) and the sum of two branches. If not, they are rounded only as they enter
            a layer, and the second branch as it enters a sum that is computed with the convolution of the first.
        linears: whether all that holds for linear layers too. If not, only their inputs are rounded.
        last: whether what no other layer follows is rounded, too.
    """

    low: int
    high: int
    symmetric: bool
    outputs: bool
    linears: bool
    last: bool = False


TARGETS = {
    "onnxruntime": Target(0, 255, symmetric=False, outputs=True, linears=False),
    "openvino": Target(0, 255, symmetric=False, outputs=True, linears=False),
    "tensorrt": Target(-128, 127, symmetric=True, outputs=False, linears=False),
    "executorch": Target(-128, 127, symmetric=False, outputs=True, linears=True, last=True),
}


@dataclass(frozen=True)
class Place:
    """Says after which node a value is rounded.

    Attributes:
        after: the node's name.
        users: the nodes that read the rounded value; None if all do.
        group: places of one group have one range, since their codes meet in a concatenation.
    """

    after: str
    users: tuple[str, ...] | None
    group: int

    @property
    def name(self) -> str:
        """The name of its quantizer in a prepared graph."""
        return f"activation_{self.group}"


_MOVES: frozenset[Any] = frozenset(
    {
        *(_ATEN.view.default, _ATEN.reshape.default, _ATEN.flatten.using_ints, _ATEN.unflatten.int),
        *(_ATEN.permute.default, _ATEN.transpose.int, _ATEN.t.default, _ATEN.movedim.int, _ATEN.movedim.intlist),
        *(_ATEN.squeeze.default, _ATEN.squeeze.dim, _ATEN.squeeze.dims, _ATEN.unsqueeze.default),
        *(_ATEN.contiguous.default, _ATEN.clone.default, _ATEN.alias.default, _ATEN.detach.default),
        *(_ATEN.expand.default, _ATEN.repeat.default, _ATEN.flip.default, _ATEN.roll.default),
        *(_ATEN.dropout.default, _ATEN.feature_dropout.default, _ATEN.channel_shuffle.default),
        *(_ATEN.max_pool1d.default, _ATEN.max_pool2d.default, _ATEN.max_pool3d.default),
        *(_ATEN.upsample_nearest1d.vec, _ATEN.upsample_nearest2d.vec, _ATEN.upsample_nearest3d.vec),
        *(_ATEN.pixel_shuffle.default, _ATEN.pixel_unshuffle.default),
        *(_ATEN.pad.default, _ATEN.constant_pad_nd.default),
    }
)
"""What gives the values that it gets, in other places: a value is rounded before it."""

_NARROWS: frozenset[Any] = frozenset(
    {
        *(_ATEN.slice.Tensor, _ATEN.select.int, _ATEN.narrow.default, _ATEN.index_select.default, operator.getitem),
        *(_ATEN.chunk.default, _ATEN.split.Tensor, _ATEN.split_with_sizes.default, _ATEN.unbind.int),
        _ATEN.relu.default,
    }
)
"""What gives some of the values that it gets, or zeros: codes stay codes, but of a wider range than there need be."""

PADS: frozenset[Any] = frozenset({_ATEN.pad.default, _ATEN.constant_pad_nd.default})

_JOINS: frozenset[Any] = frozenset({_ATEN.cat.default, _ATEN.stack.default})

_ABSORBED: frozenset[Any] = frozenset(
    {_ATEN.relu.default, _ATEN.relu6.default, _ATEN.hardtanh.default, _ATEN.clamp.default, _ATEN.clamp_min.default}
)
"""Activations that kernels compute with the layer before them, by the limits of their codes."""


def places(graph: GraphModule, layers: Collection[Node], target: Target) -> list[Place]:
    """List where activations of a traced graph are rounded, in the order of the graph.

    Every input of a layer is rounded, for the layers that read it and for nobody else; what is read by float operations
    too, as the sums between the blocks of a transformer are, stays as it is for these. Beside that, by target:

    - onnxruntime, OpenVINO: what leaves a convolution is rounded for all, since onnxruntime's kernels give codes; and
      so is a sum of two such branches. What is added to a constant, a mask, or in another shape isn't.
    - TensorRT, by NVIDIA's rules for Q/DQ layers: no output is rounded on its own account, so that a layer is computed
      together with what follows it, and gives floats where nothing in int8 reads it. Of a sum that is computed together
      with the convolution of one branch, the other branch is rounded.
    - ExecuTorch: XNNPACK's kernels give codes, those of linear layers and of the last layer too.

    Elsewhere what the end of the graph reads isn't rounded. No value is rounded twice without arithmetic in between:
    pools of maxima, views and concatenations pass codes on.

    Args:
        graph: calls operators of torch's training IR; its nodes know their shapes.
        layers: the convolutions and linear layers that compute in int8.
        target: see `TARGETS`.

    References:
        The pages "Explicit Quantization" of TensorRT's documentation.
    """
    int8 = set(layers)
    ends, sums = _branches(graph, {node for node in int8 if target.linears or node.target is not _ATEN.linear.default})
    rounder = _Rounder(graph, int8)
    if target.outputs:
        rounder.round_outputs(ends, target.last)
    for node in sums:
        fused = next((branch for branch in node.all_input_nodes if branch in ends and len(branch.users) == 1), None)
        for branch in node.all_input_nodes:
            if (node in rounder.leading or target.last) and (target.outputs or branch is not fused):
                rounder.round(branch, node)
    for node in graph.graph.nodes:
        if node in int8:
            rounder.round(node.args[0], node)
    return rounder.places(graph)


def _branches(graph: GraphModule, layers: Collection[Node]) -> tuple[list[Node], list[Node]]:
    """Find the last nodes of what kernels compute, and the sums of two branches that such nodes begin."""
    ends: list[Node] = []
    sums: list[Node] = []
    branches: set[Node] = set()
    for node in graph.graph.nodes:
        carried = code_sources(node)
        is_sum = _is_sum(node) and branches.issuperset(node.args)
        if is_sum:
            sums.append(node)
        if is_sum or node in layers:
            ends.append(_end(node))
            branches.add(ends[-1])
        elif carried and branches.issuperset(carried):
            branches.add(node)
    return ends, sums


def _is_sum(node: Node) -> bool:
    """Tell whether a node adds two values of one shape."""
    if node.target is not _ATEN.add.Tensor or node.kwargs or not all(isinstance(term, Node) for term in node.args):
        return False
    left, right = (term.meta["val"].shape for term in node.args)  # type: ignore[union-attr]
    return len(left) == len(right) and all(statically_known_true(a == b) for a, b in zip(left, right, strict=True))


def _end(node: Node) -> Node:
    """Return the last of the nodes that a kernel computes together with a layer or a sum."""
    for kinds in ({_ATEN.batch_norm.default} if node.target is not _ATEN.add.Tensor else set(), _ABSORBED):
        if len(node.users) == 1 and (user := next(iter(node.users))).target in kinds:
            node = user
    return node


def code_sources(node: Node) -> list[Node]:
    """Return the nodes whose codes a node passes on; none if it computes something else."""
    if node.target in _JOINS:
        return node.all_input_nodes
    has_value = node.target in PADS and isinstance(node.args[-1], int | float) and node.args[-1] != 0
    if node.target not in _MOVES | _NARROWS or has_value:
        return []
    return node.all_input_nodes[:1]


class _Rounder:
    """Collects the nodes whose values are rounded, and for which users.

    Attributes:
        leading: the nodes behind which a layer comes.
    """

    def __init__(self, graph: GraphModule, layers: Collection[Node]) -> None:
        self.layers = layers
        self.leading: set[Node] = set()
        for node in reversed(graph.graph.nodes):
            if any(user in layers or user in self.leading for user in node.users):
                self.leading.add(node)
        self.readers: dict[Node, set[Node]] = {}
        self.groups: dict[Node, int] = {}

    def round_outputs(self, ends: Iterable[Node], last: bool) -> None:
        """Round what nodes give: for all users, or without the ``last`` for those before a layer but the end."""
        for node in ends:
            for user in node.users:
                if last or (node in self.leading and not _is_output(user)):
                    self._read(node, user)

    def round(self, node: Node, user: Node) -> set[Node]:
        """Let ``user`` read ``node`` in codes, and return the nodes after which they are made."""
        if user in self.readers.get(node, ()) or not (self._is_moved_over(node) or self._has_codes(node)):
            self._read(node, user)
            return {node}
        made = set[Node]().union(*(self.round(source, node) for source in code_sources(node)))
        shared = {self.groups[source] for source in made}
        self.groups = {source: min(shared) if group in shared else group for source, group in self.groups.items()}
        return made

    def places(self, graph: GraphModule) -> list[Place]:
        """Return the places in the order of the graph, in which their groups are numbered, too."""
        places, numbers = [], dict[int, int]()
        for node in graph.graph.nodes:
            if (readers := self.readers.get(node)) is not None:
                names = tuple(user.name for user in node.users if user in readers)
                group = numbers.setdefault(self.groups[node], len(numbers))
                places.append(Place(node.name, None if len(names) == len(node.users) else names, group))
        return places

    def _read(self, node: Node, user: Node) -> None:
        self.readers.setdefault(node, set()).add(user)
        self.groups.setdefault(node, len(self.groups))

    def _has_codes(self, node: Node) -> bool:
        """Tell whether a node passes on codes that it reads, some of them if it joins several values."""
        return any(node in self.readers.get(source, ()) or self._has_codes(source) for source in code_sources(node))

    def _is_moved_over(self, node: Node) -> bool:
        """Tell whether a node gives the values that it reads, and to int8 layers alone."""
        is_moved = node.target in _MOVES and bool(code_sources(node))
        return is_moved and all(user in self.layers or self._is_moved_over(user) for user in node.users)


def _is_output(node: Node) -> bool:
    """Tell whether a node is the end of a graph, or passes on what it reads to nothing else."""
    return node.op == "output" or (bool(code_sources(node)) and all(_is_output(user) for user in node.users))
