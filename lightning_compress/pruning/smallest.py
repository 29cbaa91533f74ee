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

Entries = tuple[Tensor, Tensor]
"""Flat: what is ranked, and where it may be taken."""

_CHUNK = 1 << 18
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
    """``masks`` with ``count`` more entries taken out: those of smallest magnitude, ranked over all tensors together.

    Exact to one entry: of entries that tie at the threshold, the first in order go. NaN ranks above infinity.

    Args:
        tensors: floating-point tensors of any shapes; what is ranked is their magnitude.
        masks: a bool tensor of the same shape for each; False is taken already.
        count: how many more to take, at least 1 and at most as many as are there to take.
        allowed: a bool tensor of the same shape for each, True where an entry may be taken; everywhere if left out.
        signed: rank by the values themselves, the most negative first, and not by magnitude.

    Returns:
        A new bool tensor for each.

    Example:
        >>> weight, mask = torch.tensor([0.5, -0.1, 3.0, 0.2]), torch.ones(4, dtype=torch.bool)
        >>> take_smallest([weight], [mask], 2)
        [tensor([ True, False,  True, False])]
    """
    free = masks if allowed is None else [mask & may for mask, may in zip(masks, allowed, strict=True)]
    flat = [(tensor.detach().reshape(-1), may.reshape(-1)) for tensor, may in zip(tensors, free, strict=True)]
    keys = _Keys(reduce(torch.promote_types, {tensor.dtype for tensor in tensors}), signed)
    threshold, left, ties = _threshold(flat, count, keys)
    kept = []
    for (entries, may), mask in zip(flat, masks, strict=True):
        stays = mask.reshape(-1).clone()
        for part in _parts(entries):
            found = keys.of(entries[part], may[part])
            goes = may[part] & (found <= threshold)
            if left < ties:
                tied = (found == threshold).nonzero()[:, 0]
                goes[tied[left:]] = False
                left, ties = max(left - len(tied), 0), ties - len(tied)
            stays[part] &= ~goes
        kept.append(stays.view(mask.shape))
    return kept


@dataclass(frozen=True)
class _Keys:
    """Turns entries into integers of the same order."""

    dtype: torch.dtype
    signed: bool

    @property
    def bits(self) -> int:
        return 8 * self.dtype.itemsize

    def of(self, entries: Tensor, may: Tensor) -> Tensor:
        """The key of each entry, from 0 on; below zero where it may not be taken."""
        integers = _INTEGERS[self.dtype.itemsize]
        limits = torch.iinfo(integers)
        if self.signed:
            raw = entries.to(self.dtype).view(integers)
            # The bits of negative floats fall as these rise. The last bit makes room for the sign of the excluded.
            keys = ((raw ^ (raw >> self.bits - 1 & limits.max)) >> 1) - (limits.min >> 1)
        else:
            keys = entries.abs().to(self.dtype).view(integers)
        # Cheaper than a `where`, and it keeps the excluded apart in the histogram.
        return keys.add_((~may).to(integers), alpha=limits.min)

    def packed(self, flat: Sequence[Entries]) -> Iterator[Tensor]:
        """The keys of all entries in chunks; small tensors share one."""
        waiting: list[Tensor] = []
        for entries, may in flat:
            for part in _parts(entries):
                keys = self.of(entries[part], may[part])
                if waiting and (waiting[0].device != keys.device or sum(map(len, waiting)) + len(keys) > _CHUNK):
                    yield torch.cat(waiting)
                    waiting = []
                waiting.append(keys)
        if waiting:
            yield torch.cat(waiting)


def _threshold(flat: Sequence[Entries], count: int, keys: _Keys) -> tuple[int, int, int]:
    """The key of the ``count``-th smallest entry, how many of its ties go, and how many ties there are."""
    prefix, left, ties = 0, count, 0
    for shift in range(keys.bits - _DIGIT, -1, -_DIGIT):
        histogram = torch.zeros(1 << _DIGIT, dtype=torch.long)
        for found in keys.packed(flat):
            if shift + _DIGIT < keys.bits:
                found = found[found >> (shift + _DIGIT) == prefix]
            histogram += torch.bincount((found >> shift).to(torch.int32) & _LOW, minlength=1 << _DIGIT).cpu()
        reached = histogram.cumsum(0)
        digit = int(torch.searchsorted(reached, left))
        ties = int(histogram[digit])
        left -= int(reached[digit]) - ties
        prefix = prefix << _DIGIT | digit
    return prefix, left, ties


def _parts(entries: Tensor) -> Iterator[slice]:
    return (slice(start, start + _CHUNK) for start in range(0, len(entries), _CHUNK))
