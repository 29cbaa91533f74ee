"""A unit, a module that is quantized as a whole, and its traced form: fake-quantized while it trains, then int8."""

from __future__ import annotations

import copy
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.errors import CompressionError
from lightning_compress.modules.isolation import isolated_random_state
from lightning_compress.modules.routing import CHILD, RoutedForm, is_set_aside
from lightning_compress.quantization.numerics.int8 import StaticInt8, refuse_to_move
from lightning_compress.quantization.static.flows.flow import Flow, Signature, Trace, canonical, load

_LISTS = ("hooked", "floats", "widened", "unconverted")


@dataclass(frozen=True)
class Unit:
    """Describes one module that is traced and quantized as a whole.

    Attributes:
        path: where it stands, without ``_orig_mod``.
        signature: the calls that it is traced for.
        hooked: inner modules (paths in the unit) whose forward hooks must go on firing.
        floats: inner modules (paths in the unit) that stay float by the user's choice.
        flow: name of the flow that traces it.
        widened: inner ReLU6 (paths in the unit) that are ReLU in its traced form.
        unconverted: inner layers (paths in the unit) that were prepared, and are float in its int8 form all the same:
            their kernels were found wrong when it was converted.
    """

    path: str
    signature: Signature
    hooked: tuple[str, ...] = ()
    floats: tuple[str, ...] = ()
    flow: str = "fx"
    widened: tuple[str, ...] = ()
    unconverted: tuple[str, ...] = ()

    def describe(self) -> dict[str, Any]:
        """Return plain data for a checkpoint."""
        lists = {name: list(getattr(self, name)) for name in _LISTS}
        return {"path": self.path, "example": self.signature.example, "flow": self.flow, **lists}

    @classmethod
    def from_description(cls, plain: dict[str, Any]) -> Unit:
        args, kwargs = plain["example"]
        signature = Signature(tuple(args), kwargs)
        lists = {name: tuple(plain[name]) for name in _LISTS}
        return cls(plain["path"], signature, flow=plain["flow"], **lists)


class Traced(RoutedForm):
    """Holds the traced form of its parent module: fake-quantized while it trains, int8 once converted.

    ``graph`` is made of that of ``trace``; ``used`` are the parent's children and tensors that it took the place of.
    """

    def __init__(
        self,
        graph: nn.Module,
        trace: Trace,
        signature: Signature,
        used: frozenset[str],
        flow: str,
        is_int8: bool = False,
    ) -> None:
        super().__init__()
        self.graph = graph
        self.signature = signature
        self.structure = trace.structure
        self.names = trace.names
        self.baked = trace.baked
        self.used = used
        self.flow = flow
        self.is_int8 = is_int8
        self.calibrating = False
        self.observers_frozen = False
        self.batchnorm_frozen = False
        self._observing: bool | None = None
        # (module in the graph, buffer, module in the parent, buffer): the same tensor, seen from both.
        self.shared_buffers: list[tuple[nn.Module, str, nn.Module, str]] = []
        self._qconfigs: list[tuple[nn.Module, Any]] = []

    @property
    def upstream(self) -> Flow:
        """The flow that made it."""
        return load(self.flow)

    def forward(self, *tensors: Tensor) -> Any:
        observe = self.calibrating or (self.training and not self.observers_frozen)
        if observe != self._observing and not self.is_int8:
            # Evaluation never moves an observer, whoever runs it.
            self.upstream.observe_(self.graph, observe)
            self._observing = observe
        if self.batchnorm_frozen and self.training:
            self.graph.apply(freeze_batchnorm_)
        device = tensors[0].device.type if tensors else "cpu"
        if not torch.is_autocast_enabled(device):
            return self.structure.rebuild(self.graph(*tensors))
        with torch.autocast(device, enabled=False):
            floats = [tensor.float() if tensor.is_floating_point() else tensor for tensor in tensors]
            return self.structure.rebuild(self.graph(*floats))

    def serve(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.signature.is_one_tensor and len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            return self(args[0])  # nearly every call, and binding it would take longer than a small layer
        tensors = self.signature.tensors(*canonical(module, args, kwargs))
        if tensors is not None:
            return self(*tensors)
        if not is_set_aside(module):
            return type(module).forward(module, *args, **kwargs)
        raise CompressionError(
            f"The int8 form of {type(module).__name__} must be called as it was traced. "
            "Received: other arguments or flags. Call it with the arguments of the calibration or training step, or "
            "exclude it from `targets`."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Traced:
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __reduce__(self) -> Any:
        # At the start of each run Lightning pickles every hyperparameter, only to drop from `hparams` what fails. What
        # it writes into files later is made plain beforehand, so a module of these must not fail here.
        if sys._getframe(1).f_code.co_name == "is_picklable":
            return nn.Identity, ()
        raise CompressionError(
            "A quantized model can't be pickled: torch's traced form can't. Save it with trainer.save_checkpoint(path) "
            "or save_compressed(model, path), and load it with load_compressed(path, model)."
        )

    def take_qconfigs_(self, parent: nn.Module) -> None:
        """Take off the parent's modules what upstream leaves on them, which can't be pickled."""
        self._qconfigs = [(inner, vars(inner).pop("qconfig")) for inner in parent.modules() if "qconfig" in vars(inner)]

    def converted(self, scheme: StaticInt8, floats: Collection[str] = ()) -> Any:
        """Return the graph in int8, but for the layers in ``floats``; the one that is prepared is left as it is."""
        with self._as_prepared():
            return self.upstream.convert(self.graph, scheme, floats)

    def as_int8(self, graph: nn.Module) -> Traced:
        """Return the same for ``graph``, what `converted` gave."""
        trace = Trace(graph, self.structure, self.names, self.baked)
        return Traced(graph, trace, self.signature, self.used, self.flow, is_int8=True)

    def wrong_kernels(self, scheme: StaticInt8) -> dict[str, str]:
        """Find the layers (paths in the parent) whose int8 kernels compute something else now, with reasons."""
        examples, flow = self.signature.inputs, self.upstream
        with isolated_random_state(), self._as_prepared():
            inputs = [torch.randn(zeros.shape) if zeros.is_floating_point() else zeros.clone() for zeros in examples]
            int8 = flow.convert(self.graph, scheme)
            return flow.wrong_kernels(self.graph, int8, scheme, inputs, drawn_only=True)

    @contextmanager
    def _as_prepared(self) -> Iterator[None]:
        for inner, qconfig in self._qconfigs:
            vars(inner)["qconfig"] = qconfig
        try:
            yield
        finally:
            for inner, _ in self._qconfigs:
                del vars(inner)["qconfig"]

    def keep_frozen_batchnorm_(self) -> None:
        """Return a BatchNorm that the user had put into evaluation mode stays so when it was fused."""
        for inner, name, outer, _ in self.shared_buffers:
            if name == "running_mean" and not outer.training:
                for module in self.graph.modules():
                    if getattr(module, "bn", None) is inner:
                        freeze_batchnorm_(module)
                inner.eval()

    def thaw_batchnorm_(self) -> None:
        """Let the statistics of fused BatchNorms move again, but for those that the user had frozen."""
        fused: Any
        for fused in self.graph.modules():
            if hasattr(fused, "update_bn_stats"):
                fused.update_bn_stats()
        self.keep_frozen_batchnorm_()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        if self.is_int8:
            refuse_to_move(fn)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # Moving a module gives it new buffers; the parent's were moved before, so they are taken from there.
        for inner, name, outer, outer_name in self.shared_buffers:
            inner._buffers[name] = outer._buffers[outer_name]
        return self


def freeze_batchnorm_(module: Any) -> None:
    """Stop the statistics of a layer with a fused BatchNorm."""
    if hasattr(module, "freeze_bn_stats"):
        module.freeze_bn_stats()


def share_buffers(traced: Traced, parent: nn.Module) -> None:
    """Note which buffers of the graph are the parent's own, so that they stay so."""
    owned = {
        id(buffer): (module, name)
        for path, module in parent.named_modules()
        if CHILD not in path.split(".")
        for name, buffer in module._buffers.items()
        if buffer is not None
    }
    traced.shared_buffers = [
        (module, name, *owned[id(buffer)])
        for module in traced.graph.modules()
        for name, buffer in module._buffers.items()
        if id(buffer) in owned
    ]


def trace_by(flow: str, module: nn.Module, unit: Unit) -> Trace:
    """Return the traced form of ``module`` by the flow of this name."""
    return load(flow).trace(module, unit.signature, unit.hooked)


def prepared_form(module: nn.Module, unit: Unit, scheme: StaticInt8, *, training: bool) -> Traced:
    """Return the traced, prepared form of ``module``; sharing its parameters, not yet in its place."""
    flow, trace = load(unit.flow), trace_by(unit.flow, module, unit)
    widen_(trace.graph, unit.widened)
    prepared = flow.prepare(trace.graph, scheme, training=training, floats=unit.floats)
    return Traced(prepared, trace, unit.signature, _replaced(module, trace.names), unit.flow)


def _replaced(module: nn.Module, names: Collection[str]) -> frozenset[str]:
    """Name the module's own children and tensors in which these stand, or that hold nothing but the same again."""
    used = {name.partition(".")[0] for name in names}
    taken = {
        id(parameter) for name in used & module._modules.keys() for parameter in module.get_submodule(name).parameters()
    }
    for name, child in module._modules.items():
        parameters = [] if child is None else list(child.parameters())
        if parameters and all(id(parameter) in taken for parameter in parameters):
            used.add(name)
    return frozenset(used)


def widen_(graph: nn.Module, relu6: Collection[str], kind: type[nn.Module] = nn.ReLU) -> None:
    """Put a ReLU in the place of each of these ReLU6 of a traced graph; the traced module keeps its own."""
    for path in relu6:
        graph.set_submodule(path, kind())
