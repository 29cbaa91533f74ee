"""Maps of units: which entry of a tensor is of which unit, and what operators make of that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Map = Tensor
"""The number of each entry's unit from 1 on, 0 where it is of none; of a shape that broadcasts to the tensor's."""

Maps = dict[str, Map | None]
"""A map for each target; None where a tensor was computed from units and has no entries of single ones."""

CONTRACTIONS = ("convolution", "mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "linear", "_trilinear")
"""Operators that sum over channels with weights: here units end, or begin. So they do in attention."""

_ADDS_FIRST = ("addmm", "baddbmm", "addmv")
_COPIES = ("clone", "detach", "alias", "_to_copy")
_MOVES = ("flip", "roll", "index_select", "index", "gather", "cat", "stack", "sort", "repeat", "rot90")
"""Operators whose result may have its operand's shape in another order."""


@dataclass(frozen=True)
class Call:
    """Holds a call of an operator, which can be run again on maps."""

    func: Any
    name: str
    args: Any
    kwargs: Any
    static: bool

    @property
    def moves(self) -> bool:
        """Whether entries may change their places in a shape that stays."""
        return self.name in _MOVES or bool(getattr(self.func, "is_view", False))

    def carried(self, maps: Mapping[int, Map], count: int, contracted: bool, outs: list[Tensor]) -> list[Map | None]:
        """Compute the maps of what an operator puts out that moves entries, is linear in them, or picks the largest.

        A result's entry is of a unit if only that unit's entries go into it: codes of the units come out as they are.
        """
        device = outs[0].device
        codes = torch.linspace(1, 2, count, device=device)
        shuffled = codes[torch.randperm(count, generator=torch.Generator().manual_seed(0)).to(device)]
        try:
            ones = self._on(maps, torch.ones(count, device=device), contracted, others=1.0)
            first, second, negative = (
                self._on(maps, values, contracted, others=float(contracted)) for values in (codes, shuffled, -codes)
            )
        except Exception:  # an operator that takes no such values; nothing is known of its result
            return [None] * len(outs)
        results: list[Map | None] = []
        for number, out in enumerate(outs):
            total = ones[number]
            unit = ((first[number] / total - 1) * (count - 1)).nan_to_num(0).round().clamp(0, count - 1).long()
            near = 0.25 / max(count - 1, 2500)
            expected = ((first, codes[unit]), (second, shuffled[unit]), (negative, -codes[unit]))
            same = torch.stack([(result[number] / total - code).abs() < near for result, code in expected]).all(0)
            found = (unit + 1).where(same, 0)
            if len(found.shape) > 1 and torch.equal(found, found[:1].expand(found.shape)):
                found = found[:1]  # most often, all samples are alike
            results.append(found if found.any() and broadcasts(found.shape, out.shape) else None)
        return results

    def entries(self, source: Tensor, entries: Map | None, outs: list[Tensor], number: int) -> Map | None:
        """Find which entries of a parameter a result has, from those that ``source``, the one operand, has."""
        if entries is None or self.name in _COPIES:
            return entries
        if not self.moves and self.name != "expand":
            return None
        return self.carried({id(source): entries}, int(entries.max()), False, outs)[number]

    def fills_all(self, weights: Mapping[int, Map]) -> bool:
        """Tell whether a unit of a weight goes into all results, as a unit of inputs does."""
        units = next(iter(weights.values()))
        first = torch.arange(int(units.max()), device=units.device) == 0
        try:
            [out] = self._on(weights, first.float(), contracted=True, others=1.0)
        except Exception:  # as above
            return False
        return out.numel() > 1 and bool((out != 0).all())

    def _on(self, maps: Mapping[int, Map], codes: Tensor, contracted: bool, others: float) -> list[Tensor]:
        """Run the call with codes in the place of units; 0 for what is of none."""
        codes = torch.cat([codes.new_zeros(1) if others == 0 or contracted else codes.new_ones(1), codes])
        rows = {"convolution": 0, "mm": 0, "addmm": 1, "linear": 0}.get(self.name) if contracted else None
        bias = {"convolution": 2, "linear": 2}.get(self.name, 0 if self.name in _ADDS_FIRST else None)

        def swap(place: int | None, leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if id(leaf) in maps:
                coded = codes[maps[id(leaf)]].expand(leaf.shape)
                return coded.contiguous() if "view" in self.name else coded
            if not leaf.is_floating_point():
                return leaf
            shape = (1, *leaf.shape[1:]) if place == rows and place is not None else leaf.shape  # all rows are alike
            adds = contracted and place is not None and place == bias
            return torch.full(shape, 0.0 if adds else others, device=leaf.device)

        args = [
            pytree.tree_map(lambda leaf, place=place: swap(place, leaf), arg) for place, arg in enumerate(self.args)
        ]
        kwargs = pytree.tree_map(lambda leaf: swap(None, leaf), self.kwargs)
        return [leaf for leaf in pytree.tree_leaves(self.func(*args, **kwargs)) if isinstance(leaf, Tensor)]


def broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    """Tell whether a tensor of one shape takes another without the other's changing."""
    return len(shape) <= len(to) and all(own in (1, size) for own, size in zip(shape[::-1], to[::-1], strict=False))


def units_of_entries(entries: Map, units: Map, name: str, count: int) -> Tensor | None:
    """Find for each of ``count`` entries of a parameter the one unit that it goes with; None if there are several.

    It is -1 for none, and -2 where a part of the parameter has no such entry.
    Channels are the second dimension for convolutions and their norms; all else is broadcast.
    """
    second = name == "convolution" or "batch_norm" in name or "group_norm" in name
    ways = [entries] if not second and broadcasts(entries.shape, units.shape) else []
    if second and units.dim() > 1 and entries.dim() == 1 and len(entries) == units.shape[1]:
        ways.append(entries.view(-1, *[1] * (units.dim() - 2)))
    for way in ways:
        places, values = (tensor.flatten() for tensor in torch.broadcast_tensors(way, units))
        empty = torch.full((count + 1,), -1, dtype=values.dtype, device=values.device)
        most, least = (empty.scatter_reduce(0, places, values, how, include_self=False) for how in ("amax", "amin"))
        if torch.equal(most, least) and (most > 0).any():
            return most[1:] - 1
    return None
