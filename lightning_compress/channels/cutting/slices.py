"""From units to slices: what stays of every tensor, and of every number, when some units of each group stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_compress.channels.cutting.corrections import corrections, width_kept
from lightning_compress.channels.cutting.written import WRITTEN
from lightning_compress.channels.tracing.groups import DependencyGroups


def kept_slices(structure: DependencyGroups, keep: Sequence[Tensor]) -> dict[str, dict[int, Tensor]]:
    """What stays of each tensor that shrinks, by what stays of each group (bool, ``(size,)``)."""
    stays: dict[tuple[str, int], Tensor] = {}
    for group, kept in zip(structure.groups, keep, strict=True):
        if bool(kept.all()):
            continue
        for member in (*group.members, *group.cached):
            mine = (member.units < 0) | kept[member.units]
            key = member.name, member.dim
            stays[key] = stays[key] & mine if key in stays else mine
    slices: dict[str, dict[int, Tensor]] = {}
    for (name, dim), mask in stays.items():
        slices.setdefault(name, {})[dim] = mask.nonzero().flatten()
    return slices


def followed(structure: DependencyGroups, keep: Sequence[Tensor]) -> dict[str, Any]:
    """The new values of the numbers that follow, and corrections of sizes, by what stays of each group."""
    numbers: dict[str, Any] = {}
    for one in structure.attributes:
        stays = width_kept(one.groups, one.units, keep)
        if int(stays.sum()) < len(stays):
            numbers[f"{one.path}.{one.name}".lstrip(".")] = int(stays.sum())
    cut = any(not bool(kept.all()) for kept in keep)
    for path in dict.fromkeys(call.path for call in structure.written if cut):
        old = structure.corrected.get(path, [])
        new = corrections(old, [call for call in structure.written if call.path == path], keep)
        if new != old:
            numbers[f"{path}.{WRITTEN}".lstrip(".")] = new
    return numbers
