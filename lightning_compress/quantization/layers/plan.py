"""Which scheme each layer gets, and which layers are quantized one by one."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatchcase
from itertools import product
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_compress.errors import invalid, nearest
from lightning_compress.modules.paths import compressible_modules
from lightning_compress.modules.routing import CHILD
from lightning_compress.quantization.layers import attention
from lightning_compress.quantization.layers.attention import DynamicAttention, QuantizedAttention
from lightning_compress.quantization.layers.linear import DynamicLinear
from lightning_compress.quantization.layers.packed import (
    PackedConv,
    PackedEmbedding,
    PackedLayer,
    PackedLinear,
    matrix_of,
)
from lightning_compress.quantization.layers.packed_weight import LinearWeight, NF4Weight, PackedWeight
from lightning_compress.quantization.layers.recurrent import DynamicRecurrent
from lightning_compress.quantization.schemes import (
    GPTQ,
    NF4,
    DynamicInt8,
    Packed,
    Scheme,
    StaticInt8,
    WeightOnly,
    resolve,
)
from lightning_compress.targets import Targets, matches

_PACKED: dict[type[nn.Module], type[PackedLayer]] = {
    nn.Linear: PackedLinear,
    nn.Conv1d: PackedConv,
    nn.Conv2d: PackedConv,
    nn.Conv3d: PackedConv,
    nn.Embedding: PackedEmbedding,
}
_DYNAMIC: dict[type[nn.Module], Any] = {
    nn.Linear: DynamicLinear,
    nn.LSTM: DynamicRecurrent,
    nn.GRU: DynamicRecurrent,
    nn.MultiheadAttention: DynamicAttention,
}
_TYPES = {*_DYNAMIC, *_PACKED, nn.RNN}
"""Layers of exactly these types are quantized one by one, or stay float with a reason."""

Overrides = Mapping[str, str | Scheme]
"""Pattern of layers' paths to the scheme that they get; the last match wins."""

REPLACED = "it is called with parameters that aren't its own (functional_call)"
"""Reason of a layer that can't be taken as it stands, as its own parameters aren't used."""

Weights = Mapping[str, PackedWeight]
"""Packed weights that are known already, by the path of their layer: of GPTQ, or shared with another layer."""


def quantized_form(
    layer: nn.Module, scheme: Scheme, weights: Weights = MappingProxyType({}), path: str = ""
) -> nn.Module:
    """The form of one layer that ``scheme`` asks for; in int8_dynamic on the CPU.

    Args:
        layer: float, of a type for which `why_not` has no reason.
        scheme: dynamic or packed.
        weights: those that are known already.
        path: of the layer in ``weights``.
    """
    if isinstance(scheme, DynamicInt8):
        made: nn.Module = _DYNAMIC[type(layer)].from_float(layer, scheme)
        return made
    assert isinstance(scheme, Packed)
    if isinstance(layer, nn.MultiheadAttention):
        return QuantizedAttention(
            layer, lambda name, part: quantized_form(part, scheme, weights, f"{path}.{CHILD}.{name}".lstrip("."))
        )
    weight = weights.get(path)
    return _PACKED[type(layer)](layer, packed_weight(matrix_of(layer), scheme) if weight is None else weight)


def packed_weight(matrix: Tensor, scheme: Packed) -> PackedWeight:
    """``matrix`` in the bits of ``scheme``, each value rounded to the nearest code."""
    if isinstance(scheme, NF4):
        return NF4Weight(matrix, scheme.block_size)
    assert isinstance(scheme, WeightOnly | GPTQ)
    return LinearWeight.nearest(matrix, scheme.bits, scheme.group_size, scheme.symmetric)


def packable(layer: nn.Module) -> list[nn.Parameter]:
    """The parameters of a layer that a packed scheme can take the place of."""
    if type(layer) not in {*_PACKED, nn.MultiheadAttention, NonDynamicallyQuantizableLinear}:
        return []
    return [parameter for parameter in layer._parameters.values() if parameter is not None]


def why_not(layer: nn.Module, scheme: Scheme) -> str:
    """Why ``layer`` has no form in ``scheme``; empty if it has one."""
    kinds = {*_PACKED, nn.MultiheadAttention} if isinstance(scheme, Packed) else set(_DYNAMIC)
    if type(layer) not in kinds:
        return f"no {scheme.name} kernel for {type(layer).__name__}"
    if is_computed(layer):
        return "its weight is computed by a hook (weight norm, pruning)"
    if isinstance(layer, nn.MultiheadAttention) and (reason := attention.why_not(layer)):
        return reason
    if isinstance(layer, nn.RNNBase) and layer.proj_size:
        return f"no {scheme.name} kernel projects hidden states (proj_size)"
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        return "it changes the rows that it looks up (max_norm)"
    matrices = [matrix.detach() for matrix in layer.parameters() if matrix.dim() > 1]
    if not all(matrix.is_floating_point() for matrix in matrices):
        return "its weight isn't real"
    if not all(matrix.numel() for matrix in matrices):
        return "it is empty"
    return "" if all(matrix.float().isfinite().all() for matrix in matrices) else "its weight isn't finite in float32"


def is_computed(layer: nn.Module) -> bool:
    """Whether a hook computes a weight of a layer of torch, which then can't be taken as it stands."""
    if isinstance(layer, nn.MultiheadAttention):
        return "in_proj_weight" not in layer._parameters or "weight" not in layer.out_proj._parameters
    names = layer._flat_weights_names if isinstance(layer, nn.RNNBase) else ["weight"]
    return any(name not in layer._parameters for name in names)


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
    replaced: Collection[str] = (),
) -> tuple[dict[str, Scheme], dict[str, str]]:
    """The layers to be quantized one by one, each with its scheme; and those that stay float, with the reason.

    Layers that a static ``scheme`` is left to are in neither.

    Args:
        model: the root.
        called: paths of the modules that a run called, in order; None if there was none.
        scheme: of the layers that no override matches.
        targets: which layers.
        overrides: patterns to schemes.
        replaced: paths of modules that the run called with other parameters than their own.

    Raises:
        CompressionError: an override matches no layer.
    """
    modules = compressible_modules(model)
    layers = {path: module for path, module in modules.items() if type(module) in _TYPES}
    for pattern in overrides:
        if not any(matches(path, pattern) for path in layers):
            raise invalid("overrides", "match layers of the model", pattern, nearest(pattern, list(layers)))
    wanted = {
        path: [scheme, *(one for pattern, one in overrides.items() if matches(path, pattern))][-1] for path in layers
    }
    wanted = {path: one for path, one in wanted.items() if not isinstance(one, StaticInt8)}
    patterns = [*overrides, *((targets.include or ()) if targets is not None else ())]
    named = {path for path in layers if any(_names(pattern, path) for pattern in patterns)}
    spared = {path: reason for path, reason in _spared(modules, called, wanted, targets).items() if path not in named}
    usable = wanted.keys() - set(replaced) if called is None else (wanted.keys() & set(called)) - set(replaced)
    if spared.keys() >= {path for path in usable if not why_not(layers[path], wanted[path])}:  # all that there is
        spared = {path: reason for path, reason in spared.items() if isinstance(layers[path], nn.Embedding)}
    chosen: dict[str, Scheme] = {}
    floats: dict[str, str] = {}
    for path, one in wanted.items():
        reason = _left_out(path, layers[path], targets) or spared.get(path, "")
        if not reason and called is not None and path not in called:
            reason = "the first batch doesn't call it"
        if not reason and path in replaced:
            reason = REPLACED
        if not reason and "forward" in vars(layers[path]):
            reason = "its forward was replaced on the instance"
        reason = reason or why_not(layers[path], one)
        if reason:
            floats[path] = reason
        else:
            chosen[path] = one
    for path, other in _tied(modules, chosen).items():
        del chosen[path]
        floats[path] = f"its weight is tied to `{other}`, which stays float"
    return chosen, floats


def _names(pattern: str, path: str) -> bool:
    """Whether a pattern means this very layer, and no container with all that it holds."""
    return fnmatchcase(path, pattern) and bool(pattern.rpartition(".")[2].strip("*?"))


def _spared(
    modules: Mapping[str, nn.Module],
    called: Collection[str] | None,
    wanted: Mapping[str, Scheme],
    targets: Targets | None,
) -> dict[str, str]:
    """Layers that packed schemes leave alone unless they are named: embeddings and, in few bits, the last layer."""
    types = tuple(targets.types or ()) if targets is not None else ()
    spared = {
        path: "embedding, which is left out unless it is named"
        for path, one in wanted.items()
        if isinstance(one, Packed) and isinstance(modules[path], nn.Embedding) and not isinstance(modules[path], types)
    }
    order = modules if called is None else [path for path in called if path in modules]
    last = [path for path in order if modules[path]._parameters or isinstance(modules[path], nn.MultiheadAttention)]
    for path in last[-1:]:
        one = wanted.get(path)
        if isinstance(one, Packed) and one.bits < 8 and type(modules[path]) in _PACKED:
            spared.setdefault(path, "last layer, which is left out unless it is named")
    return spared


def _tied(modules: Mapping[str, nn.Module], chosen: Mapping[str, Scheme]) -> dict[str, str]:
    """Layers that were chosen and share their weight with a module that wasn't, or not in the same scheme: that one."""
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


def of_one_weight(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, str]]:
    """Pairs of paths, either way round and with themselves, of layers that own the same weight."""
    owners: dict[int, list[str]] = {}
    for path, module in modules.items():
        weight = dict(module._parameters).get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(path)
    for paths in owners.values():
        yield from product(paths, repeat=2)


def _left_out(path: str, module: nn.Module, targets: Targets | None) -> str:
    if targets is None:
        return ""
    if targets.types is not None and not isinstance(module, tuple(targets.types)):
        return "not of the targeted types"
    return targets.leaves_out(path)
