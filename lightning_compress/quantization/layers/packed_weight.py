"""Matrices of few bits: packed codes and scales as buffers, and the float values of any of their rows."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.quantization.numerics import linear, nf4
from lightning_compress.quantization.numerics.packing import pack, unpack

Rows = slice | Tensor


class PackedWeight(nn.Module):
    """A matrix ``(rows, columns)`` that is stored in few bits; blocks lie along the rows, the input dimension."""

    codes: Tensor

    def __init__(self, shape: tuple[int, int], bits: int, block_size: int | None) -> None:
        super().__init__()
        self.rows, self.columns = shape
        self.bits = bits
        self.block_size = block_size

    @abstractmethod
    def values(self, rows: Rows) -> Tensor:
        """Those rows as float32, ``(len(rows), columns)``."""

    def forward(self) -> Tensor:
        """The whole matrix in float32."""
        return self.values(slice(None))

    def unpacked(self, rows: Rows) -> Tensor:
        """Codes of those rows, in blocks: uint8, ``(len(rows), n_blocks, block_size)``."""
        return linear.blocks(unpack(_take(self.codes, rows), self.bits, self.columns), self.block_size)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # Moves to other devices; scales stay in their own type, whatever the model is cast to.
        def keep_type(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_type, recurse)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        blocks = "" if self.block_size is None else f", block_size={self.block_size}"
        return f"{self.rows} x {self.columns}, bits={self.bits}{blocks}"

    def __len__(self) -> int:
        return self.rows


class LinearWeight(PackedWeight):
    """``W = S (Q - Z)`` with Q of 2 to 8 bits; S bfloat16 and, if asymmetric, Z of as many bits as Q, for each block.

    Args:
        codes: uint8, ``(rows, columns)``.
        scale: ``(rows, n_blocks)``.
        zero: ``(rows, n_blocks)``; None where it is ``2^(bits-1)``, which is symmetric quantization.
        bits: of a code.
        block_size: values with one scale; None is a scale for each row.
    """

    scale: Tensor
    zero: Tensor | None

    def __init__(self, codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, block_size: int | None) -> None:
        super().__init__((codes.shape[0], codes.shape[1]), bits, block_size)
        self.register_buffer("codes", pack(codes, bits))
        self.register_buffer("scale", scale.to(torch.bfloat16))
        self.register_buffer("zero", None if zero is None else pack(zero.to(torch.uint8), bits))

    @classmethod
    def nearest(cls, matrix: Tensor, bits: int, block_size: int | None, symmetric: bool) -> LinearWeight:
        """Round ``matrix`` to the nearest codes."""
        blocks = linear.blocks(matrix.detach().float(), block_size)
        scale, zero = linear.parameters(blocks, bits, symmetric)
        codes = linear.quantize(blocks, scale, zero, bits).flatten(1)[:, : matrix.shape[1]]
        return cls(codes, scale.squeeze(-1), None if symmetric else zero.squeeze(-1), bits, block_size)

    def values(self, rows: Rows) -> Tensor:
        scale = _take(self.scale, rows).float().unsqueeze(-1)
        zero: Any = 2 ** (self.bits - 1)
        if self.zero is not None:
            zero = unpack(_take(self.zero, rows), self.bits, scale.shape[1]).unsqueeze(-1)
        return linear.dequantize(self.unpacked(rows), scale, zero).flatten(1)[:, : self.columns]


class NF4Weight(PackedWeight):
    """``W = A * NF4_VALUES[Q]`` with a largest magnitude A for each block, itself stored in 8 bits."""

    scale_codes: Tensor
    scale_offset: Tensor
    scale_step: Tensor

    def __init__(self, matrix: Tensor, block_size: int) -> None:
        super().__init__((matrix.shape[0], matrix.shape[1]), 4, block_size)
        blocks = linear.blocks(matrix.detach().float(), block_size)
        codes, offset, step = nf4.scale_codes(blocks.abs().amax(dim=-1).flatten())
        absmax = nf4.scale_values(codes, offset, step).view(*blocks.shape[:2], 1)
        self.register_buffer("codes", pack(nf4.nf4_codes(blocks, absmax).flatten(1)[:, : self.columns], 4))
        self.register_buffer("scale_codes", codes.view(blocks.shape[:2]))
        self.register_buffer("scale_offset", offset)
        self.register_buffer("scale_step", step)

    def values(self, rows: Rows) -> Tensor:
        scales = _take(self.scale_codes, rows)
        count = self.scale_codes.shape[1]
        index = _take(torch.arange(self.rows, device=scales.device), rows)
        block = (index[:, None] * count + torch.arange(count, device=scales.device)) // nf4.SCALE_BLOCK
        absmax = nf4.scale_values(scales, self.scale_offset[block], self.scale_step[block])
        return nf4.nf4_values(self.unpacked(rows), absmax.unsqueeze(-1)).flatten(1)[:, : self.columns]


def _take(tensor: Tensor, rows: Rows) -> Tensor:
    """Some rows of a tensor; ids out of range raise, where indexing would count negative ones from the end."""
    return tensor[rows] if isinstance(rows, slice) else tensor.index_select(0, rows)
