"""Finds the largest sub-modules whose traced form computes what they computed; the rest stays float, with reasons."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from lightning_compress.errors import CompressionError, in_a_line
from lightning_compress.messages import by_reason, named, they
from lightning_compress.modules.call_log import CallLog
from lightning_compress.modules.layer_weights import PRUNABLE
from lightning_compress.modules.paths import clean_name, compressible_modules, is_at_or_below, is_below
from lightning_compress.quantization.layers.plan import REPLACED, of_one_weight, plan_layers
from lightning_compress.quantization.schemes import Packed, Scheme, StaticInt8, describe, from_description
from lightning_compress.quantization.static.signature import Signature, canonical
from lightning_compress.quantization.static.unit import Unit, holds_layers, no_kernel, verify
from lightning_compress.targets import Targets

_logger = logging.getLogger("lightning_compress")

_LONGEST = 200

_AS_A_WHOLE = "not as a whole: "

_TRACERS = {"fx": "torch.fx", "pt2e": "torch.export"}

_MANY = 8
"""From so many pieces on a static int8 model is worth a hint."""

QUANTIZABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)

_OF_PARAMETERS = (nn.ParameterList, nn.ParameterDict)


@dataclass
class Plan:
    """What would be quantized, and what stays float and why.

    Attributes:
        units: modules that are traced as a whole.
        layers: paths of layers that are quantized one by one, each with its scheme; in units or not.
        floats: paths of what stays float, each with the reason.
    """

    units: list[Unit] = field(default_factory=list)
    layers: dict[str, Scheme] = field(default_factory=dict)
    floats: dict[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.units or self.layers)

    def describe(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {
            "units": [unit.describe() for unit in self.units],
            "layers": [{"path": path, "scheme": describe(scheme)} for path, scheme in self.layers.items()],
            "floats": dict(self.floats),
        }


def make_plan(
    model: nn.Module,
    log: CallLog | None,
    scheme: Scheme,
    targets: Targets | None,
    overrides: Mapping[str, Scheme],
    flow: str,
    *,
    training: bool,
) -> Plan:
    """What of ``model`` to quantize, and how; changes nothing. The arguments are those of `quantize`.

    Raises:
        CompressionError: there is nothing that can be quantized, or a pattern matches nothing.
    """
    if targets is not None:
        targets.check_patterns(model)
    called, replaced = (None, ()) if log is None else (log.inputs, log.replaced)
    layers, floats = plan_layers(model, called, scheme, targets, overrides, replaced)
    if isinstance(scheme, StaticInt8):
        assert log is not None
        chosen = "fx" if flow == "auto" else flow
        plan = plan_units(model, log, scheme, targets, layers, training=training, flow=chosen)
        if flow == "auto" and not plan.units and not training:
            other = plan_units(model, log, scheme, targets, layers, training=training, flow="pt2e")
            if other.units:
                _logger.warning(
                    "flow 'fx' can quantize nothing here, 'pt2e' can: %s", "; ".join(explain(plan.describe()))
                )
                plan = other
    else:
        plan = Plan(layers=layers, floats=without_kernel(model, scheme))
    plan.floats = {path: reason for path, reason in (plan.floats | floats).items() if path not in layers}
    if not plan:
        raise _nothing_to_quantize(plan.floats)
    return plan


def _nothing_to_quantize(floats: dict[str, str]) -> CompressionError:
    """The error of a model in which no layer can be quantized, with the reasons."""
    reasons = "; ".join(f"{path or 'the module'}: {reason}" for path, reason in list(floats.items())[:5])
    return CompressionError(
        "The model must have a layer that the scheme can quantize. Received: none. "
        f"{reasons or 'It has no convolution or linear layer'}."
    )


def plan_units(
    model: nn.Module,
    log: CallLog,
    scheme: StaticInt8,
    targets: Targets | None,
    layers: Mapping[str, Scheme],
    *,
    training: bool,
    flow: str,
) -> Plan:
    """The largest units of ``model`` that can be quantized. Changes nothing.

    A module is accepted if nothing outside calls into it, it traces, and its prepared form, with fake-quantization off,
    gives the outputs that it gave, in training (same random state) and in evaluation. Else its children are tried.

    Args:
        model: the root.
        log: what a run of the model called.
        scheme: the numbers.
        targets: which layers may be quantized; None is all.
        layers: layers that are quantized one by one.
        training: for quantization-aware training, else for calibration.
        flow: name of the flow.
    """
    planner = _Planner(
        compressible_modules(model), log, scheme, _excluded(model, targets, layers), set(layers), training, flow
    )
    planner.visit("")
    plan = planner.plan
    modules, tied = compressible_modules(model), tied_to_float(model)
    float_owners = {other for path, other in of_one_weight(modules) if path in tied and other not in tied}
    for path, reason in (tied | without_kernel(model, scheme)).items():
        inside = any(is_at_or_below(path, unit.path) for unit in plan.units)
        if not inside or path in float_owners or (path in modules and not _is_told_of(modules[path], flow)):
            plan.floats.setdefault(path, reason)
    plan.layers = dict(layers)
    return plan


def _is_told_of(layer: nn.Module, flow: str) -> bool:
    """Whether a unit tells itself that this layer in it stays float.

    It isn't told of where it stands in a layer of torch that isn't looked into.
    """
    if flow == "pt2e":
        return not isinstance(layer, nn.Embedding)
    return is_parametrized(layer) or not _is_layer_of_torch(layer)


@dataclass
class _Planner:
    """Walks down the modules until it finds units."""

    modules: dict[str, nn.Module]
    calls: CallLog
    scheme: StaticInt8
    excluded: set[str]
    layers: set[str]
    training: bool
    flow: str
    plan: Plan = field(default_factory=Plan)

    def visit(self, path: str) -> None:
        """Plan ``path`` as one unit, or else what is below it."""
        module = self.modules[path]
        wanted = [inner for inner in _quantizable(path, self.modules) if inner not in self.excluded | self.layers]
        if not wanted:
            return
        if not _is_shell(path, module):
            unit, reason = self.try_unit(path)
            if unit is not None:
                self.plan.units.append(unit)
                return
            if self.excluded.issuperset(wanted):  # their kernels were found wrong
                return
            if path in wanted and not holds_layers(module):
                self.plan.floats[path] = reason if _has_kernel(module) else no_kernel(module, self.scheme)
            elif path in self.calls.inputs:
                self.plan.floats[path] = f"{_AS_A_WHOLE}{reason}"
        for name, _ in module.named_children():
            child = clean_name(f"{path}.{name}".lstrip("."))
            if child != path and child in self.modules:
                self.visit(child)

    def try_unit(self, path: str) -> tuple[Unit | None, str]:
        """The unit, or why it can't be one."""
        module = self.modules[path]
        if path not in self.calls.inputs:
            return None, "it wasn't called in the dry run"
        entered = self.calls.entered_below(path)
        if entered is not None:
            return None, f"its `{entered}` is called from outside of it"
        replaced = self.calls.replaced_below(path)
        if replaced is not None:
            return None, REPLACED if replaced == path else f"its `{replaced}` is called with parameters of others"
        read = self.calls.read_below(path)
        if read is not None:
            return None, f"its {'weight' if read == path else f'`{read}`'} is read from outside of it"
        if self.flow == "pt2e" and (others := [layer for layer in self.layers if is_below(layer, path)]):
            return None, f"its `{others[0]}` has a scheme of its own, which an exported graph can't call"
        if "forward" in vars(module):
            return None, "its forward was replaced on the instance"
        if watched := [name for name, child in module.named_modules() if name and child._forward_pre_hooks]:
            return None, f"its `{watched[0]}` has a forward pre-hook, which a traced form doesn't call"
        if any(type(inner).get_extra_state is not nn.Module.get_extra_state for inner in module.modules()):
            return None, "it keeps extra state"
        prefix = f"{path}." if path else ""
        inner = {clean_name(name): child for name, child in module.named_modules() if name}
        hooked = tuple(name for name, child in inner.items() if child._forward_hooks)
        floats = tuple(self._floats_in({"": module, **inner}, prefix))
        try:
            args, kwargs = canonical(module, *self.calls.inputs[path])
            while True:
                unit = Unit(path, Signature(args, kwargs), hooked, floats, self.flow)
                with redirect_stderr(StringIO()):  # torch.fx prints each error of a graph before it is raised
                    verdict = verify(module, unit, args, kwargs, self.scheme, self.training)
                if not verdict.wrong.keys() - set(floats):
                    break
                floats = (*floats, *verdict.wrong.keys() - set(floats))
                joined = {name: f"{path}.{name}".lstrip(".") for name in verdict.wrong}
                whole = not holds_layers(module)  # a single layer, in whose traced form a name means itself
                self.leave_float(
                    {path if whole and name not in inner else joined[name]: why for name, why in verdict.wrong.items()}
                )
        except CompressionError as error:
            return None, str(error)
        except Exception as error:  # whatever tracing meets in a user's forward is the reason why it stays float
            return None, f"{_TRACERS[self.flow]} can't trace its forward ({in_a_line(error)})"
        if verdict.reason:
            return None, verdict.reason
        tied = tied_to_float(self.modules[""])
        for name in floats:
            self.plan.floats.setdefault(prefix + name, tied.get(prefix + name, "excluded"))
        left = {(prefix + name).rstrip("."): why for name, why in verdict.left.items() if name not in floats}
        self.plan.floats |= left
        return unit, ""

    def _floats_in(self, modules: Mapping[str, nn.Module], prefix: str) -> Iterator[str]:
        """What of these modules of a unit the user's choice leaves in float; of one around layers its own matrices."""
        left = self.excluded | self.layers
        for name, module in modules.items():
            is_left = (prefix + name).rstrip(".") in left
            if is_left and name and not holds_layers(module):
                yield name
            elif holds_layers(module):
                matrices = (f"{name}.{matrix}".lstrip(".") for matrix in own_matrices(module))
                yield from (matrix for matrix in matrices if is_left or prefix + matrix in left)

    def leave_float(self, wrong: Mapping[str, str]) -> None:
        """Exclude layers whose kernels are wrong from this unit, and from those that are tried when it can't be one."""
        self.excluded |= wrong.keys()
        self.plan.floats |= wrong


def _is_shell(path: str, module: nn.Module) -> bool:
    """Whether the root is a LightningModule around networks, which keep their names, and no network itself."""
    return path == "" and hasattr(module, "training_step") and not any(map(_has_kernel, module.children()))


def _quantizable(path: str, modules: dict[str, nn.Module]) -> Iterator[str]:
    """Paths at or below ``path`` of layers that int8 may have kernels for."""
    for inner, module in modules.items():
        if (inner == path or is_below(inner, path)) and _may_have_kernel(module):
            yield inner


def _may_have_kernel(module: nn.Module) -> bool:
    """Whether it has a kernel, or is of the user's own with matrices, which its forward may use as a layer does."""
    if isinstance(module, QUANTIZABLE) and is_parametrized(module, "weight"):
        return True
    return _has_kernel(module) or (not _is_layer_of_torch(module) and any(True for _ in own_matrices(module)))


def _is_layer_of_torch(module: nn.Module) -> bool:
    """Whether it is a class of torch's that computes; one that only holds parameters is as the user's own."""
    return type(module).__module__.startswith("torch.") and not isinstance(module, _OF_PARAMETERS)


def own_matrices(module: nn.Module) -> Iterator[str]:
    """Names of the matrices among a module's own parameters."""
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dim() > 1 and parameter.is_floating_point():
            yield name


def _has_kernel(module: nn.Module) -> bool:
    # A weight that is computed (weight norm, as a parametrization or as a hook) can't be taken as it stands, nor can
    # that of a layer that attention reads.
    is_layer = isinstance(module, QUANTIZABLE) and not isinstance(module, NonDynamicallyQuantizableLinear)
    return is_layer and module._parameters.get("weight") is not None


def tied_to_float(model: nn.Module) -> dict[str, str]:
    """Layers whose weight an embedding or the like owns too, with that as the reason: int8 would only add a copy."""
    modules = compressible_modules(model)
    return {
        path: f"its weight is tied to `{other}`, which stays float"
        for path, other in of_one_weight(modules)
        if _has_kernel(modules[path]) and not _has_kernel(modules[other])
    }


def without_kernel(model: nn.Module, scheme: Scheme) -> dict[str, str]:
    """What computes with a matrix and has no kernel in ``scheme``, with that as the reason.

    These are layers; of a module of the user's own that only holds layers, the matrices that it owns beside them.
    """
    found = {}
    for path, module in compressible_modules(model).items():
        if is_parametrized(module):
            found[path] = no_kernel(module, scheme)
        elif isinstance(module, ParametrizationList | NonDynamicallyQuantizableLinear):
            continue  # the latter is a part of attention, which is told of as a whole
        elif _has_kernel(module) and (isinstance(scheme, StaticInt8) or type(module) in QUANTIZABLE):
            continue
        elif isinstance(module, PRUNABLE) and holds_layers(module):
            found[path] = no_kernel(module, scheme)
        elif holds_layers(module):
            found |= _own_matrices(path, module)
        elif any(parameter.dim() > 1 for parameter in module.parameters(recurse=False)):
            found[path] = no_kernel(module, scheme)
    return found


def _own_matrices(path: str, module: nn.Module) -> dict[str, str]:
    reason = f"no kernel for the own parameters of {type(module).__name__}"
    wide = (name for name in own_matrices(module) if sum(size > 1 for size in module.get_parameter(name).shape) > 1)
    return {f"{path}.{name}".lstrip("."): reason for name in wide}


def summary(record: Mapping[str, Any]) -> str:
    """What is quantized, for the log: units by their flow, layers by their scheme.

    Args:
        record: what `Plan.describe` gave.
    """
    ways: dict[str, list[str]] = {}
    for unit in record["units"]:
        ways.setdefault(f"flow {unit['flow']}", []).append(unit["path"])
    for layer in record["layers"]:
        ways.setdefault(layer["scheme"]["name"], []).append(layer["path"])
    return "; ".join(f"{named(paths)} ({way})" for way, paths in ways.items())


def per_token_line(record: Mapping[str, Any]) -> str:
    """Which linear and attention layers in dynamic int8 have a scale for each token; empty if none has."""
    paths = [
        layer["path"]
        for layer in record.get("layers", ())
        if layer["scheme"].get("per_token") and "weight_ih_l0" not in layer.get("shapes", ())
    ]
    if not paths:
        return ""
    return (
        f"{named(paths)}: a scale for each token, with outlier columns in float; this takes longer. By default it is "
        "for layers that one scale for all activations leaves too far off; DynamicInt8(per_token=False) is without"
    )


def explain(record: Mapping[str, Any]) -> list[str]:
    """What stays float, and what has a form that users should know of: a line for each reason.

    Args:
        record: what `Plan.describe` gave.
    """
    parted, floats = _left_float(record)
    lines = [f"{they(paths, 'is', 'are')} quantized in parts, {reason}" for reason, paths in by_reason(parted).items()]
    lines += [f"{they(paths, 'stays', 'stay')} float: {reason}" for reason, paths in by_reason(floats).items()]
    hooked = [name for unit in record["units"] for name in unit["hooked"]]
    if hooked:
        lines.append(
            f"{named(hooked)}: forward hooks (a distillation's taps are some) fire while training, and not in int8"
        )
    stored: dict[int, list[str]] = {}
    for layer in record["layers"]:
        scheme = from_description(layer["scheme"])
        if isinstance(scheme, Packed):
            stored.setdefault(scheme.bits, []).append(layer["path"])
    for bits, paths in stored.items():
        lines.append(
            f"{named(paths)}: weights are stored in {bits} bits and computed with in float; this is smaller, not faster"
        )
    if line := per_token_line(record):
        lines.append(line)
    if len(record["units"]) >= _MANY and record["units"][0]["flow"] == "fx":
        lines.append(
            f"quantized in {len(record['units'])} pieces, with activations rounded at each border; flow='pt2e' may "
            "take it whole, and int8_dynamic keeps the outputs of linear layers in float"
        )
    if any(unit["flow"] == "pt2e" for unit in record["units"]):
        lines.append(
            "flow pt2e: compiled by inductor at the first call with each new shape, which takes a while; not timed "
            "against float"
        )
    return lines


def _left_float(record: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """Reasons by path: of what is quantized in parts, and of what isn't at all; each told of the innermost alone."""
    quantized = [part["path"] for part in (*record["units"], *record["layers"])]
    reasons = {path: reason.partition("\n")[0][:_LONGEST] for path, reason in record["floats"].items()}
    parted, floats = {}, {}
    for path, reason in reasons.items():
        inner = {other: why for other, why in reasons.items() if is_below(other, path)}
        whole = reason.startswith(_AS_A_WHOLE)
        if whole and any(is_below(other, path) for other in quantized):
            if reason not in inner.values():
                parted[path] = reason
        elif not (whole and inner):
            floats[path] = reason.removeprefix(_AS_A_WHOLE)
    return parted, floats


def _excluded(model: nn.Module, targets: Targets | None, layers: Collection[str]) -> set[str]:
    """Paths of quantizable layers that the user's targets leave out."""
    found = {path: module for path, module in compressible_modules(model).items() if _may_have_kernel(module)}
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
