"""torch's 4-bit product on the CPU, for few rows of activations, and the order of codes that it wants.

It reads tiles of 32 or 64 rows: for each column half as many bytes, each with the codes of two rows. Codes in rows take
as many bytes, so a weight is kept in one order and not in both. Activations are rounded to bfloat16 on their way in.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from lightning_compress.quantization.numerics.packing import shifted_right

FEW = 16
"""With more rows of activations, dequantizing and multiplying in float is as fast."""

_GROUPS = (256, 128, 64, 32)
_SIZES = (64, 32)


@cache
def tile_rows() -> int:
    """Return rows in a tile on this CPU; 0 if the kernel isn't there, or reads another order than is known here."""
    codes = torch.arange(64 * 64).remainder(13).to(torch.uint8).view(64, 64)
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    except (RuntimeError, AttributeError):
        return 0
    return next((size for size in _SIZES if torch.equal(tiled(codes, size).view_as(packed), packed)), 0)


def kernel_group(rows: int, columns: int, block_size: int | None) -> int:
    """Return the group size with which the kernel takes such a weight; 0 if it doesn't."""
    size = columns if block_size is None else block_size
    if columns % size or not tile_rows() or rows % tile_rows():
        return 0
    return next((group for group in _GROUPS if size % group == 0), 0)


def tiled(codes: Tensor, size: int) -> Tensor:
    """Return codes ``(rows, columns)``, uint8 below 16, in tiles of ``size`` rows: ``(rows, columns / 2)``."""
    low, high = codes.view(-1, 2, size // 2, codes.shape[1]).unbind(1)
    return (low | high << 4).transpose(1, 2).contiguous().view(codes.shape[0], -1)


def untiled(tiles: Tensor, size: int) -> Tensor:
    """Return the codes that `tiled` took."""
    bytes_ = tiles.view(-1, 2 * tiles.shape[1], size // 2).transpose(1, 2)
    return torch.stack([bytes_ & 15, shifted_right(bytes_, 4)], dim=1).view(tiles.shape[0], -1)


def some_untiled(tiles: Tensor, rows: Tensor, size: int) -> Tensor:
    """Return the codes of some rows."""
    place = rows % size
    found = tiles.view(-1, 2 * tiles.shape[1], size // 2)[rows // size, :, place % (size // 2)]
    return torch.where(place[:, None] < size // 2, found & 15, shifted_right(found, 4))


def scales_and_zeros(scale: Tensor, zero: Tensor, repeat: int) -> Tensor:
    """Find what the kernel reads beside codes: ``W = S (Q - 8) + S (8 - Z)``, bfloat16 ``(groups, rows, 2)``."""
    both = torch.stack([scale, scale * (8 - zero.float())], dim=-1).repeat_interleave(repeat, dim=1)
    return both.transpose(0, 1).to(torch.bfloat16).contiguous()


def product(x: Tensor, tiles: Tensor, group: int, scales: Tensor) -> Tensor:
    """Return ``x W^T`` in the type of ``x``, ``(..., rows)``."""
    rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
    y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, tiles, group, scales)
    return y.to(x.dtype).view(*x.shape[:-1], -1)
