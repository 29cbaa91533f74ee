"""Does a file compute what its model computes? It is run in its runtime; where they differ, where do they first?"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from lightning_compress.errors import CompressionError
from lightning_compress.export.lowering import int8_layers
from lightning_compress.export.program import Program
from lightning_compress.export.runtimes import Runtime, Session
from lightning_compress.modules.isolation import isolated_random_state
from lightning_compress.quantization.numerics.int8 import needs_reduced_range
from lightning_compress.quantization.numerics.operators import DYNAMIC, LSTM, PACKED, ROUNDED, STORED
from lightning_compress.quantization.static.graphs import constants, copy_graph, owner_path

LEAST_COSINE = 0.999
_FLOAT = 1e-3
"""How far floats may be apart, of the largest: sums in another order, other approximations of exp."""
Write = Callable[[Program, Path], Any]


@dataclass(frozen=True)
class Parity:
    """How well a file agrees with its model, over all batches, sizes and levels.

    Attributes:
        cosine: the least.
        difference: the largest, as a share of what is allowed.
        same_class: the share of rows of matrices whose largest element is the same one.
        batch_sizes: that were run.
        levels: of the runtime's optimization.
        own_cosine: the least between the file at the runtime's own settings and the model in torch's own kernels.
        samples: that were compared at each level.
    """

    cosine: float
    difference: float
    same_class: float | None
    batch_sizes: tuple[int, ...]
    levels: tuple[str, ...]
    own_cosine: float
    samples: int


@dataclass(frozen=True)
class _Comparison:
    """Two outputs beside each other."""

    cosine: float = 1.0
    difference: float = 0.0
    same: int = 0
    rows: int = 0
    failure: str = ""


@dataclass(frozen=True)
class Sample:
    """The tensors of a call, and what the model gives for them.

    Attributes:
        tensors: of the call, in order.
        expected: the outputs, in the operators of a file.
        own: the outputs, in the kernels that the model has in this process.
    """

    tensors: Sequence[Tensor]
    expected: Sequence[Tensor]
    own: Sequence[Tensor]

    @property
    def size(self) -> int:
        """Of the batch."""
        return next((len(tensor) for tensor in self.tensors if tensor.dim()), 1)


def compared(expected: Tensor, got: Tensor, slack: float, least: float = LEAST_COSINE) -> _Comparison:
    """Compare an output with what it should be.

    The cosine is ``least`` at least. The largest difference is a thousandth of the largest value, or ``slack``. Of
    a matrix the largest element of each row is the same one, or one that is as near to it as twice that difference.

    Args:
        expected: by the model.
        got: from the file.
        slack: how far values may be apart because roundings fall otherwise.
        least: what the cosine may be, for the same reason.
    """
    if expected.shape != got.shape:
        return _Comparison(failure=f"shape {tuple(got.shape)} where it is {tuple(expected.shape)}")
    if not expected.is_floating_point():
        equal = (expected == got.to(expected.dtype)).float().mean().item() if expected.numel() else 1.0
        return _Comparison(
            failure="" if equal >= 1.0 - 0.01 * bool(slack) else f"{1 - equal:.1%} of integers are others"
        )
    expected, got = expected.double(), got.double()
    finite = expected.isfinite()
    if not torch.equal(finite, got.isfinite()):
        return _Comparison(failure="values that are infinite or no numbers, and aren't in the model")
    a, b = expected[finite], got[finite]
    if not a.numel():
        return _Comparison()
    allowed = max(_FLOAT * a.abs().max().item(), slack, 1e-6)
    difference = (a - b).abs().max().item()
    cosine = F.cosine_similarity(a, b, dim=0).item() if a.abs().max() > allowed else 1.0
    same, rows, others = 0, 0, 0
    if expected.dim() == 2 and expected.shape[1] > 1 and finite.all():
        margins = expected.amax(1) - expected.gather(1, got.argmax(1, keepdim=True))[:, 0]
        same, rows, others = int((margins == 0).sum()), len(margins), int((margins > 2 * allowed).sum())
    failure = f"another largest element in {others} of {rows} rows" if others else ""
    if cosine < least:
        failure = f"cosine {cosine:.4f}, where {least:.4g} is the least"
    if difference > allowed:
        failure = f"a difference of {difference:.3g}, where {allowed:.3g} is allowed"
    return _Comparison(cosine, difference / allowed, same, rows, failure)


class _Values(Interpreter):
    """Runs a graph, and keeps the values of all nodes; with ``moved`` roundings each code may become the next."""

    def __init__(self, graph: GraphModule, moved: bool = False) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.generator = torch.Generator().manual_seed(0) if moved else None

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if self.generator is not None and (step := _step(target, args)) is not None:
            x, *rest = args
            args = (x + (torch.rand(x.shape, generator=self.generator) - 0.5) * step, *rest)
        return super().call_function(target, args, kwargs)


def _step(target: Any, args: Any) -> Any:
    """Return the distance of two codes of what an operator rounds; None if it rounds nothing."""
    if target is ROUNDED:
        return args[1]
    if target is LSTM or (target is DYNAMIC and args[-1]):
        return (args[0].amax() - args[0].amin()) / 255
    return args[0].abs().amax(dim=-1, keepdim=True) / 127 if target is PACKED and args[-1] else None


def _values(graph: GraphModule, tensors: Sequence[Tensor], moved: bool = False) -> dict[Node, Any]:
    values = _Values(graph, moved)
    with torch.no_grad(), isolated_random_state(seed=0):  # noise is no rounding: the same in both runs
        values.run(*tensors)
    return values.env


def _slack(value: Any, moved: Any) -> tuple[float, float]:
    """Return how far a value may be off because roundings fall otherwise, twice what these changed; and its cosine.

    Where steps are coarse, or follow the values of each call, one code that is another changes all that comes behind
    it, in a file as in torch.
    """
    if not _is_float(value) or not (finite := (value - moved).isfinite()).any():
        return 0.0, LEAST_COSINE
    a, b = value[finite].double(), moved[finite].double()
    return 2.0 * (a - b).abs().amax().item(), min(LEAST_COSINE, F.cosine_similarity(a, b, dim=0).item())


def prove(program: Program, path: Path, runtime: Runtime, write: Write, samples: Sequence[Sample]) -> Parity:
    """Run a file at every level of its runtime, and compare it with the model.

    Where activations are rounded, kernels that sum in other orders get the next code now and then. How much that may
    change is found by runs of the graph in which every value is moved by up to half a step before it is rounded.

    Args:
        program: that the file was written of.
        path: of the file.
        runtime: that runs it.
        write: writes programs; parts of this one where the file disagrees.
        samples: calls, and what the model gives for them.

    Raises:
        CompressionError: it disagrees; the first layer where it does is named.
    """
    ends: Any = program.graph.graph.output_node().args[0]
    slacks: list[list[tuple[float, float]]] = []
    for sample in samples:
        plain, moved = (_values(program.graph, sample.tensors, moved) for moved in (False, True))
        slacks.append([_slack(plain[end], moved[end]) for end in ends])
    found: list[_Comparison] = []
    for level in runtime.levels:
        session = runtime.open(path, level)
        for sample, slack in zip(samples, slacks, strict=True):
            outputs = zip(program.outputs, sample.expected, session(sample.tensors), slack, strict=True)
            for name, expected, got, off in outputs:
                found.append(compared(expected, got, *off))
                if failure := found[-1].failure:
                    first = first_difference(program, path.suffix, runtime, level, write, sample.tensors)
                    raise CompressionError(
                        f"The file must compute what the model computes. Received: {failure}, in `{name}`, from "
                        f"{runtime.name}{f' at level {level}' if level else ''}. {first}{_overflow(program)}"
                    )
    same, rows = sum(comparison.same for comparison in found), sum(comparison.rows for comparison in found)
    return Parity(
        min((comparison.cosine for comparison in found), default=1.0),
        max((comparison.difference for comparison in found), default=0.0),
        same / rows if rows else None,
        tuple(sorted({sample.size for sample in samples})),
        runtime.levels,
        _least_cosine(runtime.open(path), samples),
        sum(sample.size for sample in samples),
    )


def _overflow(program: Program) -> str:
    """Say what may help on a CPU like this one."""
    if not needs_reduced_range() or not int8_layers(program.graph):
        return ""
    return " On CPUs without VNNI, such as this one, sums of 8-bit products overflow: StaticInt8(reduce_range=True)."


def _least_cosine(session: Session, samples: Sequence[Sample]) -> float:
    pairs = (pair for sample in samples for pair in zip(sample.own, session(sample.tensors), strict=True))
    return min((compared(expected, got, 0.0).cosine for expected, got in pairs), default=1.0)


def first_difference(
    program: Program, suffix: str, runtime: Runtime, level: str, write: Write, tensors: Sequence[Tensor]
) -> str:
    """Say in a sentence where a file and its graph part first, by files of ever smaller parts of the graph."""
    values, moved = (_values(program.graph, tensors, moves) for moves in (False, True))
    fixed = constants(program.graph)
    nodes = [node for node in program.graph.graph.nodes if node.op == "call_function" and node not in fixed]
    nodes = [node for node in nodes if _is_float(values.get(node))]

    def differs(last: int) -> bool:
        before = set(nodes[: last + 1])
        ends = [node for node in before if node is nodes[last] or not before.issuperset(node.users)]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"part{suffix}")
            write(_cut(program, ends), path)
            results = zip(ends, runtime.open(path, level)(tensors), strict=True)
            slacks = {end: _slack(values[end], moved[end]) for end in ends}
            return any(compared(values[end], got, *slacks[end]).failure for end, got in results)

    low, high = 0, len(nodes)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if differs(middle) else (middle + 1, high)
    if low == len(nodes):
        return "Every part of its graph agrees when it is written alone: the trace isn't what the model computes."
    is_quantized = any(node.target in (ROUNDED, STORED, DYNAMIC, PACKED, LSTM) for node in program.graph.graph.nodes)
    remedy = "Exclude that in `targets`" if is_quantized else "Write that in other operations"
    return f"They part first at {layer_name(nodes[low])}. {remedy}, or take another target."


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _cut(program: Program, ends: Sequence[Node]) -> Program:
    """Return the program that gives the values of these nodes."""
    graph = copy_graph(program.graph)
    nodes = {node.name: node for node in graph.graph.nodes}
    graph.graph.output_node().args = (tuple(nodes[end.name] for end in ends),)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    graph.delete_all_unused_submodules()
    return replace(program, graph=graph, outputs=tuple(f"part_{end.name}" for end in ends), result=None)


def layer_name(node: Node) -> str:
    """Name an operation by its layer: that of its weight, else the module whose forward has it."""
    kind = str(node.target).removeprefix("aten.").partition(".")[0]
    weight: Any = node.args[1] if len(node.args) > 1 else None
    while isinstance(weight, Node) and weight.op == "call_function" and weight.all_input_nodes:
        weight = weight.all_input_nodes[0]
    is_stored = isinstance(weight, Node) and weight.op == "get_attr"
    path = str(weight.target).removesuffix(".weight") if is_stored else owner_path(node)
    return f"`{path or node.name}` ({kind})"
