"""One unit: a module that is traced and quantized as a whole, and whether its quantized form may stand for it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized
from torch.utils import _pytree as pytree

from lightning_compress.modules.copying import copy_module, copy_tensors
from lightning_compress.modules.fast_path import without_fast_path
from lightning_compress.modules.isolation import isolated_random_state
from lightning_compress.modules.outputs import same_outputs, same_structure
from lightning_compress.modules.paths import clean_name, is_at_or_below
from lightning_compress.quantization.schemes import Scheme, StaticInt8
from lightning_compress.quantization.static import flows
from lightning_compress.quantization.static.equalize import widen_
from lightning_compress.quantization.static.signature import Signature
from lightning_compress.quantization.static.traced import Traced


@dataclass(frozen=True)
class Unit:
    """One module to be traced and quantized as a whole.

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
        """Plain data for a checkpoint."""
        return {
            "path": self.path,
            "example": self.signature.example,
            "hooked": list(self.hooked),
            "floats": list(self.floats),
            "flow": self.flow,
            "widened": list(self.widened),
            "unconverted": list(self.unconverted),
        }

    @classmethod
    def from_description(cls, plain: dict[str, Any]) -> Unit:
        args, kwargs = plain["example"]
        signature = Signature(tuple(args), kwargs)
        lists = {name: tuple(plain[name]) for name in ("hooked", "floats", "widened", "unconverted")}
        return cls(plain["path"], signature, flow=plain["flow"], **lists)


def prepared_form(module: nn.Module, unit: Unit, scheme: StaticInt8, *, training: bool) -> Traced:
    """The traced, prepared form of ``module``; sharing its parameters, not yet in its place."""
    flow = flows.load(unit.flow)
    trace = flow.trace(module, unit.signature, unit.hooked)
    widen_(trace.graph, unit.widened)
    prepared = flow.prepare(trace.graph, scheme, training=training, floats=unit.floats)
    return Traced(prepared, trace, unit.signature, _replaced(module, trace.names), unit.flow)


def _replaced(module: nn.Module, names: Collection[str]) -> frozenset[str]:
    """Names of the module's own children and tensors in which these stand, or that hold nothing but the same again."""
    used = {name.partition(".")[0] for name in names}
    taken = {
        id(parameter) for name in used & module._modules.keys() for parameter in module.get_submodule(name).parameters()
    }
    for name, child in module._modules.items():
        parameters = [] if child is None else list(child.parameters())
        if parameters and all(id(parameter) in taken for parameter in parameters):
            used.add(name)
    return frozenset(used)


@dataclass(frozen=True)
class Verdict:
    """What came out when a unit was tried.

    Attributes:
        reason: why it can't be one; empty if it can.
        left: its layers (paths in the unit) that stay float, each with the reason.
        wrong: its layers that must stay float as their int8 kernels are wrong, each with the reason; without them it
            could be a unit.
    """

    reason: str
    left: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)


@isolated_random_state()
def verify(
    module: nn.Module, unit: Unit, args: tuple[Any, ...], kwargs: dict[str, Any], scheme: StaticInt8, training: bool
) -> Verdict:
    """Whether the prepared form can stand for ``module``.

    It can if, with fake-quantization off, it gives the outputs that ``module`` gives in each mode, and then converts
    into kernels each of which computes its own layer. Works on copies.
    """
    flow, left, inputs = flows.load(unit.flow), dict[str, str](), list[Tensor]()
    for mode in (True, False) if training else (False,):
        original, twin = _without_hooks(module), _without_hooks(module)
        twin.train(training)
        traced = prepared_form(twin, unit, scheme, training=training)
        if not flow.quantizes(traced.graph):
            return Verdict("no layer in it can be quantized")
        flow.fake_quantize_(traced.graph, False)
        traced.calibrating = True  # so that its int8 form knows the ranges
        for model in (original, twin, traced):
            model.train(mode)
        buffers = {name: buffer.clone() for name, buffer in original.named_buffers()}
        expected = _run(original, args, kwargs)
        changed = [
            name for name, buffer in original.named_buffers() if not same_outputs(buffers.get(name), buffer, 0.0)
        ]
        if changed and not mode:
            return Verdict(f"it changes its `{changed[0]}` in evaluation, which an int8 form doesn't")
        tensors = unit.signature.tensors(*copy_tensors((args, kwargs)))
        assert tensors is not None
        if not same_outputs(expected, _run(traced, tuple(tensors), {})):
            return Verdict(f"its traced form computes something else in {'training' if mode else 'evaluation'}")
        layers = {clean_name(name): child for name, child in twin.named_modules()}
        inputs = _on_cpu(tensors)
        left = _left_float(layers, flow.float_weights(traced.graph), scheme) | _unused(twin, traced.names)
    # Found out now, not when hours of training end; some int8 kernels of torch compute something else altogether.
    int8 = flow.convert(traced.graph, scheme)
    with torch.compiler.set_stance("force_eager"):
        if not same_structure(expected, _run(traced.as_int8(int8), tuple(inputs), {})):
            return Verdict("its int8 form gives outputs of another structure")
    wrong = flow.wrong_kernels(traced.graph, int8, scheme, inputs)
    return Verdict(wrong.pop("", ""), left, wrong)


def _left_float(layers: Mapping[str, nn.Module], weights: Mapping[str, str], scheme: StaticInt8) -> dict[str, str]:
    """What a unit leaves in float, with reasons: layers, and matrices that modules around layers use as weights.

    Args:
        layers: the modules of the unit, by path.
        weights: see `Flow.float_weights`.
        scheme: the numbers.
    """
    left = {}
    for name, reason in weights.items():
        path = clean_name(name)
        owner = path if path in layers else path.rpartition(".")[0].partition(".parametrizations")[0]
        if not holds_layers(layers.get(owner)):
            left[owner] = reason or no_kernel(layers.get(owner), scheme)
        elif reason:
            left[path] = reason
    return left


def _unused(module: nn.Module, names: Collection[str]) -> dict[str, str]:
    """The layers with matrices of which a traced form that has these names calls and reads none."""
    read = {
        id(parameter)
        for path, parameter in module.named_parameters(remove_duplicate=False)
        if any(is_at_or_below(path, name) for name in names)
    }
    return {
        clean_name(path): "the first batch doesn't call it"
        for path, layer in module.named_modules()
        if path and not holds_layers(layer) and not isinstance(layer, ParametrizationList)
        if (matrices := [id(one) for one in layer.parameters(recurse=False) if one.dim() > 1])
        if not read.intersection(matrices)
    }


def _without_hooks(module: nn.Module) -> nn.Module:
    twin = copy_module(module)
    for inner in twin.modules():
        inner._forward_hooks.clear()
    return twin


def _on_cpu(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.float().cpu() if tensor.is_floating_point() else tensor.cpu() for tensor in tensors]


def _run(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    args, kwargs = copy_tensors((args, kwargs))
    device = next((leaf.device.type for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), "cpu")
    with torch.no_grad(), isolated_random_state(), without_fast_path(), torch.autocast(device, enabled=False):
        torch.manual_seed(0)
        return module(*args, **kwargs)


_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_DYNAMIC = (nn.LSTM, nn.GRU, nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)


def holds_layers(module: nn.Module | None) -> bool:
    """Whether a module is one of the user's own around layers, and so no layer, even if it owns a matrix."""
    return (
        module is not None and not type(module).__module__.startswith("torch.") and any(True for _ in module.children())
    )


def no_kernel(layer: nn.Module | None, scheme: Scheme) -> str:
    """The reason why a layer stays float."""
    kind = "it" if layer is None else type(layer).__name__
    if layer is not None and is_parametrized(layer):
        return f"the weight of this {kind} is computed by a parametrization"
    if isinstance(scheme, StaticInt8) and isinstance(layer, _TRANSPOSED):
        return f"torch has no int8 kernel of {kind} that is right on every CPU"
    if isinstance(scheme, StaticInt8) and isinstance(layer, _LAYERS):
        if layer._parameters.get("weight") is None:
            return "its weight is computed by a hook (weight norm, pruning)"
        return f"no static int8 kernel for this {kind} as it is used here"
    remedy = " (`overrides` can give it int8_dynamic)" if type(layer) in _DYNAMIC else ""
    return f"no {'static int8' if isinstance(scheme, StaticInt8) else scheme.name} kernel for {kind}{remedy}"
