"""Which parameters of a layer are its weights? Names say so in torch's own layers, shapes in others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import _SpectralNorm, _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList

PRUNABLE: tuple[type[nn.Module], ...] = (
    _ConvNd,
    nn.Linear,
    nn.Bilinear,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
)
"""Layers whose weights are targeted when nothing else is said: no norms, no embeddings."""

NO_WEIGHT = ("a bias or a scale", "a vector")
"""Reasons that nobody has to be told of."""

UNSURE = "it may be"

_LISTS = (nn.ParameterList, nn.ParameterDict)
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of one layer itself, by their names in it.

    Those that a parametrization keeps, or a `nn.ParameterList` or `nn.ParameterDict` in it, count as the layer's.
    """
    if isinstance(module, ParametrizationList):
        return
    yield from module.named_parameters(recurse=False)
    for name, child in module.named_children():
        if isinstance(child, _LISTS):
            yield from ((f"{name}.{inner}", parameter) for inner, parameter in own_parameters(child))
    for name, parametrized in getattr(module, "parametrizations", {}).items():
        for inner, parameter in parametrized.named_parameters(recurse=False):
            yield f"parametrizations.{name}.{inner}", parameter


def lies_in_a_list(path: str, layers: Mapping[str, nn.Module]) -> bool:
    """Whether the module at ``path`` only holds parameters of the layer around it."""
    return bool(path) and isinstance(layers[path], _LISTS) and path.rpartition(".")[0] in layers


def holds_list_of(module: nn.Module, name: str, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether a parameter stands in a list or dict of one of these classes."""
    first, dot, _ = name.partition(".")
    return bool(dot) and isinstance(getattr(module, first, None), kinds) and first != "parametrizations"


def named_weights(module: nn.Module) -> Iterator[str]:
    """Yield the names of the weights of one of torch's own layers."""
    for name, parameter in module.named_parameters(recurse=False):
        # weight_ih_l0, in_proj_weight, weight_v of the old weight norm; its magnitudes weight_g aren't weights.
        if "weight" in name and not name.endswith("_g") and (is_lazy(parameter) or parameter.dim() > 1):
            yield name
    for name, parametrized in getattr(module, "parametrizations", {}).items():
        # Weight norm keeps (magnitude, direction), spectral norm one tensor of the weight's shape; zeros in it are the
        # weight's. In others they needn't be.
        inner = {_WeightNorm: "original1", _SpectralNorm: "original"}.get(type(parametrized[0]), "")
        original = getattr(parametrized, inner, None) if len(parametrized) == 1 else None
        if "weight" in name and isinstance(original, nn.Parameter) and original.dim() > 1:
            yield f"parametrizations.{name}.{inner}"


def why_no_weight(module: nn.Module, name: str) -> str:
    """Say why a parameter of a user's own layer is no weight by its shape, whatever its name; empty if it is one."""
    parameters = dict(own_parameters(module))
    parameter = parameters[name]
    if isinstance(module, _NORMS):
        return NO_WEIGHT[0]
    if name in named_weights(module):
        return ""
    if name.startswith("parametrizations."):
        return "a parametrization computes the weight, and zeros in this needn't be zeros in that"
    if is_lazy(parameter) or "bias" in name.lower() or name.endswith("_g"):
        return NO_WEIGHT[0]
    shape = _sizes(parameter)
    if parameter.dim() < 2 or (parameter.dim() > 2 and len(shape) < 2):
        return NO_WEIGHT[1]
    for other, stack in parameters.items():
        sizes = () if is_lazy(stack) else _sizes(stack)
        if len(sizes) == len(shape) + 1 > 2 and sizes[0] == shape[0] and shape[-1] in sizes[1:]:
            return f"{UNSURE} a bias of each slice of `{other}`"
    return ""


def magnitude(module: nn.Module, full: str, name: str) -> tuple[str, nn.Parameter] | None:
    """Return the magnitudes that belong to a weight norm's direction: of its parametrization, or of the older hook."""
    for direction, scale in (("original1", "original0"), ("_v", "_g")):
        if name.endswith(direction):
            found = dict(own_parameters(module)).get(name[: -len(direction)] + scale)
            if found is not None:
                return full[: -len(direction)] + scale, found
    return None


def _sizes(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(size for size in parameter.shape if size != 1)
