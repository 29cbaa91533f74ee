"""Int8 kernels and what stands between them, compiled by inductor at their first call."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch._dynamo
import torch._inductor.config
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

from lightning_compress.errors import NoEffectWarning, in_a_line
from lightning_compress.quantization.static.graphs import copy_graph
from lightning_compress.quantization.static.int8_layer import Int8Layer
from lightning_compress.quantization.static.kernels import lower, wrong
from lightning_compress.quantization.static.trace import quiet


class Compiled(nn.Module):
    """Compiles the kernels of a reference form at its first call, and again where one for all sizes can't be.

    Attributes:
        kernels: what computes where that fails, and where a kernel is wrong on this CPU.
    """

    def __init__(self, form: GraphModule) -> None:
        super().__init__()
        self.kernels = lower(form)
        self._form = form
        self._apart: Any = None  # what is compiled: a compiler fuses additions itself, and can't see into kernels
        self._compiled: Any = None
        self._dynamic: bool | None = None
        self._compilations = 0
        self._gave_up = False
        self._known: set[Any] = set()  # calls that were compiled for

    @torch.no_grad()
    def forward(self, *tensors: Tensor) -> Any:
        key = (*[(tensor.shape, tensor.dtype) for tensor in tensors], torch.is_inference_mode_enabled())
        if key in self._known:
            return self._compiled(*tensors)
        if self._gave_up or wrong(self.kernels):
            return self.kernels(*tensors)
        return self._first_call(key, *tensors)

    def _first_call(self, key: Any, *tensors: Tensor) -> Any:
        """Compile for a new shape: for any where inductor can, else for this one, else not at all."""
        reason = ""
        for dynamic in (None, False) if self._compiled is None else (self._dynamic, False):
            before = self._compilations
            try:
                with quiet(), torch._inductor.config.patch(freezing=True):  # so that packed weights are constants
                    if self._compiled is None or dynamic != self._dynamic:
                        self._apart = self._apart or lower(self._form, additions=False)
                        operators = as_operators(self._apart, tensors)
                        self._compiled = torch.compile(operators.forward, backend=self._compile, dynamic=dynamic)
                        self._dynamic = dynamic
                    output = self._compiled(*tensors)
            except Exception as error:  # of the compiler, or of what it made
                reason = in_a_line(error)
                continue
            if self._compilations == before or not (reason := is_off(self._apart, tensors, output)):
                self._known.add(key)
                return output
            self._compiled = None
        self._gave_up, self._compiled = True, None
        self._known.clear()
        warnings.warn(
            f"The int8 kernels aren't compiled by inductor ({reason}), so what stands between them is slower. "
            "Install a C++ compiler, or use another engine.",
            NoEffectWarning,
            stacklevel=2,
        )
        return self.kernels(*tensors)

    def _compile(self, graph: GraphModule, inputs: list[Tensor]) -> Any:
        self._compilations += 1
        return torch._dynamo.lookup_backend("inductor")(graph, inputs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": None, "_known": set()}


class _Shapes(Interpreter):
    """Runs kernels, and keeps the shape of what each reads."""

    def __init__(self, kernels: GraphModule) -> None:
        super().__init__(kernels)
        self.shapes: dict[str, torch.Size] = {}

    def run_node(self, n: Node) -> Any:
        if n.op == "call_module":
            self.shapes[n.name] = self.fetch_args_kwargs_from_env(n)[0][0].shape
        return super().run_node(n)


def as_operators(kernels: GraphModule, tensors: tuple[Tensor, ...]) -> GraphModule:
    """Return the same as operators of torch alone, with weights that are packed for these tensors of a call."""
    shapes = _Shapes(kernels)
    shapes.run(*tensors)
    graph = copy_graph(kernels)
    tracer = GraphAppendingTracer(graph.graph)
    for node in list(graph.graph.nodes):
        layer = kernels.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(layer, Int8Layer):
            continue
        with torch.inference_mode(False), graph.graph.inserting_before(node):
            packed = []
            for place, tensor in enumerate(layer.pack(shapes.shapes[node.name])):
                name = f"packed_{node.name}_{place}"
                graph.register_buffer(name, tensor)
                packed.append(Proxy(graph.graph.get_attr(name), tracer))
            x, bias = (source if source is None else Proxy(source, tracer) for source in node.args[:2])
            node.replace_all_uses_with(layer.kernel(packed, x, bias).node)
        graph.graph.erase_node(node)
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph


def is_off(kernels: GraphModule, tensors: tuple[Tensor, ...], compiled: Any) -> str:
    """Say why rounding can't explain what compiled kernels gave; empty if it can.

    A compiler may put any activation one code beside where the kernels have it. So the outputs may move as far as they
    do when all activations are put one code aside, at random.
    """
    for output, aside, got in zip(kernels(*tensors), _OneAside(kernels).run(*tensors), compiled, strict=True):
        if not isinstance(output, Tensor) or not output.is_floating_point() or not output.numel():
            continue
        finite = output.isfinite() & aside.isfinite()
        error, explained = (_root_mean_square((other - output)[finite]) for other in (got, aside))
        tolerance = 1e-3 * _root_mean_square(output[finite])
        if finite.any() and not error <= explained + tolerance:
            return f"they compute something else, by {error:.2g} where rounding explains {explained:.2g}"
    return ""


def _root_mean_square(values: Tensor) -> float:
    return values.double().square().mean().sqrt().item()


class _OneAside(Interpreter):
    """Runs kernels with every activation in codes one beside its own."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self._generator = torch.Generator().manual_seed(0)

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if not isinstance(value, Tensor) or value.dtype != torch.uint8 or n.op == "placeholder":
            return value
        aside = torch.randint(0, 2, value.shape, generator=self._generator) * 2 - 1
        return (value.int() + aside).clamp(0, 255).to(torch.uint8)
