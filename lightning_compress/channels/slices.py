"""From units to slices: what stays of every tensor, and of every number, when some units of each group stay."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_compress.channels.groups import Structure


def kept_slices(structure: Structure, keep: Sequence[Tensor]) -> dict[str, dict[int, Tensor]]:
    """What stays of each tensor that shrinks, by what stays of each group (bool, ``(size,)``)."""
    stays: dict[tuple[str, int], Tensor] = {}
    for group, kept in zip(structure.groups, keep, strict=True):
        if bool(kept.all()):
            continue
        for member in group.members:
            mine = (member.units < 0) | kept[member.units]
            key = member.name, member.dim
            stays[key] = stays[key] & mine if key in stays else mine
    slices: dict[str, dict[int, Tensor]] = {}
    for (name, dim), mask in stays.items():
        slices.setdefault(name, {})[dim] = mask.nonzero().flatten()
    return slices


def followed(structure: Structure, keep: Sequence[Tensor]) -> dict[str, int]:
    """The new values of the numbers that follow, by what stays of each group."""
    numbers = {}
    for one in structure.attributes:
        stays = width_kept(one.groups, one.units, keep)
        if int(stays.sum()) < len(stays):
            numbers[f"{one.path}.{one.name}".lstrip(".")] = int(stays.sum())
    return numbers


def width_kept(groups: Tensor, units: Tensor, keep: Sequence[Tensor]) -> Tensor:
    """For each place of a width whether it stays."""
    stays = torch.ones(len(groups), dtype=torch.bool)
    for number in groups.unique().tolist():
        if number >= 0:
            mine = groups == number
            stays[mine] = keep[number][units[mine]]
    return stays
