"""Finds the largest sub-modules whose traced form computes what they computed; the rest stays float, with reasons."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.errors import CompressionError, in_a_line
from lightning_compress.modules.call_log import CallLog
from lightning_compress.modules.copying import copy_module, copy_tensors
from lightning_compress.modules.fast_path import without_fast_path
from lightning_compress.modules.isolation import isolated_random_state
from lightning_compress.modules.outputs import same_outputs
from lightning_compress.modules.paths import clean_name, compressible_modules, is_at_or_below
from lightning_compress.modules.routing import form_of, routed_modules
from lightning_compress.quantization.layers.without_kernel import (
    QUANTIZED,
    REPLACED,
    has_kernel,
    holds_layers,
    left_float,
    may_have_kernel,
    of_one_weight,
    own_matrices,
    tied_to_float,
    unused,
    without_kernel,
)
from lightning_compress.quantization.numerics.int8 import StaticInt8
from lightning_compress.quantization.static.graphs import (
    copy_graph,
    evaluate_modes_,
    float_weights,
    int8_layers,
    is_one_of,
)
from lightning_compress.quantization.static.signature import Signature, canonical
from lightning_compress.quantization.static.trace import Trace
from lightning_compress.quantization.static.traced import Traced
from lightning_compress.quantization.static.unit import Unit, trace_unit
from lightning_compress.targets import Targets

AS_A_WHOLE = "not as a whole: "
"""Begins the reason of what is tried in parts."""

_BACKWARD_HOOKS = (("backward hook", "_backward_hooks"), ("backward pre-hook", "_backward_pre_hooks"))


def plan_units(
    model: nn.Module,
    log: CallLog,
    scheme: StaticInt8,
    targets: Targets | None,
    layers: Collection[str],
    *,
    training: bool,
) -> tuple[list[Unit], dict[str, Trace], dict[str, str]]:
    """Find the largest units of ``model`` that can be quantized, with traces, and why the rest stays float.

    A module is accepted if nothing outside calls into it, it traces, and its prepared form, without rounding, gives
    the outputs that it gave, in training (same random state) and in evaluation. Else its children are tried.
    What stands in ``layers`` is quantized one by one.
    """
    modules, tied = compressible_modules(model), tied_to_float(model)
    planner = _Planner(modules, log, scheme, _excluded(model, targets, layers), set(layers), training)
    planner.visit("")
    units, floats = planner.units, planner.left_float
    float_owners = {other for path, other in of_one_weight(modules) if path in tied and other not in tied}
    for path, reason in (tied | without_kernel(model, scheme)).items():
        inside = any(is_at_or_below(path, unit.path) for unit in units)
        if not inside or path in float_owners or (path in modules and isinstance(modules[path], nn.Embedding)):
            floats.setdefault(path, reason)
    return units, planner.traces, floats


@dataclass
class _Planner:
    """Walks down the modules until it finds units."""

    modules: dict[str, nn.Module]
    calls: CallLog
    scheme: StaticInt8
    excluded: set[str]
    layers: set[str]
    training: bool
    units: list[Unit] = field(default_factory=list)
    traces: dict[str, Trace] = field(default_factory=dict)
    left_float: dict[str, str] = field(default_factory=dict)

    def visit(self, path: str) -> None:
        """Plan ``path`` as one unit, or else what is below it."""
        module = self.modules[path]
        if form_of(module) is not None:
            self.left_float[path] = QUANTIZED
            return
        inside = {inner: module for inner, module in self.modules.items() if is_at_or_below(inner, path)}
        left = self.excluded | self.layers
        wanted = [inner for inner, module in inside.items() if may_have_kernel(module) and inner not in left]
        if not wanted:
            return
        if not _is_shell(path, module):
            unit, reason = self.try_unit(path)
            if unit is not None:
                self.units.append(unit)
                return
            if path in wanted and not holds_layers(module):
                self.left_float[path] = reason if has_kernel(module) else self.scheme.no_kernel(module)
            elif path in self.calls.inputs:
                self.left_float[path] = f"{AS_A_WHOLE}{reason}"
        for name, _ in module.named_children():
            child = clean_name(f"{path}.{name}".lstrip("."))
            if child != path and child in self.modules:
                self.visit(child)

    def try_unit(self, path: str) -> tuple[Unit | None, str]:
        """Return the unit, or why it can't be one."""
        module = self.modules[path]
        if path not in self.calls.inputs:
            return None, "it wasn't called in the dry run"
        if (entered := self.calls.entered_below(path)) is not None:
            return None, f"its `{entered}` is called from outside of it"
        if (replaced := self.calls.replaced_below(path)) is not None:
            return None, REPLACED if replaced == path else f"its `{replaced}` is called with parameters of others"
        if (read := self.calls.read_below(path)) is not None:
            return None, f"its {'weight' if read == path else f'`{read}`'} is read from outside of it"
        if routed_modules(module):
            return None, "a part of it is quantized already"
        if "forward" in vars(module):
            return None, "its forward was replaced on the instance"
        for kind, hooks in (("forward pre-hook", "_forward_pre_hooks"), *_BACKWARD_HOOKS):
            if watched := [name for name, child in module.named_modules() if name and getattr(child, hooks)]:
                return None, f"its `{watched[0]}` has a {kind}, which a traced form doesn't call"
        if recurrent := [name for name, child in module.named_modules() if name and isinstance(child, nn.RNNBase)]:
            return None, f"its `{recurrent[0]}` would be traced for sequences of one length"
        if any(type(inner).get_extra_state is not nn.Module.get_extra_state for inner in module.modules()):
            return None, "it keeps extra state"
        prefix = f"{path}." if path else ""
        inner = {clean_name(name): child for name, child in module.named_modules() if name}
        hooked = tuple(name for name, child in inner.items() if child._forward_hooks)
        floats = tuple(self._floats_in({"": module, **inner}, prefix))
        opaque = tuple(name for name in inner if prefix + name in self.layers)
        try:
            args, kwargs = canonical(module, *self.calls.inputs[path])
            unit = Unit(path, Signature(args, kwargs), hooked, floats, opaque)
            found = trace_unit(module, unit, self.training)
            failure = verify(module, unit, found, args, kwargs, self.scheme, self.training)
        except CompressionError as error:
            return None, str(error)
        except Exception as error:  # whatever tracing meets in a user's forward is the reason why it stays float
            return None, f"torch.export can't trace its forward ({in_a_line(error)})"
        if failure:
            return None, failure
        weights = float_weights(found.graph, int8_layers(found.graph, floats))
        left = left_float({"": module, **inner}, weights, self.scheme) | unused(module, found.names)
        tied = tied_to_float(self.modules[""])
        for name in floats:
            self.left_float.setdefault(prefix + name, tied.get(prefix + name, "excluded"))
        self.left_float |= {
            (prefix + name).rstrip("."): why for name, why in left.items() if not is_one_of(name, floats)
        }
        self.traces[path] = found
        return unit, ""

    def _floats_in(self, modules: Mapping[str, nn.Module], prefix: str) -> Iterator[str]:
        """Yield what of a unit's modules the user's choice leaves in float; of one around layers its own matrices."""
        left = self.excluded | self.layers
        for name, module in modules.items():
            is_left = (prefix + name).rstrip(".") in left
            if is_left and name and not holds_layers(module):
                yield name
            elif holds_layers(module):
                matrices = (f"{name}.{matrix}".lstrip(".") for matrix in own_matrices(module))
                yield from (matrix for matrix in matrices if is_left or prefix + matrix in left)


def _is_shell(path: str, module: nn.Module) -> bool:
    """Tell whether the root is a LightningModule around networks, which keep their names, and no network itself."""
    return path == "" and hasattr(module, "training_step") and not any(map(has_kernel, module.children()))


def _excluded(model: nn.Module, targets: Targets | None, layers: Collection[str]) -> set[str]:
    """Return paths of quantizable layers that the user's targets leave out."""
    found = {path: module for path, module in compressible_modules(model).items() if may_have_kernel(module)}
    tied = set(tied_to_float(model))
    if targets is None:
        return tied
    targets.check_patterns(model)
    chosen = {
        path
        for path, module in found.items()
        if not targets.leaves_out(path) and (targets.types is None or isinstance(module, tuple(targets.types)))
    }
    if not chosen and not layers:
        raise CompressionError(
            f"`targets` must leave a convolution or linear layer to quantize. Received: {targets}. "
            f"The model has {', '.join(list(found)[:8]) or 'none'}."
        )
    return (set(found) - chosen) | tied


@isolated_random_state()
def verify(
    module: nn.Module,
    unit: Unit,
    found: Trace,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    scheme: StaticInt8,
    training: bool,
) -> str:
    """Say why the prepared form can't stand for ``module``; empty if it can.

    It can if, without rounding, it gives the outputs that ``module`` gives in each mode. Works on copies.
    """
    if not int8_layers(found.graph, unit.floats):
        return "no layer in it can be quantized"
    for mode in (True, False) if training else (False,):
        original, twin = _without_hooks(module), _without_hooks(module)
        traced = Traced(unit, scheme, training=training).build_(twin, found)
        traced.rounds = False
        for model in (original, twin):
            model.train(mode)
        buffers = {name: buffer.clone() for name, buffer in original.named_buffers()}
        expected = _run(partial(_call, original), (args, kwargs))
        changed = [
            name for name, buffer in original.named_buffers() if not same_outputs(buffers.get(name), buffer, 0.0)
        ]
        if changed and not mode:
            return f"it changes its `{changed[0]}` in evaluation, which an int8 form doesn't"
        tensors = unit.signature.tensors(*copy_tensors((args, kwargs)))
        assert tensors is not None
        ways: list[Callable[[Any], Any]] = [partial(traced.run, mode)]
        if training and not mode:  # a BatchNorm of the user's own is called there, and isn't in int8
            ways.append(_evaluated(found.onto(twin)))
        if not all(same_outputs(expected, _run(way, tensors)) for way in ways):
            return f"its traced form computes something else in {'training' if mode else 'evaluation'}"
    return ""


def _evaluated(found: Trace) -> Callable[[list[Tensor]], Any]:
    graph = copy_graph(found.graph)
    evaluate_modes_(graph)
    return lambda tensors: found.structure.rebuild(graph(*tensors))


def _without_hooks(module: nn.Module) -> nn.Module:
    twin = copy_module(module)
    for inner in twin.modules():
        inner._forward_hooks.clear()
    return twin


def _call(module: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    return module(*call[0], **call[1])


def _run(function: Callable[[Any], Any], arguments: Any) -> Any:
    arguments = copy_tensors(arguments)
    device = next((leaf.device.type for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)), "cpu")
    with torch.no_grad(), isolated_random_state(seed=0), without_fast_path(), torch.autocast(device, enabled=False):
        return function(arguments)
