"""A model as one graph of operators: what files are written of, for each runtime in its own way."""

from __future__ import annotations

import re
import traceback
from collections.abc import Collection, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule, Node

from lightning_compress.errors import CompressionError, in_a_line, invalid, nearest
from lightning_compress.export.nest import described, gathered, named
from lightning_compress.export.recurrent import WholeRecurrences
from lightning_compress.modules.calls import parameter_names
from lightning_compress.modules.fast_path import without_fast_path
from lightning_compress.modules.isolation import evaluation_mode
from lightning_compress.modules.written import writing_file
from lightning_compress.quantization.static.exported import functionalize_, number_paddings_, rooted
from lightning_compress.quantization.static.graphs import aten, evaluate_modes_
from lightning_compress.quantization.static.trace import quiet

BATCH = "batch"
"""The name of the dimension that counts samples."""


@dataclass(frozen=True)
class Program:
    """A model as a graph that takes and gives tensors alone.

    Attributes:
        graph: operators of torch, and those of `quantization.numerics.operators`.
        inputs: names of the tensors that it takes, in order, which are paths in the call.
        call: of the example, with the places of tensors; see `nest.described`.
        parameters: names of the arguments that ``forward`` takes by position.
        example: tensors of a call.
        sizes: by input, the name of each dimension that may vary.
        outputs: names of the tensors that it gives.
        result: the nest that a call gives, with the places of tensors.
        largest: by name, the size of a dimension up to which the graph is what the model computes: where its code
            takes another way for larger ones.
    """

    graph: GraphModule
    inputs: tuple[str, ...]
    call: Any
    parameters: tuple[str, ...]
    example: tuple[Tensor, ...]
    sizes: tuple[dict[int, str], ...]
    outputs: tuple[str, ...]
    result: Any
    largest: Mapping[str, int] = field(default_factory=dict)

    @property
    def dynamic_shapes(self) -> tuple[dict[int, Any], ...]:
        """The dimensions that vary, as `torch.export` takes them for a graph of these inputs."""
        return tuple(dict.fromkeys(sizes, Dim.DYNAMIC) for sizes in self.sizes)

    @property
    def has_batch(self) -> bool:
        """Whether the batch may have any size."""
        return any(BATCH in sizes.values() for sizes in self.sizes)


class _Call(nn.Module):
    """Takes the tensors of a call of a model in order, and gives those of the output; its nest is told aside."""

    def __init__(self, model: nn.Module, call: Any) -> None:
        super().__init__()
        self.module, self.call = model, call
        self.__dict__["told"] = {}

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        args, kwargs = gathered(self.call, tensors)
        outputs: list[Tensor] = []
        result = described(self.module(*args, **kwargs), outputs)
        self.__dict__["told"].update(result=result)
        return outputs


def trace_program(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    batch: bool,
    dynamic: Mapping[str, Collection[int]],
    kernels: str = "",
) -> Program:
    """Trace ``model`` in evaluation; it is left as it is.

    Args:
        model: plain and deployable.
        args: of a call, by position.
        kwargs: of the call, by name.
        batch: whether dimension 0 of what has as many of it as the first tensor may vary.
        dynamic: further dimensions that may vary, by the names of inputs.
        kernels: the runtime whose own kernels it may call; see `writing_file`.

    Raises:
        CompressionError: the model's code can't be traced, or fixes a dimension that is to vary.
    """
    tensors: list[Tensor] = []
    call = described((args, kwargs), tensors)
    parameters = parameter_names(model)
    names = named(call, parameters)
    sizes = _sizes(names, tensors, batch, dynamic)
    wrapped = _Call(model, call)
    shapes = (tuple(dict.fromkeys(dimensions, Dim.DYNAMIC) for dimensions in sizes),)
    with (
        quiet(),
        evaluation_mode(model),
        torch.no_grad(),
        without_fast_path(),
        writing_file(kernels),
        WholeRecurrences(),
    ):
        try:
            wrapped(*tensors)  # so that what is made at the first call is there
        except CompressionError:  # of what it gives
            raise
        except Exception as error:
            raise invalid("inputs", "be what the model takes", in_a_line(error)) from error
        try:
            with redirect_stderr(StringIO()):  # where it fails, it prints the graph
                exported = torch.export.export(wrapped, tuple(tensors), dynamic_shapes=shapes)
        except CompressionError:
            raise
        except Exception as error:
            raise _untraceable(model, names, error) from error
    graph, _ = rooted(exported.module())
    result = wrapped.__dict__["told"]["result"]
    return Program(
        _cleaned(graph),
        names,
        call,
        parameters,
        tuple(tensors),
        sizes,
        named(result, (), "output", names),
        result,
        _largest(exported, sizes),
    )


def _largest(exported: Any, sizes: Sequence[Mapping[int, str]]) -> dict[str, int]:
    """Return the bounds of sizes that tracing found, and which files of most runtimes don't keep."""
    given = set(exported.graph_signature.user_inputs)
    tensors = (node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder" and node.name in given)
    found: dict[str, int] = {}
    for tensor, names in zip(tensors, sizes, strict=True):
        for place, name in names.items():
            size = tensor.shape[place]
            bound = exported.range_constraints.get(size.node.expr) if isinstance(size, torch.SymInt) else None
            if bound is not None and bound.upper < _ENDLESS:
                found[name] = min(found.get(name, _ENDLESS), int(bound.upper))
    return found


_ENDLESS = 2**31


def _sizes(
    names: Sequence[str], tensors: Sequence[Tensor], batch: bool, dynamic: Mapping[str, Collection[int]]
) -> tuple[dict[int, str], ...]:
    """Name the dimensions that may vary, by input."""
    for name, places in dynamic.items():
        if name not in names:
            raise invalid("dynamic", "name inputs of the model", name, nearest(name, names))
        if not isinstance(places, Collection) or not all(isinstance(place, int) for place in places):
            raise invalid("dynamic", f"hold numbers of dimensions, as {{{name!r}: [1]}}", {name: places})
    samples = next((tensor.shape[0] for tensor in tensors if tensor.dim()), None)
    found: list[dict[int, str]] = []
    for name, tensor in zip(names, tensors, strict=True):
        for dimension in dynamic.get(name, ()):
            if not 0 <= dimension < tensor.dim():
                raise invalid("dynamic", f"name dimensions of `{name}`, which has {tensor.dim()}", dimension)
        sizes = {0: BATCH} if batch and tensor.dim() and tensor.shape[0] == samples else {}
        found.append({**{dimension: f"{name}_{dimension}" for dimension in dynamic.get(name, ())}, **sizes})
    return tuple(found)


_RECURRENT = ("nn/modules/rnn.py", "layers/recurrent.py")
"""Where layers are that fail at packed sequences, and at nothing else that they took before."""


def _untraceable(model: nn.Module, names: Sequence[str], error: Exception) -> CompressionError:
    """Say why a model can't be exported, and at which of its lines."""
    reason, name = in_a_line(error), type(error).__name__
    if any(frame.filename.endswith(_RECURRENT) for frame in traceback.extract_tb(error.__traceback__)):
        reason = "it packs sequences, whose lengths are values of tensors"
        remedy = "Call the layer on padded ones: of one direction, the steps up to the end of each are the same."
    elif "DataDependent" in name or "data-dependent" in str(error) or "data dependent" in str(error):
        reason = "its control flow depends on the values of tensors"
        remedy = "Write it with tensor operations (torch.where), or export the part before it with `module`."
    elif "ConstraintViolation" in name or "specialized" in str(error) or "constraint" in str(error).lower():
        fixed = re.findall(r"\['tensors'\]\[(\d+)\]\.size\(\)\[(\d+)\]", str(error))
        sizes = dict.fromkeys(f"dimension {place} of `{names[int(number)]}`" for number, place in fixed)
        reason = f"its code fixes a size that is to vary ({', '.join(sizes) or in_a_line(error)})"
        remedy = "Export it for this size alone (dynamic_batch=False), or give an example whose batch has another size."
        if fixed and all(int(place) for _, place in fixed):
            remedy = "Leave that out of `dynamic`."
    else:
        remedy = "Export a part of it, or write the operation in another way."
    line = _users_line(error)
    at = f", at {line}" if line else ""
    return CompressionError(
        f"`model` must be a module that torch.export traces. Received: {type(model).__name__}, {reason}{at}. {remedy}"
    )


def _users_line(error: BaseException) -> str:
    """Return the innermost line of an error that is neither torch's nor ours."""
    homes = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
    found = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(homes)]
    found = [frame for frame in found if Path(frame.filename).exists()]
    return f"{Path(found[-1].filename).name}:{found[-1].lineno} ({found[-1].line})" if found else ""


_IDLE = (aten._assert_tensor_metadata.default, aten._assert_scalar.default, aten.sym_constrain_range_for_size.default)


def _cleaned(graph: GraphModule) -> GraphModule:
    """Take out what computes nothing in evaluation."""
    evaluate_modes_(graph)
    functionalize_(graph)
    number_paddings_(graph)
    for node in reversed(list(graph.graph.nodes)):
        if node.target in _IDLE or (node.op == "get_attr" and not node.users):
            graph.graph.erase_node(node)
        elif _is_same(node):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    graph.delete_all_unused_submodules()
    return graph


def _is_same(node: Node) -> bool:
    """Tell whether a node gives just what it gets, as casts and views of stored weights do."""
    if node.target not in (aten.to.dtype, aten.view.default, aten.alias.default, aten.detach.default):
        return False
    source: Any = node.args[0]
    before, after = source.meta.get("val"), node.meta.get("val")
    return (
        isinstance(before, Tensor)
        and isinstance(after, Tensor)
        and before.dtype == after.dtype
        and before.dim() == after.dim()
        and all(a is b or (isinstance(a, int) and a == b) for a, b in zip(before.shape, after.shape, strict=True))
    )
