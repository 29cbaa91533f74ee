"""Holds groups of channels that depend on each other, as plain data: traced from a model, applied as slices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.channels.cutting.skipped import SKIPPED, Skip
from lightning_compress.channels.cutting.written import WRITTEN, Correction
from lightning_compress.channels.tracing.corrections import WrittenSizes, corrections, width_kept

Run = Callable[[nn.Module], Any]
"""Calls a model, or a copy of it, and returns what it puts out. A ``reason`` on it says why that keeps its size."""


@dataclass(frozen=True)
class Member:
    """A dimension of a tensor that belongs to a group, wholly or in part.

    Attributes:
        name: of the parameter or buffer.
        layer: path of the layer that it belongs to.
        dim: its dimension.
        units: int64, for each place along the dimension the group's unit, or -1.
        makes: whether the dimension is what a layer puts out, not what it takes in.
    """

    name: str
    layer: str
    dim: int
    units: Tensor
    makes: bool


@dataclass(frozen=True, eq=False)
class Group:
    """Units that are alike: the channels of some layers, the heads of an attention layer.

    Attributes:
        size: how many units.
        width: how many channels these are in the first layer.
        members: the dimensions that shrink with it.
        layers: paths of the layers that make these channels.
        spanned: what is computed across its units, if something is; then removal isn't exact.
        lasting: whether it stays spanned, even where an example doesn't show it.
        cached: dimensions of tensors that modules keep beside their own, which shrink too.
        skip: of a residual block, which is a group of one unit: what takes its place.
    """

    size: int
    width: int
    members: tuple[Member, ...]
    layers: tuple[str, ...]
    spanned: str = ""
    lasting: bool = False
    cached: tuple[Member, ...] = ()
    skip: Skip = ()

    @property
    def name(self) -> str:
        """The first layer that makes its channels."""
        return self.layers[0] if self.layers else self.members[0].name


Cost = tuple[int, tuple[tuple[Tensor, Tensor], ...], tuple[str, ...]]
"""Multiply-accumulates with all channels; of each width that they are proportional to and that may shrink, the group of
each place, or -1 where it stays, and the unit in that; and the modules that run then, from the outermost one on."""


@dataclass(frozen=True, eq=False)
class Attribute:
    """A number that a module keeps and that follows a width, such as its heads.

    Attributes:
        path: of the module.
        name: of the attribute.
        groups: for each place of the width its group, or -1.
        units: and its unit in that.
        sure: whether the number follows for certain; else it only has the right value, and is to be tried.
    """

    path: str
    name: str
    groups: Tensor
    units: Tensor
    sure: bool


@dataclass(frozen=True)
class DependencyGroups:
    """Holds the groups of channels that can go from a model.

    Attributes:
        all: the groups, in the order of the model's tensors.
        costs: the multiply-accumulates of each product.
        attributes: numbers that follow.
        written: calls whose sizes are corrected.
        corrected: path of a module to the corrections that it has: see `written`.
        fixed: layers whose outputs stay, with the reason.
        splits: keys of splits to the groups that they concern.
        shapes: of all tensors, when this was found.
        counted: names of the parameters that count as the model's.
        macs: multiply-accumulates of the first run.
    """

    all: tuple[Group, ...]
    costs: tuple[Cost, ...]
    attributes: tuple[Attribute, ...]
    written: tuple[WrittenSizes, ...]
    corrected: Mapping[str, list[Correction]]
    fixed: Mapping[str, str]
    splits: Mapping[str, frozenset[int]]
    shapes: Mapping[str, tuple[int, ...]]
    counted: tuple[str, ...]
    macs: int

    def only(self, numbers: Sequence[int]) -> DependencyGroups:
        """Return only some of the groups; the others stay whole."""
        place = torch.full((len(self.all) + 1,), -1)
        place[list(numbers)] = torch.arange(len(numbers))
        costs = [
            (macs, tuple((place[groups], units) for groups, units in widths), path) for macs, widths, path in self.costs
        ]
        return replace(
            self,
            all=tuple(self.all[number] for number in numbers),
            costs=tuple(costs),
            attributes=tuple(replace(attribute, groups=place[attribute.groups]) for attribute in self.attributes),
            written=tuple(call.renumbered(place) for call in self.written),
        )

    def kept_slices(self, keep: Sequence[Tensor]) -> dict[str, dict[int, Tensor]]:
        """Return what stays of each tensor that shrinks, by what stays of each group (bool, ``(size,)``)."""
        stays: dict[str, dict[int, Tensor]] = {}
        for group, mask in zip(self.all, keep, strict=True):
            for member in () if bool(mask.all()) else (*group.members, *group.cached):
                along = (member.units < 0) | mask[member.units]
                dims = stays.setdefault(member.name, {})
                dims[member.dim] = dims.get(member.dim, along) & along
        return {name: {dim: along.nonzero().flatten() for dim, along in dims.items()} for name, dims in stays.items()}

    def numbers(self, keep: Sequence[Tensor]) -> dict[str, Any]:
        """Return new values of attributes that follow, and corrections of sizes, by what stays of each group."""
        numbers: dict[str, Any] = {}
        for attribute in self.attributes:
            stays = width_kept(attribute.groups, attribute.units, keep)
            if int(stays.sum()) < len(stays):
                numbers[f"{attribute.path}.{attribute.name}".lstrip(".")] = int(stays.sum())
        pairs = [(group, bool(mask.all())) for group, mask in zip(self.all, keep, strict=True)]
        cut = any(not whole and not group.skip for group, whole in pairs)
        for path in dict.fromkeys(call.path for call in self.written if cut):
            old = self.corrected.get(path, [])
            new = corrections(old, [call for call in self.written if call.path == path], keep)
            if new != old:
                numbers[f"{path}.{WRITTEN}".lstrip(".")] = new
        return numbers | {f"{group.name}.{SKIPPED}": group.skip for group, whole in pairs if group.skip and not whole}
