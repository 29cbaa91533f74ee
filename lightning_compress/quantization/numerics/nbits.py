"""Codes of few bits in the order of ``MatMulNBits``, which onnxruntime and OpenVINO multiply with as they are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

LEAST_BLOCK, MOST_BLOCK = 16, 256


def kernel_block(columns: int, block_size: int | None) -> int | None:
    """Return the columns with one scale in such a kernel, a power of two; None where it has none for these blocks.

    Example:
        >>> kernel_block(384, 96), kernel_block(384, None), kernel_block(100, None), kernel_block(100, 20)
        (32, 128, 32, None)
    """
    if block_size is None or block_size >= columns:
        fits = min(columns & -columns, MOST_BLOCK)
        return fits if fits >= LEAST_BLOCK else 32  # the last block is filled up
    fits = min(block_size & -block_size, MOST_BLOCK)
    return fits if fits >= LEAST_BLOCK else None


def kernel_codes(
    codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, block_size: int
) -> tuple[Tensor, Tensor, Tensor | None, dict[str, int]]:
    """Return codes, scales and zero points as the kernel takes them, and its attributes.

    Args:
        codes: uint8 ``(rows, columns)``, below ``2^bits``.
        scale: float32 ``(rows, n_blocks)``.
        zero: of the shape of ``scale``; None where it is ``2^(bits-1)``.
        bits: 2 to 4, of which 3 are stored in 4.
        block_size: columns with one scale.
    """
    rows, columns = codes.shape
    block, width = kernel_block(columns, block_size), 2 if bits == 2 else 4
    assert block is not None
    middle, shift = 2 ** (width - 1), 2 ** (width - 1) - 2 ** (bits - 1)
    count = -(-columns // block)
    filled = functional.pad(codes + shift, (0, count * block - columns), value=middle)
    repeat = count if block_size >= columns else block_size // block
    scales = scale.float().repeat_interleave(repeat, 1)[:, :count].contiguous()
    zeros = None if zero is None else _packed((zero + shift).repeat_interleave(repeat, 1)[:, :count], width)
    attributes = {"K": columns, "N": rows, "bits": width, "block_size": block}
    return _packed(filled.view(rows, count, block), width), scales, zeros, attributes


def _packed(codes: Tensor, width: int) -> Tensor:
    """Pack the last dimension, the first code lowest in its byte."""
    count = 8 // width
    parts = functional.pad(codes, (0, -codes.shape[-1] % count)).to(torch.uint8).unflatten(-1, (-1, count)).unbind(-1)
    packed: Tensor = parts[0].clone()
    for index, part in enumerate(parts[1:], start=1):
        packed |= part << (index * width)
    return packed
