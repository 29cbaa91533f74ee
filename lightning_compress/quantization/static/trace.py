"""Traces a module by `torch.export`, into operators of torch around the module's own tensors."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from io import StringIO
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from lightning_compress.errors import CompressionError
from lightning_compress.modules.fast_path import without_fast_path
from lightning_compress.modules.isolation import isolated_random_state, isolated_state
from lightning_compress.modules.outputs import Structure, flatten
from lightning_compress.modules.paths import device_of, modules_of
from lightning_compress.modules.routing import class_of, form_of
from lightning_compress.quantization.static.exported import Opaque, functionalize_, hide_, number_paddings_, rooted
from lightning_compress.quantization.static.graphs import aten, copy_graph, value_read
from lightning_compress.quantization.static.signature import Signature


@contextmanager
def quiet() -> Iterator[None]:
    """Silence torch, which warns of what its exporter and compiler do to its own graphs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        levels = {logger: logger.level for logger in map(logging.getLogger, ("torch", "onnxscript"))}
        for logger in levels:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in levels.items():
                logger.setLevel(level)


@dataclass(frozen=True)
class Trace:
    """Holds the traced form of a module.

    Attributes:
        graph: operators around the module's tensors, by their paths in it. It takes the tensors of a call in order, and
            gives those of the output.
        structure: what the module puts its output into.
        guards: raises where tensors have sizes that the graph wasn't made for.
        hooked: of each call of a module whose hooks are to fire its path, the structure of its output, and the nodes
            of the tensors in it.
        dropping: paths of modules of no tensors that do nothing in evaluation, such as those of a stochastic depth; a
            dropout stands for them in the graph.
        known: sizes and types of tensors that the guards have let pass.
    """

    graph: GraphModule
    structure: Structure
    guards: nn.Module
    hooked: tuple[tuple[str, Structure, tuple[str, ...]], ...]
    dropping: frozenset[str]
    known: set[Any] = field(default_factory=set, repr=False)

    @property
    def names(self) -> frozenset[str]:
        """What of the module the graph reads and calls: the paths of tensors and layers."""
        nodes = [node for node in self.graph.graph.nodes if node.op in ("get_attr", "call_module")]
        return frozenset(str(node.target) for node in nodes if node.users)

    def onto(self, module: nn.Module) -> Trace:
        """Return the same trace around the tensors of another module of the same structure."""
        graph, modules = copy_graph(self.graph), modules_of(module, every_name=True)
        for node in graph.graph.nodes:
            owner, _, name = str(node.target).rpartition(".")
            if node.op == "call_module":
                graph.set_submodule(str(node.target), Opaque(modules[str(node.target)]))
            elif node.op == "get_attr" and owner in modules and isinstance(value_read(graph, node), Tensor):
                holder: Any = graph.get_submodule(owner)
                for kind in ("_parameters", "_buffers"):
                    if (tensor := getattr(modules[owner], kind).get(name)) is not None:
                        holder._parameters.pop(name, None)
                        holder._buffers.pop(name, None)
                        getattr(holder, kind)[name] = tensor
        return replace(self, graph=graph)

    def check(self, tensors: list[Tensor]) -> None:
        """Raise `CompressionError` if the graph wasn't made for tensors of these sizes."""
        if (sizes := tuple((tensor.shape, tensor.dtype) for tensor in tensors)) in self.known:
            return
        try:
            self.guards(*tensors)
            self.known.add(sizes)
        except (AssertionError, RuntimeError) as error:
            raise CompressionError(
                "A quantized module must be called with sizes that its trace allows. Received: "
                f"{[tuple(tensor.shape) for tensor in tensors]}, {error}. Begin with such a batch, or exclude the "
                "module in `targets`."
            ) from error


class _Told(list[tuple[str, Structure, list[Any]]]):
    """Lists outputs by the paths of modules. Of a plain list `torch.export` would put the old items back."""


class _Call(nn.Module):
    """Makes a function of the tensors of its call of a module; their structure is told aside.

    It gives the tensors of the output, and then those of the outputs of inner modules whose hooks are to fire.
    """

    def __init__(self, module: nn.Module, signature: Signature) -> None:
        super().__init__()
        self.module = module
        self.signature = signature
        self.training = module.training
        self.__dict__["told"] = _Told()

    def forward(self, *tensors: Tensor) -> list[Any]:
        args, kwargs = self.signature.rebuild(list(tensors))
        told: _Told = self.__dict__["told"]
        told.clear()
        outputs, structure = flatten(class_of(self.module).forward(self.module, *args, **kwargs))
        told.append(("", structure, outputs))
        return [*outputs, *(tensor for _, _, marked in told[:-1] for tensor in marked)]

    def mark(self, path: str, output: Any) -> Any:
        """Pass on an output of the inner module at ``path``, whose tensors stand in the graph then."""
        tensors, structure = flatten(output)
        marked = [aten.alias.default(tensor) for tensor in tensors]
        self.__dict__["told"].append((path, structure, marked))
        return structure.rebuild(marked)


def trace(
    module: nn.Module,
    signature: Signature,
    hooked: Collection[str] = (),
    opaque: Collection[str] = (),
    *,
    training: bool = False,
) -> Trace:
    """Return the traced form of ``module`` in evaluation, or as it trains; the module isn't changed.

    All sizes that its code leaves open may vary, or the first alone where else it couldn't be one. What depends on the
    mode is written down as in training, see `graphs.MODES`. Raises whatever `torch.export` raises where control flow
    depends on data.

    Args:
        module: what is traced.
        signature: the calls that it is traced for.
        hooked: paths of inner modules whose forward hooks are to fire.
        opaque: paths of inner layers that are called as they are.
        training: whether as it trains.

    Raises:
        CompressionError: an opaque layer is more than one operator, or a hook changes an output.
    """
    inputs = tuple(tensor.to(device_of(module)) for tensor in _sizes_above_one(signature.inputs))
    call = _Call(module, signature)
    with (
        quiet(),
        _disable_current_modes(),  # whoever counts operators counts none of these
        torch.inference_mode(False),
        torch.set_grad_enabled(training),
        isolated_random_state(),
        without_fast_path(),
        isolated_state(module.modules()),  # and modes
    ):
        module.train(training)
        with _watched_hooks(module), _inputs_of(_without_tensors(module) if training else {}) as seen:
            call(*inputs)  # so that it is exported with what it makes at its first call
        dropping = frozenset(path for path, (inner, x) in seen.items() if _does_nothing(inner, x))
        with _plain(call, hooked, dropping):
            exported = _export(call, inputs)
    graph, guards = rooted(exported)
    *told, (_, structure, outputs) = call.__dict__["told"]
    results: Any = graph.graph.output_node()
    names = iter([node.name for node in results.args[0][len(outputs) :]])
    marks = tuple((path, inner, tuple(next(names) for _ in marked)) for path, inner, marked in told)
    results.args = (tuple(results.args[0][: len(outputs)]),)
    functionalize_(graph)
    number_paddings_(graph)
    modules = modules_of(module, every_name=True)
    for path in opaque:
        hide_(graph, path, modules[path])
    return Trace(graph, structure, guards, marks, dropping)


@contextmanager
def _watched_hooks(module: nn.Module) -> Iterator[None]:
    """Raise `CompressionError` if a forward hook of an inner module changes an output: it would stay away in int8."""
    with ExitStack() as stack:
        for path, inner in modules_of(module).items():
            if path and (hooks := inner._forward_hooks):
                watched = ((key, partial(_fire, path, hook)) for key, hook in hooks.items())
                stack.callback(vars(inner).update, {"_forward_hooks": hooks})
                vars(inner)["_forward_hooks"] = type(hooks)(watched)
        yield


def _fire(path: str, hook: Any, *args: Any) -> None:
    if hook(*args) is not None:
        raise CompressionError(f"its `{path}` has a forward hook that changes its output, which a trace doesn't follow")


def _without_tensors(module: nn.Module) -> dict[str, nn.Module]:
    """Return the inner modules of the user's own that hold neither tensors nor modules."""
    return {
        path: inner
        for path, inner in modules_of(module).items()
        if path and not type(inner).__module__.startswith("torch.") and not list(inner.children())
        if not any(True for _ in (*inner.parameters(), *inner.buffers()))
    }


@contextmanager
def _inputs_of(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, tuple[nn.Module, Tensor]]]:
    """Note which of these modules are called with a single tensor of floats, and with which."""
    seen: dict[str, tuple[nn.Module, Tensor]] = {}

    def note(path: str, inner: nn.Module, args: tuple[Any, ...]) -> None:
        if len(args) == 1 and isinstance(args[0], Tensor) and args[0].is_floating_point():
            seen[path] = inner, args[0]

    with ExitStack() as stack:
        for path, inner in modules.items():
            stack.enter_context(inner.register_forward_pre_hook(partial(note, path)))
        yield seen


def _does_nothing(module: nn.Module, like: Tensor) -> bool:
    """Tell whether a module gives back what it gets in evaluation."""
    x, before = torch.randn_like(like), module.training
    module.training = False
    try:
        return bool(torch.equal(class_of(module).forward(module, x), x))
    except Exception:  # it is the user's, and may take anything else
        return False
    finally:
        module.training = before


@contextmanager
def _plain(call: _Call, hooked: Collection[str], dropping: Collection[str]) -> Iterator[None]:
    """Take hooks and forms off inner modules, mark outputs of ``hooked`` ones, and give some forwards that export."""
    with ExitStack() as stack:
        for path, inner in modules_of(call.module).items():
            if path and (hooks := inner._forward_hooks):
                stack.callback(vars(inner).update, {"_forward_hooks": hooks})
                vars(inner)["_forward_hooks"] = type(hooks)()
            if path in hooked:
                stack.enter_context(
                    inner.register_forward_hook(lambda _, __, output, path=path: call.mark(path, output))
                )
            forward: Any = class_of(inner).forward if path and form_of(inner) is not None else None
            if path in dropping:
                forward = _drop
            elif isinstance(inner, _BatchNorm):
                forward = _normalize
            elif type(inner) is nn.MaxPool1d and not inner.return_indices:
                forward = _pool
            if forward is not None:
                stack.callback(vars(inner).pop, "forward")
                vars(inner)["forward"] = MethodType(forward, inner)
        yield


def _normalize(self: Any, x: Tensor) -> Tensor:
    """Normalize as a BatchNorm does; it counts batches and finds its momentum itself, when it is called."""
    batch = self.training or self.running_mean is None
    return nn.functional.batch_norm(
        x, self.running_mean, self.running_var, self.weight, self.bias, batch, self.momentum or 0.0, self.eps
    )


def _drop(self: Any, x: Tensor) -> Tensor:
    return torch.dropout(x, 0.5, True)


def _pool(self: Any, x: Tensor) -> Any:
    """Pool as over one row of an image: torch exports pools of one dimension for a single length."""
    kernel, stride, padding, dilation = (
        (other, number if isinstance(number, int) else number[0])
        for other, number in ((1, self.kernel_size), (1, self.stride), (0, self.padding), (1, self.dilation))
    )
    pooled = nn.functional.max_pool2d(x.unsqueeze(-2), kernel, stride, padding, dilation, self.ceil_mode)
    return pooled.squeeze(-2)


_LONGEST = 20
"""Operations in the formula of a variable size. Windows make longer ones, with which export takes minutes."""


class _ShortSizes(TorchFunctionMode):
    """Stops an export in which sizes have become too long formulas."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        sizes = (size for x in args if isinstance(x, Tensor) for size in x.shape)
        if any(isinstance(size, torch.SymInt) and size.node.expr.count_ops() > _LONGEST for size in sizes):
            raise CompressionError("its sizes depend on those of its inputs by long formulas")
        return func(*args, **(kwargs or {}))


def _export(call: nn.Module, inputs: tuple[Tensor, ...]) -> GraphModule:
    """Return the graph with as many variable sizes as can be traced, and leave a batch of one possible."""
    several = [range(tensor.dim()) for tensor in inputs]
    with suppress(Exception), _ShortSizes():  # torch's solver of formulas gives up in many ways
        exported, guards = _exported(call, inputs, several)
        guards(*[tensor[:1] for tensor in inputs])  # with all sizes variable, some code excludes a one
        return exported
    return _exported(call, inputs, [sizes[:1] for sizes in several])[0]


def _exported(call: nn.Module, inputs: tuple[Tensor, ...], variable: list[range]) -> tuple[GraphModule, Any]:
    dynamic = (tuple(dict.fromkeys(sizes, Dim.AUTO) for sizes in variable),)
    with redirect_stderr(StringIO()):  # where it fails, it prints the graph
        exported = torch.export.export(call, inputs, dynamic_shapes=dynamic).module()
    assert isinstance(exported, GraphModule)
    return exported, exported._modules.get("_guards_fn", nn.Identity())


def _sizes_above_one(inputs: list[Tensor]) -> list[Tensor]:
    """Return a batch of one would be exported as a batch that is always one."""
    if all(tensor.dim() and tensor.shape[0] == 1 for tensor in inputs):
        return [tensor.expand(2, *tensor.shape[1:]) for tensor in inputs]
    return inputs
