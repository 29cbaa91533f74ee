"""Which scheme each layer gets, and which layers are quantized one by one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import product
from types import MappingProxyType
from typing import Any

from torch import nn

from lightning_compress.errors import invalid, nearest
from lightning_compress.modules.paths import compressible_modules, is_at_or_below
from lightning_compress.modules.routing import Form, StoredWeight, form_of
from lightning_compress.quantization.layers.packed import PACKED
from lightning_compress.quantization.layers.without_kernel import REPLACED
from lightning_compress.quantization.numerics.scheme import Scheme
from lightning_compress.targets import Targets, matches, names_itself

_TYPES = {*PACKED, nn.LSTM, nn.GRU, nn.RNN, nn.MultiheadAttention}
"""Layers of exactly these types are quantized one by one, or stay float with a reason."""

Weights = Mapping[str, StoredWeight]
"""Stored weights that are known already, by the path of their layer: of GPTQ, or shared with another layer."""


def quantized_form(layer: nn.Module, scheme: Scheme, weights: Weights = MappingProxyType({}), path: str = "") -> Form:
    """Return the form of one layer that ``scheme`` asks for; its ``path``, or what is below, is that in ``weights``.

    Raises:
        CompressionError: it is no `Form`, as of a scheme of the user's own it may be.
    """
    inside = f"{path}.".lstrip(".")
    known = {name.removeprefix(inside): weight for name, weight in weights.items() if name.startswith(inside)}
    form: Any = scheme.form(layer, known | ({"": weights[path]} if path in weights else {}))
    if not isinstance(form, Form):
        raise invalid("form", "return a `Form`, whose `weights` take the place of the layer's", type(form).__name__)
    return form


def plan_layers(
    model: nn.Module,
    called: Collection[str] | None,
    scheme: Scheme,
    targets: Targets | None,
    overrides: Mapping[str, Scheme],
    replaced: Collection[str] = (),
) -> tuple[dict[str, Scheme], dict[str, str]]:
    """Choose the layers to be quantized one by one, each with its scheme; and those that stay float, with the reason.

    Layers that a ``scheme`` for whole units is left to are in neither. ``called`` are the modules that a run called, in
    order (None if there was none), ``replaced`` those of them that had other parameters than their own.

    Raises:
        CompressionError: an override matches no layer.
    """
    modules = compressible_modules(model)
    done = [path for path, module in modules.items() if form_of(module) is not None]
    free = {path: module for path, module in modules.items() if not any(is_at_or_below(path, part) for part in done)}
    layers = {path: module for path, module in free.items() if type(module) in _TYPES}
    for pattern in overrides:
        if not any(matches(path, pattern) for path in layers):
            raise invalid("overrides", "match layers of the model", pattern, nearest(pattern, list(layers)))
    wanted = {
        path: [scheme, *(wish for pattern, wish in overrides.items() if matches(path, pattern))][-1] for path in layers
    }
    wanted = {path: wish for path, wish in wanted.items() if not wish.whole}
    patterns = [*overrides, *((targets.include or ()) if targets is not None else ())]
    named = {path for path in layers if any(names_itself(pattern, path) for pattern in patterns)}
    spared = {path: reason for path, reason in _spared(modules, called, wanted, targets).items() if path not in named}
    usable = wanted.keys() - set(replaced) if called is None else (wanted.keys() & set(called)) - set(replaced)
    if spared.keys() >= {path for path in usable if not wanted[path].why_not(layers[path])}:  # all that there is
        spared = {path: reason for path, reason in spared.items() if isinstance(layers[path], nn.Embedding)}
    chosen: dict[str, Scheme] = {}
    floats: dict[str, str] = {}
    for path, wish in wanted.items():
        reason = _left_out(path, layers[path], targets) or spared.get(path, "")
        if not reason and called is not None and path not in called:
            reason = "the first batch doesn't call it"
        if not reason and path in replaced:
            reason = REPLACED
        if not reason and "forward" in vars(layers[path]):
            reason = "its forward was replaced on the instance"
        reason = reason or wish.why_not(layers[path])
        if reason:
            floats[path] = reason
        else:
            chosen[path] = wish
    for path, other in _tied(modules, chosen).items():
        del chosen[path]
        floats[path] = f"its weight is tied to `{other}`, which stays float"
    return chosen, floats


def _spared(
    modules: Mapping[str, nn.Module],
    called: Collection[str] | None,
    wanted: Mapping[str, Scheme],
    targets: Targets | None,
) -> dict[str, str]:
    """Return layers that schemes leave alone unless they are named: embeddings and, in few bits, the last layer."""
    types = tuple(targets.types or ()) if targets is not None else ()
    spared = {
        path: "embedding, which is left out unless it is named"
        for path, scheme in wanted.items()
        if scheme.spares_embeddings
        if isinstance(modules[path], nn.Embedding) and not isinstance(modules[path], types)
    }
    order = modules if called is None else [path for path in called if path in modules]
    last = [path for path in order if modules[path]._parameters or isinstance(modules[path], nn.MultiheadAttention)]
    for path in last[-1:]:
        if path in wanted and wanted[path].spares_last_layer and type(modules[path]) in PACKED:
            spared.setdefault(path, "last layer, which is left out unless it is named")
    return spared


def _tied(modules: Mapping[str, nn.Module], chosen: Mapping[str, Scheme]) -> dict[str, str]:
    """Find chosen layers that share a weight with a module that isn't, or not in the same scheme, and that module."""
    owners: dict[int, list[str]] = {}
    for path, module in modules.items():
        for parameter in module._parameters.values():
            if parameter is not None and parameter.dim() > 1:
                owners.setdefault(id(parameter), []).append(path)
    return {
        path: other
        for paths in owners.values()
        for path, other in product(paths, repeat=2)
        if path in chosen and chosen.get(other) != chosen[path]
    }


def _left_out(path: str, module: nn.Module, targets: Targets | None) -> str:
    if targets is None:
        return ""
    if targets.types is not None and not isinstance(module, tuple(targets.types)):
        return "not of the targeted types"
    return targets.leaves_out(path)
