"""What goes with a weight: magnitudes of a weight norm, and biases and norm channels of units that are pruned whole.

A filter whose weights are zero still puts out its bias, and a norm after it ``beta - gamma * mean / std``. Only where
these are zero too is a removed unit silent. What is known without a run stands here, and what follows
from a run; `silence` runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.pooling import _AvgPoolNd, _MaxPoolNd

from lightning_compress.modules.layer_weights import PRUNABLE, own_parameters
from lightning_compress.modules.paths import clean_name, compressible_modules
from lightning_compress.pruning.layout import Layout, UnitView, along
from lightning_compress.targets import Target

_KEEP_ZERO = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh),
    *(nn.Hardtanh, nn.Hardswish, nn.Identity, _DropoutNd, _MaxPoolNd, _AvgPoolNd),
)
"""Layers that pass a channel on by itself, and zero as zero."""

_OF_CHANNELS = (_NormBase, nn.GroupNorm)
"""Norms whose scale and shift have an entry for each channel, the second dimension."""


@dataclass(frozen=True)
class Source:
    """Says for which units of a weight a tensor has entries."""

    name: str
    layout: Layout
    units: Tensor  # for each entry of the tensor, flat, the number of its unit; -1 where it has none of this weight


@dataclass(frozen=True)
class Dependent:
    """Holds a tensor with entries for units of some weights; an entry goes when its units are gone from all of them.

    A weight norm's ``magnitude`` goes in place of the weight, a direction: its length is divided by, so can't be zero.
    """

    name: str
    parameter: Tensor
    sources: tuple[Source, ...]
    magnitude: bool = False

    def mask(self, masks: Mapping[str, Tensor]) -> Tensor:
        """Tell where this tensor stays, in its own shape."""
        covered = torch.stack([source.units >= 0 for source in self.sources])
        alive = [source.layout.alive(masks[source.name])[source.units.clamp(min=0)] for source in self.sources]
        return ((torch.stack(alive) & covered).any(0) | ~covered.any(0)).view(self.parameter.shape)


@dataclass
class Observations:
    """Gathers what was seen of pruned units in runs of a copy of the model.

    ``calls`` has for each parameter the units that its entries went with in each call: weight to unit numbers, -1 where
    an entry has none, -2 where it didn't take part.
    """

    nonzero: dict[str, str] = field(default_factory=dict)  # weights whose pruned units aren't silent, and why
    calls: dict[str, list[dict[str, Tensor]]] = field(default_factory=dict)
    relied_on: dict[str, set[str]] = field(default_factory=dict)  # for each weight the parameters that had to be zero

    def dependents(self, model: nn.Module, layouts: Mapping[str, Layout]) -> list[Dependent]:
        """Find the parameters of ``model`` that go with units, where every call of theirs had such units."""
        parameters = {clean_name(name): parameter for name, parameter in model.named_parameters()}
        found = []
        for name in sorted(set[str]().union(*self.relied_on.values())):
            calls = self.calls[name]
            alone = torch.stack([torch.stack(list(call.values())).amax(0) != -1 for call in calls if call]).all(0)
            if not all(calls) or not alone.any():
                continue
            sources = []
            for weight in dict.fromkeys(weight for call in calls for weight in call):
                units = torch.stack([call[weight] for call in calls if weight in call]).amax(0).where(alone, -1)
                sources.append(Source(weight, layouts[weight], units.to(parameters[name].device)))
            found.append(Dependent(name, parameters[name], tuple(sources)))
        return found

    def unmasked_norms(self, dependents: Iterable[Dependent]) -> dict[str, str]:
        """Find the weights whose pruned units aren't silent, each with where that comes from."""
        follows = {(dependent.name, source.name) for dependent in dependents for source in dependent.sources}
        shared = {
            weight: f"`{name}`, which others use too"
            for weight, names in self.relied_on.items()
            for name in sorted(names)
            if (name, weight) not in follows
        }
        return dict(sorted({**shared, **self.nonzero}.items()))


def reduce_mask(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Tell whether anything stays, along every dimension in which ``shape`` is 1."""
    for dim, size in enumerate(shape):
        mask = mask.any(dim=dim, keepdim=True) if size == 1 else mask
    return mask


def magnitudes(targets: Iterable[Target]) -> list[Dependent]:
    """Find the magnitudes of the targets that are a weight norm's direction."""
    found = []
    for target in targets:
        if target.magnitude is not None:
            name, parameter = target.magnitude
            layout = along(target.parameter.shape, [dim for dim, size in enumerate(parameter.shape) if size != 1])
            source = Source(target.name, layout, _in_order(parameter))
            found.append(Dependent(name, parameter, (source,), magnitude=True))
    return found


def biases(model: nn.Module, units: UnitView) -> list[Dependent]:
    """Find what a pruned unit's own layer adds to it."""
    by_id = {id(target.parameter): target for target in units.outputs}
    found = []
    for path, module in compressible_modules(model).items():
        if not isinstance(module, PRUNABLE):
            continue  # which dimension its outputs are isn't known
        weights = [by_id[id(parameter)] for _, parameter in own_parameters(module) if id(parameter) in by_id]
        for name, bias in module.named_parameters(recurse=False):
            if sources := _sources(module, name, bias, weights, units.numbered):
                found.append(Dependent(f"{path}.{name}".lstrip("."), bias, sources))
    return found


def _sources(
    layer: nn.Module, name: str, bias: Tensor, weights: list[Target], layouts: Mapping[str, Layout]
) -> tuple[Source, ...]:
    """Find the weights whose units a bias has entries for: none if it isn't of this layer's outputs."""
    if "bias" not in name or not weights or bias.numel() < 2 or name in ("bias_k", "bias_v"):
        return ()
    units = {target.name: len(layouts[target.name].alive(torch.ones_like(target.parameter))) for target in weights}
    if isinstance(layer, nn.RNNBase | nn.RNNCellBase):
        suffix = re.sub("bias_(ih|hh)", "", name)
        ends = f"weight_ih{suffix}", f"weight_hh{suffix}"
        names = [target.name for target in weights if target.name.endswith(ends)]
        gates = bias.numel() // layer.hidden_size
        order = torch.arange(layer.hidden_size, device=bias.device).repeat(gates)
        return tuple(Source(name, layouts[name], order) for name in names) if len(names) == 2 else ()
    if bias.numel() != sum(units.values()):
        return ()
    entry = _in_order(bias)
    sources, start = [], 0
    for target in weights:
        inside = (entry >= start) & (entry < start + units[target.name])
        sources.append(Source(target.name, layouts[target.name], (entry - start).where(inside, -1)))
        start += units[target.name]
    return tuple(sources)


def _in_order(parameter: Tensor) -> Tensor:
    return torch.arange(parameter.numel(), device=parameter.device)


def in_sequence(model: nn.Module, units: UnitView) -> tuple[list[Dependent], set[str]]:
    """Find what goes with units by their places in a `nn.Sequential`, which needs no run to know.

    Returns:
        Scale and shift of norms that follow a layer; and the paths of what may shift units, or let zero not be zero,
        where that can't be known without a run.
    """
    layouts = units.numbered
    owners = {target.layer: target for target in units.outputs if target.parameter.dim() > 1}
    found: list[Dependent] = []
    known: set[str] = set()
    unknown: set[str] = set()
    modules = compressible_modules(model)
    for path, module in modules.items():
        made: Target | None = None
        for name, child in module.named_children() if type(module) is nn.Sequential else ():
            inner = clean_name(f"{path}.{name}".lstrip("."))
            scale = getattr(child, "weight", None) if isinstance(child, _OF_CHANNELS) else None
            count = 0 if made is None else len(layouts[made.name].outputs_first(made.parameter))
            if made is not None and scale is not None and scale.numel() == count:
                known.add(inner)
                for kind, parameter in child.named_parameters(recurse=False):
                    source = Source(made.name, layouts[made.name], _in_order(parameter))
                    found.append(Dependent(f"{inner}.{kind}", parameter, (source,)))
            elif not isinstance(child, _KEEP_ZERO):
                if made is not None and not any(True for _ in child.parameters()) and not any(child.children()):
                    unknown.add(inner)
                made = owners.get(inner)
    unknown |= {path for path in owners if not isinstance(modules[path], (*PRUNABLE, nn.Embedding, nn.EmbeddingBag))}
    unknown |= {path for path, module in modules.items() if "Norm" in type(module).__name__} - known
    return found, unknown
