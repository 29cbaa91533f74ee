"""What goes with a weight: magnitudes of a weight norm, and biases and norm channels of units that are pruned whole.

A filter whose weights are zero still puts out its bias, and a BatchNorm after it ``beta - gamma * mean / std``.
Only where these are zero too is a removed unit silent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.pooling import _AvgPoolNd, _MaxPoolNd

from lightning_compress.layer_weights import own_parameters
from lightning_compress.messages import named
from lightning_compress.targets import Target, clean_name, compressible_modules

_KEEP_ZERO = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh),
    *(nn.Hardtanh, nn.Hardswish, nn.Identity, _DropoutNd, _MaxPoolNd, _AvgPoolNd),
)
"""Layers that pass a channel on by itself, and zero as zero."""

_FLATTENED = " flattened"

Producers = dict[str, list[str]]
"""Path of a norm to the paths of the layers whose outputs it normalises."""


@dataclass(frozen=True)
class Follower:
    """A tensor with an entry for each unit of some weights.

    An entry goes when its unit is gone from all of them; of ``joined`` weights each has its own stretch of entries.

    Attributes:
        name: of the parameter.
        parameter: the tensor itself.
        leaders: names of the weights, each with the shape that its mask is reduced to: 1 in all but that of
            the units.
        magnitude: whether it is a weight norm's. It then goes in place of the weight, which is a direction: its length
            is divided by, so it can't be zero.
        joined: whether it follows the weights one after the other.
    """

    name: str
    parameter: Tensor
    leaders: tuple[tuple[str, tuple[int, ...]], ...]
    magnitude: bool = False
    joined: bool = False

    def mask(self, masks: Mapping[str, Tensor]) -> Tensor:
        """Where this tensor stays, of its own shape."""
        kept = [reduce_mask(masks[name], shape).flatten() for name, shape in self.leaders]
        return (torch.cat(kept) if self.joined else torch.stack(kept).any(0)).view(self.parameter.shape)


def reduce_mask(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Whether anything is kept, along every dimension in which ``shape`` is 1."""
    for dim, size in enumerate(shape):
        mask = mask.any(dim=dim, keepdim=True) if size == 1 else mask
    return mask


def magnitudes(targets: Iterable[Target]) -> list[Follower]:
    """The magnitudes of the targets that are a weight norm's direction."""
    found = []
    for target in targets:
        if target.magnitude is not None:
            name, parameter = target.magnitude
            shape = tuple(parameter.shape) or (1,) * target.parameter.dim()
            found.append(Follower(name, parameter, ((target.name, shape),), magnitude=True))
    return found


def silenced(model: nn.Module, targets: Iterable[Target], dim: int, producers: Producers) -> list[Follower]:
    """What must be zero with a unit so that the unit is silent: its layer's bias, its channel of the norms after it.

    Args:
        model: the module that the targets are of.
        targets: the weights whose slices along ``dim`` are pruned whole.
        dim: of the units.
        producers: what `norms_after` found.
    """
    modules = compressible_modules(model)
    by_id = {id(target.parameter): target for target in targets}
    outputs: dict[str, list[Target]] = {}
    for path, module in modules.items():
        for _, parameter in own_parameters(module):
            target = by_id.get(id(parameter))
            if target is not None and _is_output(module, target, dim):
                outputs.setdefault(path, []).append(target)
    found = []
    for path, owned in outputs.items():
        name = "in_proj_bias" if isinstance(modules[path], nn.MultiheadAttention) else "bias"
        bias = getattr(modules[path], name, None)
        leaders = tuple(_leader(target, dim) for target in owned)
        if isinstance(bias, nn.Parameter) and bias.numel() == sum(target.parameter.shape[dim] for target in owned):
            found.append(Follower(f"{path}.{name}".lstrip("."), bias, leaders, joined=True))
    for norm, layers in producers.items():
        if all(len(outputs.get(layer, ())) == 1 for layer in layers):
            leaders = tuple(_leader(outputs[layer][0], dim) for layer in layers)
            for name, parameter in modules[norm].named_parameters(recurse=False):
                if all(parameter.numel() == max(shape) for _, shape in leaders):
                    found.append(Follower(f"{norm}.{name}", parameter, leaders))
    return found


def _is_output(layer: nn.Module, target: Target, dim: int) -> bool:
    """Whether the slices along ``dim`` are the layer's outputs, so that bias and output have an entry for each."""
    if not isinstance(layer, (_ConvNd, nn.Linear, nn.Bilinear, nn.MultiheadAttention)):
        return False  # Which dimension its outputs are isn't known.
    outputs = 0
    if isinstance(layer, _ConvTransposeNd):
        if layer.groups > 1:
            return False
        outputs = 1
    return dim % target.parameter.dim() == outputs


def _leader(target: Target, dim: int) -> tuple[str, tuple[int, ...]]:
    shape = [1] * target.parameter.dim()
    shape[dim] = target.parameter.shape[dim]
    return target.name, tuple(shape)


def _keeps_zero(module: nn.Module) -> bool:
    """Whether a silent channel is silent behind ``module`` too; that of a norm is made so."""
    return isinstance(module, _KEEP_ZERO) or (isinstance(module, _NormBase) and module.affine)


def speaking(model: nn.Module, targets: Iterable[Target], producers: Producers) -> list[str]:
    """The norms after targeted layers that have no scale and shift for each unit to be zeroed."""
    modules, layers = compressible_modules(model), {target.layer for target in targets}
    mixed = {f"{layer}{_FLATTENED}" for layer in layers}
    return [
        norm for norm, fed in producers.items() if mixed & set(fed) or (not modules[norm].affine and layers & set(fed))
    ]


def warning(norms: Iterable[str]) -> str:
    """What a user is told of norms that aren't silenced."""
    return f"behind these norms pruned units may still put out a constant: {named(norms)}."


def norm_paths(model: nn.Module) -> set[str]:
    """The norms whose channels are normalised each by itself."""
    return {path for path, module in compressible_modules(model).items() if isinstance(module, _NormBase)}


def norms_after(model: nn.Module, run: Callable[[], Any]) -> Producers:
    """Which layers feed each BatchNorm or InstanceNorm of ``model``, seen while ``run`` runs it.

    A norm that something else than a module's output reaches isn't listed.
    """
    # The tensors are held, so that no other gets their id. One that was since changed in place has another version.
    made: dict[int, tuple[Tensor, int, str]] = {}
    fed: dict[str, set[str]] = {}
    handles = []

    def maker(args: tuple[Any, ...]) -> str:
        tensor, version, path = made.get(id(args[0]), (None, 0, "")) if args else (None, 0, "")
        return path if tensor is not None and tensor._version == version else ""

    def watch_output(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor):
                came_from = before.pop(path, "") if _keeps_zero(module) else path
                if isinstance(module, nn.Flatten) and before.get(path):
                    came_from = before.pop(path) + _FLATTENED
                made[id(output)] = (output, output._version, came_from)

        return hook

    def watch_input(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            before[path] = maker(args)  # read now: the module may work in place
            if isinstance(module, _NormBase):
                # A Linear's units are its last dimension, a norm's channels its second.
                linear = args and args[0].dim() > 2 and isinstance(modules.get(before[path]), nn.Linear)
                fed.setdefault(path, set()).add("" if linear else before[path])

        return hook

    before: dict[str, str] = {}
    modules = compressible_modules(model)
    for path, module in modules.items():
        if isinstance(module, (_NormBase, nn.Flatten, *_KEEP_ZERO)):
            handles.append(module.register_forward_pre_hook(watch_input(path)))
        if not any(True for _ in module.children()):
            handles.append(module.register_forward_hook(watch_output(path)))
    try:
        # Compiled submodules run as written, so that the calls inside them are seen.
        with torch.compiler.set_stance("force_eager"), torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return {norm: sorted(layers) for norm, layers in fed.items() if "" not in layers}


def norms_in_sequence(model: nn.Module) -> Producers:
    """The norms that follow a layer in an `nn.Sequential`, which needs no run to know."""
    found: Producers = {}
    for path, module in model.named_modules():
        if type(module) is nn.Sequential:
            made = ""
            for name, child in module.named_children():
                inner = clean_name(f"{path}.{name}".lstrip("."))
                if made and isinstance(child, _NormBase):
                    found.setdefault(inner, []).append(made)
                # What a nested module ends with isn't looked up.
                made = made if _keeps_zero(child) else "" if any(True for _ in child.children()) else inner
    return found
