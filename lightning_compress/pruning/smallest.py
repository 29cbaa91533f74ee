"""Exact selection of the smallest magnitudes among many tensors, in linear time and little memory.

The bits of a non-negative float, read as an integer, are ordered as the float is. So the magnitude up to which entries
go is found digit by digit (radix selection): one histogram of the upper 16 bits of all entries, then one of the lower
16 bits of those that share the upper ones. Nothing is sorted, and no copy of all entries is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

Place = tuple[int, slice]
"""A part of a flat tensor: which one, and where."""

_CHUNK = 1 << 19
"""Entries that are looked at together: few enough to stay in a CPU's cache."""

_DIGIT = 16
_LOW = (1 << _DIGIT) - 1
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def take_smallest(
    tensors: Sequence[Tensor],
    masks: Sequence[Tensor],
    count: int,
    allowed: Sequence[Tensor] | None = None,
    signed: bool = False,
) -> list[Tensor]:
    """Take ``count`` more entries out of ``masks``: those of smallest magnitude, ranked over all tensors together.

    Exact to one entry: of entries that tie at the threshold, the first in order go. NaN ranks above infinity.

    Args:
        tensors: floating-point tensors of any shapes; what is ranked is their magnitude.
        masks: a bool tensor of the same shape for each; False is taken already.
        count: how many more to take, at least 1 and at most as many as are there to take.
        allowed: a bool tensor of the same shape for each, True where an entry may be taken; everywhere if left out.
        signed: rank by the values themselves (as float32), the most negative first, and not by magnitude.

    Returns:
        A new bool tensor for each.

    Example:
        >>> weight, mask = torch.tensor([0.5, -0.1, 3.0, 0.2]), torch.ones(4, dtype=torch.bool)
        >>> take_smallest([weight], [mask], 2)
        [tensor([ True, False,  True, False])]
    """
    free = masks if allowed is None else [mask & may for mask, may in zip(masks, allowed, strict=True)]
    ranking = _Ranking([tensor.detach().reshape(-1) for tensor in tensors], [mask.reshape(-1) for mask in free], signed)
    threshold, left, ties = ranking.threshold(count)
    grown = [mask.clone(memory_format=torch.contiguous_format) for mask in masks]
    for places, keys, may in ranking.chunks():
        goes = (keys <= threshold) & may
        if left < ties:
            tied = (keys == threshold).nonzero()[:, 0]
            goes[tied[left:]] = False
            left, ties = max(left - len(tied), 0), ties - len(tied)
        for (index, part), gone in zip(places, goes.split([_length(part) for _, part in places]), strict=True):
            grown[index].view(-1)[part] &= ~gone
    return grown


@dataclass(frozen=True)
class _Ranking:
    """Ranks entries as integers of the same order.

    Attributes:
        tensors: flat, what is ranked.
        free: flat, where an entry may be taken.
        signed: whether values are ranked, and not magnitudes.
    """

    tensors: list[Tensor]
    free: list[Tensor]
    signed: bool

    @property
    def dtype(self) -> torch.dtype:
        return reduce(torch.promote_types, (tensor.dtype for tensor in self.tensors))

    def threshold(self, count: int) -> tuple[int, int, int]:
        """Find the key of the ``count``-th smallest entry, how many of its ties go, and how many ties there are."""
        bits = 48 if self.signed else 8 * self.dtype.itemsize
        prefix, left, ties = 0, count, 0
        for shift in range(bits - _DIGIT, -1, -_DIGIT):
            histogram = torch.zeros(1 << _DIGIT, dtype=torch.long)
            for _, keys, _ in self.chunks():
                if shift + _DIGIT < bits:
                    keys = keys[keys >> (shift + _DIGIT) == prefix]
                histogram += torch.bincount((keys >> shift).to(torch.int32) & _LOW, minlength=1 << _DIGIT).cpu()
            reached = histogram.cumsum(0)
            digit = int(torch.searchsorted(reached, left))
            ties = int(histogram[digit])
            left -= int(reached[digit]) - ties
            prefix = prefix << _DIGIT | digit
        return prefix, left, ties

    def chunks(self) -> Iterator[tuple[list[Place], Tensor, Tensor]]:
        """Yield all keys in order, a chunk at a time, with the places that they are from and where they may be taken.

        Small tensors share a chunk.
        """
        for places in self.places():
            entries, may = _join(self.tensors, places), _join(self.free, places)
            yield places, self._keys(entries, may), may

    def places(self) -> Iterator[list[Place]]:
        """Yield parts of tensors that together make a chunk."""
        places: list[Place] = []
        for index, tensor in enumerate(self.tensors):
            for start in range(0, len(tensor), _CHUNK):
                part = slice(start, min(start + _CHUNK, len(tensor)))
                held = sum(_length(other) for _, other in places)
                if places and (held + _length(part) > _CHUNK or tensor.device != self.tensors[index - 1].device):
                    yield places
                    places = []
                places.append((index, part))
        if places:
            yield places

    def _keys(self, entries: Tensor, may: Tensor) -> Tensor:
        """Compute the key of each entry; what may not be taken has one above all others, or below zero."""
        if self.signed:
            # With one zero, and NaN at the upper end whatever its sign.
            values = entries.float() + 0.0
            raw = torch.where(values.isnan(), values.abs(), values).view(torch.int32)
            # As the bits of negative floats rise, the floats fall.
            keys = (raw ^ (raw >> 31 & 0x7FFFFFFF)).long() + (1 << 31)
            return keys.add_(~may, alpha=1 << 33)
        integers = _INTEGERS[self.dtype.itemsize]
        # Cheaper than a `where`, and it keeps the excluded apart in the histogram.
        keys = entries.abs().to(self.dtype).view(integers)
        return keys.add_((~may).to(integers), alpha=torch.iinfo(integers).min)


def _join(flat: list[Tensor], places: list[Place]) -> Tensor:
    parts = [flat[index][part] for index, part in places]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _length(part: slice) -> int:
    return int(part.stop - part.start)
