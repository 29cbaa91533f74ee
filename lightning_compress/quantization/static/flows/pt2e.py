"""The pt2e flow: `torch.export` and torchao's quantizer for x86, after training only.

It sees through attention, functional layers and most Python that `fx` can't trace. In process the int8 graph is
compiled by inductor at its first call; uncompiled it rounds to int8 and computes in float, which is what
`torch.export` and ONNX want of it.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule, Node

from lightning_compress.errors import CompressionError, NoEffectWarning, in_a_line
from lightning_compress.modules.isolation import isolated_evaluation, isolated_random_state
from lightning_compress.modules.outputs import Structure, flatten
from lightning_compress.quantization.schemes import AVERAGING_CONSTANT, StaticInt8, describe
from lightning_compress.quantization.static.flows import Trace
from lightning_compress.quantization.static.flows.exported_kernels import compiled_is_off, exported_steps
from lightning_compress.quantization.static.flows.exported_weights import fold_weights_, number_paddings_
from lightning_compress.quantization.static.flows.float_weights import weights_read
from lightning_compress.quantization.static.flows.kernels import furthest, reasons
from lightning_compress.quantization.static.signature import Signature


@contextmanager
def _quiet() -> Iterator[None]:
    """Upstream warns of its kernels for other devices, and of what follows from torch's own changes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        levels = {logging.getLogger(name): logging.getLogger(name).level for name in ("torch", "torchao")}
        for logger in levels:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in levels.items():
                logger.setLevel(level)


with _quiet(), torch._inductor.config.patch(pre_grad_custom_pass=torch._inductor.config.pre_grad_custom_pass):
    # Importing them sets this flag of inductor's for the whole process; only our own compilations are to have it.
    from torch._inductor.compile_fx import compile_fx
    from torchao.quantization.pt2e.observer import (
        HistogramObserver,
        MinMaxObserver,
        MovingAverageMinMaxObserver,
        PerChannelMinMaxObserver,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import QuantizationSpec
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        QuantizationConfig,
        X86InductorQuantizer,
        quant_lift_up,
    )

_INDUCTOR = {"freezing": True, "pre_grad_custom_pass": quant_lift_up}
_ROUNDINGS = (
    torch.ops.quantized_decomposed.quantize_per_tensor.default,
    torch.ops.quantized_decomposed.dequantize_per_tensor.default,
)


class _Call(nn.Module):
    """A module as a function of the tensors of its call; what it puts those of its output into is told aside."""

    def __init__(self, module: nn.Module, signature: Signature, tell: Callable[[Structure], None]) -> None:
        super().__init__()
        self.module = module
        self.signature = signature
        self.tell = tell
        self.training = module.training

    def forward(self, *tensors: Tensor) -> list[Any]:
        args, kwargs = self.signature.rebuild(list(tensors))
        outputs, structure = flatten(type(self.module).forward(self.module, *args, **kwargs))
        self.tell(structure)
        return outputs


class Exported(nn.Module):
    """Holds an exported graph, which knows no modes: switching them would reset its dropout and BatchNorm."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__()
        self.graph = graph

    def train(self, mode: bool = True) -> Exported:
        self.training = mode
        return self

    def forward(self, *tensors: Tensor) -> Any:
        return self.graph(*tensors)


class Int8Graph(Exported):
    """A converted graph, compiled at its first call; scales and zero points are in its state, not in its code alone.

    Raises:
        CompressionError: called with a shape that it wasn't exported for.
    """

    qparams: Tensor

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        values = [[float(value) for value in node.args[1:3]] for node in self._roundings()]  # type: ignore[arg-type]
        self.register_buffer("qparams", torch.tensor(values, dtype=torch.float64).reshape(-1, 2))
        self._compiled: Any = None
        self._dynamic: bool | None = None
        self._gave_up = False
        self._compilations = 0
        self._known: set[Any] = set()  # calls that were compiled for

    def _roundings(self) -> list[Node]:
        return [node for node in self.graph.graph.nodes if node.target in _ROUNDINGS]

    @torch.no_grad()
    def forward(self, *tensors: Tensor) -> Any:
        if self._gave_up or torch.compiler.is_compiling():  # the latter also while it is exported
            return self.graph(*tensors)
        key = (*[(tensor.shape, tensor.dtype) for tensor in tensors], torch.is_inference_mode_enabled())
        if key in self._known:
            return self._compiled(*tensors)
        return self._first_call(key, *tensors)

    def _first_call(self, key: Any, *tensors: Tensor) -> Any:
        """Compile for a new shape: for any where inductor can, else for this one, else not at all."""
        reason = ""
        for dynamic in (None, False) if self._compiled is None else (self._dynamic, False):
            if self._compiled is None or dynamic != self._dynamic:
                self._compiled = torch.compile(self.graph.forward, backend=self._compile, dynamic=dynamic)
                self._dynamic = dynamic
            before = self._compilations
            try:
                # Weights become constants that are packed once; that is decided while compiling.
                with _quiet(), torch._inductor.config.patch(_INDUCTOR):
                    output = self._compiled(*tensors)
            except Exception as error:  # of the compiler, or of what it made
                reason = in_a_line(error)
                self._check_shapes(*tensors)
                continue
            if self._compilations == before:
                return output
            self._known.add(key)
            if not (off := compiled_is_off(self.graph, tensors, output)):
                return output
            reason = off
            self._compiled = None
        self._gave_up = True
        warnings.warn(
            f"pt2e: the int8 form isn't compiled by inductor ({reason}). It runs uncompiled, and so slower than "
            "float32. Install a C++ compiler, or use flow='fx'.",
            NoEffectWarning,
            stacklevel=2,
        )
        return self.graph(*tensors)

    def _check_shapes(self, *tensors: Tensor) -> None:
        try:
            self.graph(*tensors)
        except AssertionError as error:
            raise CompressionError(
                "An int8 form that pt2e made must be called with the shapes that it was exported for. "
                f"Received: {[tuple(tensor.shape) for tensor in tensors]}, {error}. Calibrate with such a batch."
            ) from error

    def _compile(self, graph: GraphModule, inputs: list[Tensor]) -> Any:
        self._compilations += 1
        return compile_fx(graph, inputs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        for node, (scale, zero_point) in zip(self._roundings(), self.qparams.tolist(), strict=True):
            node.args = (node.args[0], scale, int(zero_point), *node.args[3:])
        self.graph.recompile()
        self._compiled = None
        self._known.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": None, "_known": set()}


def trace(module: nn.Module, signature: Signature, hooked: Collection[str] = ()) -> Trace:
    """The exported form of ``module`` in evaluation.

    All sizes that its code leaves open may vary, or the first alone where else it couldn't be one. Raises whatever
    `torch.export` raises where control flow depends on data.
    """
    if hooked:
        raise CompressionError(f"its `{next(iter(hooked))}` has a forward hook, which an exported graph doesn't call")
    device = next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    inputs = tuple(tensor.to(device) for tensor in _sizes_above_one(signature.inputs))
    structures: list[Structure] = []
    call = _Call(module, signature, structures.append)
    with _quiet(), isolated_evaluation(module):
        call(*inputs)  # so that it is exported with what it makes at its first call, whether it has been called or not
        exported = _export(call, inputs)
    read = [str(node.target) for node in exported.graph.nodes if node.op == "get_attr" and node.users]
    names = frozenset(name.removeprefix("module.") for name in read if name.startswith("module."))
    return Trace(Exported(exported), structures[-1], names, {})


def _export(call: nn.Module, inputs: tuple[Tensor, ...]) -> GraphModule:
    """The graph with as many variable sizes as leave a batch of one possible."""
    several = [range(tensor.dim()) for tensor in inputs]
    for dims in (several, [sizes[:1] for sizes in several]):
        dynamic = (tuple(dict.fromkeys(sizes, Dim.AUTO) for sizes in dims),)
        exported = torch.export.export(call, inputs, dynamic_shapes=dynamic).module()
        assert isinstance(exported, GraphModule)
        try:
            exported(*[tensor[:1] for tensor in inputs])
            break
        except (AssertionError, RuntimeError, IndexError):  # with all sizes variable, some code excludes a one
            continue
    return exported


def _sizes_above_one(inputs: list[Tensor]) -> list[Tensor]:
    """A batch of one would be exported as a batch that is always one."""
    if all(tensor.dim() and tensor.shape[0] == 1 for tensor in inputs):
        return [tensor.expand(2, *tensor.shape[1:]) for tensor in inputs]
    return inputs


def prepare(graph: nn.Module, scheme: StaticInt8, *, training: bool, floats: Collection[str] = ()) -> Exported:
    """A copy of ``graph`` with observers; the layers in ``floats`` have none.

    Raises:
        CompressionError: for training, which this flow isn't for.
    """
    if training:
        raise CompressionError("`flow` must be 'fx' for training. Received: flow='pt2e'.")
    assert isinstance(graph, Exported)
    quantizer = X86InductorQuantizer().set_global(_configuration(scheme))
    for path in floats:
        quantizer.set_module_name_qconfig(f"module.{path}", None)
    with _quiet(), torch.no_grad(), isolated_random_state():
        copied = copy.deepcopy(graph.graph)
        number_paddings_(copied)
        fold_weights_(copied)
        _name_sources_(copied, floats)
        prepared = prepare_pt2e(copied, quantizer)
        for node, tensor in _tensors(prepared):
            for user in node.users:
                if isinstance(observer := _called(prepared, user), PerChannelMinMaxObserver):
                    observer(tensor)  # so that it has its shape before a checkpoint is loaded
    return Exported(prepared)


_SOURCES = {
    **{torch.ops.aten.linear.default: nn.Linear},
    **{torch.ops.aten.conv1d.default: nn.Conv1d, torch.ops.aten.conv2d.default: nn.Conv2d},
    **{torch.ops.aten.relu.default: nn.ReLU, torch.ops.aten.relu_.default: nn.ReLU},
    **{torch.ops.aten.relu6.default: nn.ReLU6, torch.ops.aten.relu6_.default: nn.ReLU6},
    **{torch.ops.aten.hardtanh.default: nn.Hardtanh, torch.ops.aten.hardtanh_.default: nn.Hardtanh},
    **{torch.ops.aten.hardswish.default: nn.Hardswish, torch.ops.aten.hardswish_.default: nn.Hardswish},
    **{torch.ops.aten.silu.default: nn.SiLU, torch.ops.aten.silu_.default: nn.SiLU},
    **{torch.ops.aten.leaky_relu.default: nn.LeakyReLU, torch.ops.aten.leaky_relu_.default: nn.LeakyReLU},
    **{torch.ops.aten.gelu.default: nn.GELU, torch.ops.aten.tanh.default: nn.Tanh},
}
"""The layers by which upstream's quantizer knows operations, for itself and in patterns that it fuses."""


def _name_sources_(graph: GraphModule, floats: Collection[str]) -> None:
    """Give each operation a source of its own, by what it computes.

    Upstream goes by the module that called it: the calls of one module would be one operation, and those in a layer of
    the user's own, or in attention, none that it knows.
    """
    for node in graph.graph.nodes:
        source = _SOURCES.get(node.target, node.target)
        if source in (nn.Linear, nn.Conv1d, nn.Conv2d):
            weight = str(node.args[1].target).removeprefix("module.") if node.args[1].op == "get_attr" else ""
            if not weight or any(weight.startswith(f"{path}.") or weight == path for path in floats):
                source = node.target
        node.meta["source_fn_stack"] = [(node.name, source)]


def _tensors(graph: GraphModule) -> Iterator[tuple[Node, Tensor]]:
    """The parameters and buffers that a graph reads."""
    for node in graph.graph.nodes:
        if node.op == "get_attr" and node.users:
            owner, _, name = str(node.target).rpartition(".")
            value = getattr(graph.get_submodule(owner), name)
            if isinstance(value, Tensor):
                yield node, value


def _called(graph: GraphModule, node: Node) -> nn.Module | None:
    return graph.get_submodule(str(node.target)) if node.op == "call_module" else None


_OBSERVERS = {
    "moving_average": MovingAverageMinMaxObserver.with_args(eps=2**-12, averaging_constant=AVERAGING_CONSTANT),
    "minmax": MinMaxObserver.with_args(eps=2**-12),
    "histogram": HistogramObserver.with_args(eps=2**-12),
}


def _configuration(scheme: StaticInt8) -> QuantizationConfig:
    reduced = describe(scheme)["reduce_range"]
    activations = QuantizationSpec(
        dtype=torch.uint8,
        quant_min=0,
        quant_max=255,
        qscheme=torch.per_tensor_affine,
        observer_or_fake_quant_ctr=_OBSERVERS[scheme.observer],
    )
    weights = QuantizationSpec(
        dtype=torch.int8,
        quant_min=-64 if reduced else -128,
        quant_max=63 if reduced else 127,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
        observer_or_fake_quant_ctr=PerChannelMinMaxObserver.with_args(eps=2**-12),
    )
    return QuantizationConfig(activations, activations, weights, None)


def observe_(prepared: nn.Module, on: bool) -> None:
    """Nothing: its observers observe whenever it runs, which is while it is calibrated."""


def fake_quantize_(prepared: nn.Module, on: bool) -> None:
    """Nothing: observers let values through."""


def quantizes(prepared: nn.Module) -> bool:
    """Whether any layer computes in int8."""
    return any(isinstance(module, PerChannelMinMaxObserver) for module in prepared.modules())


def float_weights(prepared: nn.Module) -> dict[str, str]:
    """The matrices that no observer sees; see `Flow`."""
    assert isinstance(prepared, Exported)
    graph = prepared.graph
    observed = {
        str(node.target).removeprefix("module.")
        for node, _ in _tensors(graph)
        if any(isinstance(_called(graph, user), PerChannelMinMaxObserver) for user in node.users)
    }
    read = ((name.removeprefix("module."), why) for name, why in weights_read(graph) if name.startswith("module."))
    return {name: why for name, why in read if name not in observed}


def convert(prepared: nn.Module, scheme: StaticInt8, floats: Collection[str] = ()) -> Int8Graph:
    """A new int8 graph on the CPU; ``prepared`` is left as it is.

    Raises:
        CompressionError: prepared layers are to be float nonetheless, which this flow can't do.
    """
    assert isinstance(prepared, Exported)
    if floats:
        raise CompressionError(
            "A layer that is converted must compute what it computed before. Received: "
            f"{', '.join(map(repr, floats))}, whose int8 form doesn't. Exclude it in `targets`, or use flow='fx'."
        )
    with _quiet(), torch.no_grad(), isolated_random_state():
        converted = convert_pt2e(copy.deepcopy(prepared.graph).cpu())
    _drop_unread_(converted)
    return Int8Graph(converted)


def wrong_kernels(
    prepared: nn.Module, int8: nn.Module, scheme: StaticInt8, inputs: list[Tensor], drawn_only: bool = False
) -> dict[str, str]:
    """The layers that in ``int8`` compute something else than they do, each with a reason; see `Flow`.

    That is, uncompiled: `Int8Graph` judges its compiled form when there is one.
    """
    assert isinstance(prepared, Exported) and isinstance(int8, Exported)
    with _quiet():
        run = partial(exported_steps, int8.graph, copy.deepcopy(prepared.graph).cpu())
        return reasons(furthest(run, inputs, drawn_only), {})


def _drop_unread_(graph: GraphModule) -> None:
    """Take out the float weights that upstream leaves behind."""
    read = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    for path, module in list(graph.named_modules()):
        for tensors in (module._parameters, module._buffers):
            for name in [name for name in tensors if f"{path}.{name}".lstrip(".") not in read]:
                del tensors[name]
    graph.delete_all_unused_submodules()
