"""Which scheme each layer gets, and which layers are quantized one by one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from lightning_compress.errors import CompressionError, invalid, nearest
from lightning_compress.quantization.layers.attention import DynamicAttention
from lightning_compress.quantization.layers.linear import DynamicLinear
from lightning_compress.quantization.layers.recurrent import DynamicRecurrent
from lightning_compress.quantization.layers.weight_only import WeightOnlyLayer
from lightning_compress.quantization.schemes import DynamicInt8, Scheme, StaticInt8, WeightOnly, resolve
from lightning_compress.targets import Targets, compressible_modules, matches

FORMS: dict[type[Scheme], dict[type[nn.Module], Any]] = {
    DynamicInt8: {
        nn.Linear: DynamicLinear,
        nn.LSTM: DynamicRecurrent,
        nn.GRU: DynamicRecurrent,
        nn.MultiheadAttention: DynamicAttention,
    },
    WeightOnly: dict.fromkeys((nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d), WeightOnlyLayer),
}
"""What takes the place of a layer of exactly this type."""

_TYPES = {*FORMS[DynamicInt8], *FORMS[WeightOnly], nn.RNN}

Overrides = Mapping[str, str | Scheme]
"""Pattern of layers' paths to the scheme that they get; the last match wins."""


def quantized_form(layer: nn.Module, scheme: Scheme) -> nn.Module:
    """The form of one layer that ``scheme`` asks for, on the CPU.

    Raises:
        CompressionError: it has none for this layer; the message is the reason.
    """
    form = FORMS[type(scheme)].get(type(layer))
    if form is None:
        raise CompressionError(f"no {scheme.name} kernel for {type(layer).__name__}")
    made: nn.Module = form.from_float(layer, scheme)
    return made


def check_overrides(overrides: Overrides | None) -> dict[str, Scheme]:
    """``overrides`` with their schemes resolved.

    Raises:
        CompressionError: one of them names no scheme, or a static one, which isn't chosen layer by layer.
    """
    if not isinstance(overrides or {}, Mapping):
        raise invalid("overrides", "be a mapping from patterns to schemes", overrides)
    resolved = {pattern: resolve(value) for pattern, value in (overrides or {}).items()}
    for pattern, value in resolved.items():
        if isinstance(value, StaticInt8):
            raise invalid(
                "overrides",
                "name schemes that work layer by layer",
                {pattern: value},
                "Make the static scheme the `scheme`, and override the others.",
            )
    return resolved


def plan_layers(
    model: nn.Module,
    called: Collection[str] | None,
    scheme: Scheme,
    targets: Targets | None,
    overrides: Mapping[str, Scheme],
    tied: Mapping[str, str],
) -> tuple[dict[str, Scheme], dict[str, str]]:
    """The layers to be quantized one by one, each with its scheme; and those that stay float, with the reason.

    Layers that a static ``scheme`` is left to are in neither.

    Args:
        model: the root.
        called: paths of the modules that a run called; None if there was none.
        scheme: of the layers that no override matches.
        targets: which layers.
        overrides: patterns to schemes.
        tied: layers that share their weight with one that stays float, with that as the reason.

    Raises:
        CompressionError: an override matches no layer.
    """
    modules = compressible_modules(model)
    for pattern in overrides:
        if not any(matches(path, pattern) for path, module in modules.items() if _has_form(module)):
            near = nearest(pattern, [path for path, module in modules.items() if _has_form(module)])
            raise invalid("overrides", "match layers of the model", pattern, near)
    chosen: dict[str, Scheme] = {}
    floats: dict[str, str] = {}
    for path, module in modules.items():
        matching = [one for pattern, one in overrides.items() if matches(path, pattern)]
        wanted = matching[-1] if matching else scheme
        if isinstance(wanted, StaticInt8) or not _has_form(module):
            continue
        reason = tied.get(path) or _left_out(path, module, targets)
        if not reason and called is not None and path not in called:
            reason = "it isn't called, its weights are read"
        if not reason:
            try:
                quantized_form(module, wanted)
                chosen[path] = wanted
            except CompressionError as error:
                reason = str(error)
        if reason:
            floats[path] = reason
    return chosen, floats


def _has_form(module: nn.Module) -> bool:
    # A computed weight (weight norm) can't be taken as it stands.
    return type(module) in _TYPES and ("weight" in module._parameters or not isinstance(module, (nn.Linear, _ConvNd)))


def _left_out(path: str, module: nn.Module, targets: Targets | None) -> str:
    if targets is None:
        return ""
    if targets.types is not None and not isinstance(module, tuple(targets.types)):
        return "not of the targeted types"
    return targets.leaves_out(path)
