"""Exact selection of the smallest magnitudes among many tensors, in linear time and little memory.

The bits of a non-negative float, read as an integer, are ordered as the float is. So the magnitude up to which entries
go is found digit by digit (radix selection): one histogram of the upper 16 bits of all entries, then one of the lower
16 bits of those that share the upper ones. Nothing is sorted, and no copy of all entries is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

Part = tuple[Tensor, Tensor, Tensor]
"""Flat views of a part of a tensor: its entries, where they may be taken, and the mask that grows."""

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
    grown = [mask.clone(memory_format=torch.contiguous_format) for mask in masks]
    chunks = _chunks([tensor.detach() for tensor in tensors], free, grown)
    dtype = None if signed else reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    threshold, left, ties = _threshold(chunks, dtype, count)
    for chunk in chunks:
        keys, may = _keys(chunk, dtype)
        goes = (keys <= threshold) & may
        if left < ties:
            tied = (keys == threshold).nonzero()[:, 0]
            goes[tied[left:]] = False
            left, ties = max(left - len(tied), 0), ties - len(tied)
        for (*_, mask), gone in zip(chunk, goes.split([len(entries) for entries, *_ in chunk]), strict=True):
            mask.logical_and_(~gone)
    return grown


def _chunks(*tensors: Sequence[Tensor]) -> list[list[Part]]:
    """Split tensors into parts, and let those of small tensors share a chunk."""
    chunks: list[list[Part]] = [[]]
    for flat in zip(*(map(torch.flatten, kind) for kind in tensors), strict=True):
        for part in zip(*(tensor.split(_CHUNK) for tensor in flat), strict=True):
            held = sum(len(entries) for entries, *_ in chunks[-1])
            if chunks[-1] and (held + len(part[0]) > _CHUNK or part[0].device != chunks[-1][0][0].device):
                chunks.append([])
            chunks[-1].append(part)
    return chunks


def _threshold(chunks: list[list[Part]], dtype: torch.dtype | None, count: int) -> tuple[int, int, int]:
    """Find the key of the ``count``-th smallest entry, how many of its ties go, and how many ties there are."""
    bits = 48 if dtype is None else 8 * dtype.itemsize
    prefix, left, ties = 0, count, 0
    for shift in range(bits - _DIGIT, -1, -_DIGIT):
        histogram = torch.zeros(1 << _DIGIT, dtype=torch.long)
        for chunk in chunks:
            keys, _ = _keys(chunk, dtype)
            if shift + _DIGIT < bits:
                keys = keys[keys >> (shift + _DIGIT) == prefix]
            histogram += torch.bincount((keys >> shift).to(torch.int32) & _LOW, minlength=1 << _DIGIT).cpu()
        reached = histogram.cumsum(0)
        digit = int(torch.searchsorted(reached, left))
        ties = int(histogram[digit])
        left -= int(reached[digit]) - ties
        prefix = prefix << _DIGIT | digit
    return prefix, left, ties


def _keys(chunk: list[Part], dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Compute the key of each entry by its magnitude as ``dtype``, or by its value, and where it may be taken.

    What may not be taken has a key above all others, or below zero.
    """
    entries, may, _ = chunk[0] if len(chunk) == 1 else map(torch.cat, zip(*chunk, strict=True))
    if dtype is None:
        # With one zero, and NaN at the upper end whatever its sign.
        values = entries.float() + 0.0
        raw = torch.where(values.isnan(), values.abs(), values).view(torch.int32)
        # As the bits of negative floats rise, the floats fall.
        keys = (raw ^ (raw >> 31 & 0x7FFFFFFF)).long() + (1 << 31)
        return keys.add_(~may, alpha=1 << 33), may
    integers = _INTEGERS[dtype.itemsize]
    # Cheaper than a `where`, and it keeps the excluded apart in the histogram.
    keys = entries.abs().to(dtype).view(integers)
    return keys.add_((~may).to(integers), alpha=torch.iinfo(integers).min), may
