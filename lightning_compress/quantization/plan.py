"""What of a model is quantized, and how: units and single layers; what stays float, with the reasons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn

from lightning_compress.errors import CompressionError
from lightning_compress.messages import by_reason, named, they
from lightning_compress.modules.agreement import Agreement
from lightning_compress.modules.call_log import CallLog
from lightning_compress.modules.paths import is_below
from lightning_compress.quantization.layers.plan import plan_layers
from lightning_compress.quantization.layers.without_kernel import without_kernel
from lightning_compress.quantization.numerics.int8 import StaticInt8
from lightning_compress.quantization.numerics.scheme import Scheme
from lightning_compress.quantization.schemes import describe, from_description
from lightning_compress.quantization.static.plan import AS_A_WHOLE, plan_units
from lightning_compress.quantization.static.trace import Trace
from lightning_compress.quantization.static.unit import Unit
from lightning_compress.targets import Targets

_LONGEST = 200

_MANY = 8
"""From so many pieces on a static int8 model is worth a hint."""


@dataclass
class Plan:
    """Says what would be quantized, and what stays float and why.

    Attributes:
        scheme: of the units, and of what no override names.
        training: whether it trains so, or is calibrated.
        units: modules that are traced as a whole.
        layers: paths of layers that are quantized one by one, each with its scheme; in units or not.
        floats: paths of what stays float, each with the reason.
        traces: those of the units, by their paths.
    """

    scheme: Scheme
    training: bool
    units: list[Unit] = field(default_factory=list)
    layers: dict[str, Scheme] = field(default_factory=dict)
    floats: dict[str, str] = field(default_factory=dict)
    traces: dict[str, Trace] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """Return plain data for a checkpoint."""
        return {
            "scheme": describe(self.scheme),
            "training": self.training,
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
    *,
    training: bool,
) -> Plan:
    """Plan what of ``model`` to quantize, and how; change nothing. The arguments are those of `quantize`.

    Raises:
        CompressionError: there is nothing that can be quantized, or a pattern matches nothing.
    """
    if targets is not None:
        targets.check_patterns(model)
    called, replaced = (None, ()) if log is None else (log.inputs, log.replaced)
    layers, floats = plan_layers(model, called, scheme, targets, overrides, replaced)
    if scheme.whole:
        assert log is not None
        units, traces, left = plan_units(model, log, cast(StaticInt8, scheme), targets, layers, training=training)
        plan = Plan(scheme, training, units, layers, left, traces)
    else:
        plan = Plan(scheme, training, [], layers, without_kernel(model, scheme))
    plan.floats = {path: reason for path, reason in (plan.floats | floats).items() if path not in layers}
    if not plan.units and not plan.layers:
        reasons = "; ".join(f"{path or 'the module'}: {reason}" for path, reason in list(plan.floats.items())[:5])
        raise CompressionError(
            "The model must have a layer that the scheme can quantize. Received: none. "
            f"{reasons or 'It has no convolution or linear layer'}."
        )
    return plan


def summary(record: Mapping[str, Any]) -> str:
    """Say what is quantized, for the log: units by their target, layers by their scheme."""
    ways: dict[str, list[str]] = {}
    for unit in record["units"]:
        ways.setdefault(f"{record['scheme']['name']} for {record['scheme']['target']}", []).append(unit["path"])
    for layer in record["layers"]:
        ways.setdefault(layer["scheme"]["name"], []).append(layer["path"])
    return "; ".join(f"{named(paths)} ({way})" for way, paths in ways.items())


def per_token_line(record: Mapping[str, Any]) -> str:
    """Say which linear and attention layers in dynamic int8 have a scale for each token; empty if none has."""
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
    """Say what stays float, and what has a form that users should know of: a line for each reason."""
    parted, floats = left_float(record)
    lines = [f"agreement with float: {Agreement(**record['agreement'])}"] if "agreement" in record else []
    lines += [f"{they(paths, 'is', 'are')} quantized in parts, {reason}" for reason, paths in by_reason(parted).items()]
    lines += [f"{they(paths, 'stays', 'stay')} float: {reason}" for reason, paths in by_reason(floats).items()]
    hooked = [name for unit in record["units"] for name in unit["hooked"]]
    if hooked:
        lines.append(
            f"{named(hooked)}: forward hooks (a distillation's taps are some) fire while training, and not in int8"
        )
    computed = [f"{unit['path']}.{path}".strip(".") for unit in record["units"] for path in unit.get("computed", ())]
    if computed:
        lines.append(f"{named(computed)}: a forward computes the weight; files hold what it is computed of, in float")
    notes: dict[str, list[str]] = {}
    for layer in record["layers"]:
        notes.setdefault(from_description(layer["scheme"]).note(), []).append(layer["path"])
    lines += [f"{named(paths)}: {note}" for note, paths in notes.items() if note]
    if line := per_token_line(record):
        lines.append(line)
    if len(record["units"]) >= _MANY:
        lines.append(
            f"quantized in {len(record['units'])} pieces, with activations rounded at each border; int8_dynamic keeps "
            "the outputs of linear layers in float"
        )
    if record["units"] and record["scheme"]["engine"] == "inductor":
        lines.append(
            "engine inductor: compiled at the first call with each new shape, which takes a while; not timed against "
            "float"
        )
    return lines


def left_float(record: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """Part reasons by path: of what is quantized in parts, and of what isn't at all; of the innermost module alone."""
    quantized = [part["path"] for part in (*record["units"], *record["layers"])]
    reasons = {path: reason.partition("\n")[0][:_LONGEST] for path, reason in record["floats"].items()}
    parted, floats = {}, {}
    for path, reason in reasons.items():
        inner = {other: why for other, why in reasons.items() if is_below(other, path)}
        whole = reason.startswith(AS_A_WHOLE)
        if whole and any(is_below(other, path) for other in quantized):
            if reason not in inner.values():
                parted[path] = reason
        elif not (whole and inner):
            floats[path] = reason.removeprefix(AS_A_WHOLE)
    return parted, floats
