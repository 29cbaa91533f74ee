"""What of a model has no kernel in a scheme, and why; which layers share a weight."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from itertools import product

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from lightning_compress.modules.layer_weights import PRUNABLE
from lightning_compress.modules.paths import clean_name, compressible_modules, is_at_or_below
from lightning_compress.quantization.layers import attention
from lightning_compress.quantization.numerics.scheme import Scheme

QUANTIZED = "it is quantized already"
REPLACED = "it is called with parameters that aren't its own (functional_call)"
"""Reason of a layer that can't be taken as it stands, as its own parameters aren't used."""


def of_one_weight(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, str]]:
    """Yield pairs of paths, either way round and with themselves, of layers that own the same weight."""
    owners: dict[int, list[str]] = {}
    for path, module in modules.items():
        weight = dict(module._parameters).get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(path)
    for paths in owners.values():
        yield from product(paths, repeat=2)


def holds_layers(module: nn.Module | None) -> bool:
    """Tell whether a module is one of the user's own around layers, and so no layer, even if it owns a matrix."""
    return (
        module is not None and not type(module).__module__.startswith("torch.") and any(True for _ in module.children())
    )


QUANTIZABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def own_matrices(module: nn.Module) -> Iterator[str]:
    """Yield names of the matrices among a module's own parameters."""
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dim() > 1 and parameter.is_floating_point():
            yield name


def has_kernel(module: nn.Module) -> bool:
    """Tell whether it is a layer whose weight can be taken as it stands."""
    # A weight that is computed (weight norm, as a parametrization or as a hook) can't be taken as it stands, nor can
    # that of a layer that attention reads.
    is_layer = isinstance(module, QUANTIZABLE) and not isinstance(module, NonDynamicallyQuantizableLinear)
    return is_layer and module._parameters.get("weight") is not None


def without_kernel(model: nn.Module, scheme: Scheme) -> dict[str, str]:
    """Find what computes with a matrix and has no kernel in ``scheme``, with that as the reason.

    These are layers; of a module of the user's own that only holds layers, the matrices that it owns beside them.
    """
    found = {}
    for path, module in compressible_modules(model).items():
        if is_parametrized(module):
            found[path] = scheme.no_kernel(module)
        elif isinstance(module, ParametrizationList | NonDynamicallyQuantizableLinear):
            continue  # the latter is a part of attention, which is told of as a whole
        elif has_kernel(module) and (scheme.whole or type(module) in QUANTIZABLE):
            continue
        elif isinstance(module, PRUNABLE) and holds_layers(module):
            found[path] = scheme.no_kernel(module)
        elif holds_layers(module):
            reason = f"no kernel for the own parameters of {type(module).__name__}"
            for name in own_matrices(module):
                if sum(size > 1 for size in module.get_parameter(name).shape) > 1:
                    found[f"{path}.{name}".lstrip(".")] = reason
        elif any(parameter.dim() > 1 for parameter in module.parameters(recurse=False)):
            found[path] = scheme.no_kernel(module)
    return found


def is_layer_of_torch(module: nn.Module) -> bool:
    """Tell whether it is a class of torch's that computes; one that only holds parameters is as the user's own."""
    is_of_torch = type(module).__module__.startswith("torch.")
    return is_of_torch and not isinstance(module, nn.ParameterList | nn.ParameterDict)


def why_not(layer: nn.Module, name: str, kinds: Collection[type[nn.Module]]) -> str:
    """Say why a layer has no form in the scheme called ``name``, which takes these ``kinds``; empty if it has one."""
    if type(layer) not in kinds:
        return f"no {name} kernel for {type(layer).__name__}"
    if is_computed(layer):
        return "its weight is computed by a hook (weight norm, pruning)"
    if isinstance(layer, nn.MultiheadAttention) and (reason := attention.why_not(layer)):
        return reason
    if isinstance(layer, nn.RNNBase) and layer.proj_size:
        return f"no {name} kernel projects hidden states (proj_size)"
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        return "it changes the rows that it looks up (max_norm)"
    matrices = [matrix.detach() for matrix in layer.parameters() if matrix.dim() > 1]
    if not all(matrix.is_floating_point() for matrix in matrices):
        return "its weight isn't real"
    if not all(matrix.numel() for matrix in matrices):
        return "it is empty"
    return "" if all(matrix.float().isfinite().all() for matrix in matrices) else "its weight isn't finite in float32"


def is_computed(layer: nn.Module) -> bool:
    """Tell whether a hook computes a weight of a layer of torch, which then can't be taken as it stands."""
    if isinstance(layer, nn.MultiheadAttention):
        return "in_proj_weight" not in layer._parameters or "weight" not in layer.out_proj._parameters
    names = layer._flat_weights_names if isinstance(layer, nn.RNNBase) else ["weight"]
    return any(name not in layer._parameters for name in names)


def may_have_kernel(module: nn.Module) -> bool:
    """Tell whether it has a kernel, or matrices that its forward may use as a layer does: attention, the user's own."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    if isinstance(module, QUANTIZABLE) and is_parametrized(module, "weight"):
        return True
    return has_kernel(module) or (not is_layer_of_torch(module) and any(True for _ in own_matrices(module)))


def tied_to_float(model: nn.Module) -> dict[str, str]:
    """Find layers whose weight an embedding or the like owns too, with that as the reason: int8 would add a copy."""
    modules = compressible_modules(model)
    return {
        path: f"its weight is tied to `{other}`, which stays float"
        for path, other in of_one_weight(modules)
        if has_kernel(modules[path]) and not has_kernel(modules[other])
    }


# Of a traced unit.


def left_float(layers: Mapping[str, nn.Module], weights: Mapping[str, str], scheme: Scheme) -> dict[str, str]:
    """Find what a unit of these ``layers`` leaves in float, with reasons; ``weights`` are `Flow.float_weights`.

    That are layers, and matrices that modules around layers use as weights.
    """
    left = {}
    for name, reason in weights.items():
        path = clean_name(name)
        owner = path if path in layers else path.rpartition(".")[0].partition(".parametrizations")[0]
        if not holds_layers(layers.get(owner)):
            left[owner] = reason or scheme.no_kernel(layers.get(owner))
        elif reason:
            left[path] = reason
    return left


def unused(module: nn.Module, names: Collection[str]) -> dict[str, str]:
    """Return the layers with matrices of which a traced form that has these names calls and reads none."""
    read = {
        id(parameter)
        for path, parameter in module.named_parameters(remove_duplicate=False)
        if any(is_at_or_below(path, name) for name in names)
    }
    return {
        clean_name(path): "the first batch doesn't call it"
        for path, layer in module.named_modules()
        if path and not holds_layers(layer) and not isinstance(layer, ParametrizationList)
        if (matrices := [id(tensor) for tensor in layer.parameters(recurse=False) if tensor.dim() > 1])
        if not read.intersection(matrices)
    }
