"""Packing: codes of 1 to 8 bits without a bit between them.

A code is split into planes of 4, 2 and 1 bits as its width in binary says (3 = 2 + 1); each plane fills whole bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def packed_length(length: int, bits: int) -> int:
    """Return the bytes that ``length`` codes take, filled up with zeros until each plane ends with a byte.

    Example:
        >>> packed_length(128, 4), packed_length(128, 3), packed_length(9, 2), packed_length(9, 8)
        (64, 48, 3, 9)
    """
    return (length + _missing(length, bits)) * bits // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack the last dimension of ``codes``.

    Args:
        codes: uint8, below ``2^bits``, ``(..., length)``.
        bits: 1 to 8.

    Returns:
        uint8, ``(..., packed_length(length, bits))``.

    Example:
        >>> pack(torch.tensor([1, 2, 3, 0, 1, 2, 3, 0], dtype=torch.uint8), bits=2).tolist()
        [221, 34]
    """
    padded = functional.pad(codes, (0, _missing(codes.shape[-1], bits)))
    planes = []
    for width, shift in _planes(bits):
        # Code i of a plane shares its byte with code i + n/k, so that either way moves whole runs of bytes.
        parts = ((padded >> shift) & (2**width - 1)).unflatten(-1, (8 // width, -1)).unbind(-2)
        plane = parts[0].clone()
        for index, part in enumerate(parts[1:], start=1):
            plane |= part << (index * width)
        planes.append(plane)
    return planes[0] if len(planes) == 1 else torch.cat(planes, dim=-1)


def unpack(packed: Tensor, bits: int, length: int) -> Tensor:
    """Return the ``length`` codes that `pack` packed, as uint8.

    Example:
        >>> unpack(torch.tensor([221, 34], dtype=torch.uint8), bits=2, length=6).tolist()
        [1, 2, 3, 0, 1, 2]
    """
    start, codes = 0, None
    for width, shift in _planes(bits):
        stop = start + packed.shape[-1] * width // bits
        plane, start = packed[..., start:stop], stop
        values = plane
        if width < 8:
            values = (
                torch.cat([shifted_right(plane, index * width) for index in range(8 // width)], dim=-1) & 2**width - 1
            )
        # Products and sums, as ONNX has no shift to the left that is right for bytes.
        values = values * 2**shift if shift else values
        codes = values if codes is None else codes + values
    assert codes is not None
    return codes[..., :length]


def shifted_right(bytes_: Tensor, places: int) -> Tensor:
    """Return ``bytes_ >> places``, also in a file for another runtime."""
    if not places:
        return bytes_
    # ONNX takes what is shifted for signed, and OpenVINO rounds quotients of bytes; dividing is many times slower here.
    return (bytes_.int() // 2**places).to(torch.uint8) if is_recorded() else bytes_ >> places


def is_recorded() -> bool:
    """Tell whether a run is being written down for elsewhere: by `torch.export`, `torch.onnx` or `torch.jit.trace`."""
    return torch.compiler.is_exporting() or bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def _missing(length: int, bits: int) -> int:
    """Return codes that are missing to whole bytes in the narrowest plane."""
    return -length % (8 // (bits & -bits))


def _planes(bits: int) -> list[tuple[int, int]]:
    """Return width and lowest bit of each plane, widest first."""
    widths = [width for width in (8, 4, 2, 1) if bits & width]
    return [(width, sum(widths[:index])) for index, width in enumerate(widths)]
