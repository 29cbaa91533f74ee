"""Matrices of few bits: packed codes and scales, and the float values of any of their rows."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections import ChainMap
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.modules.routing import StoredWeight
from lightning_compress.modules.written import file_kernels
from lightning_compress.quantization.layers import int4_kernel
from lightning_compress.quantization.layers.kernel_cache import KernelCache
from lightning_compress.quantization.numerics import linear, nf4
from lightning_compress.quantization.numerics.nbits import kernel_block
from lightning_compress.quantization.numerics.operators import PACKED
from lightning_compress.quantization.numerics.packing import pack, unpack

Rows = slice | Tensor

_SAVED: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
"""Codes of weights as they were saved, for as long as somebody holds them."""


class PackedWeight(StoredWeight):
    """Stores a weight in few bits, as a matrix ``(rows, columns)``: `flatten(1)` of it. Blocks lie along the rows.

    Args:
        like: has the shape and type of the weight.
        bits: of a code.
        block_size: values with one scale; None is a scale for each row.
    """

    def __init__(self, like: Tensor, bits: int, block_size: int | None) -> None:
        super().__init__(like)
        self.rows, self.columns = like.flatten(1).shape
        self.bits = bits
        self.block_size = block_size

    @property
    def kind(self) -> str:
        return f"{self.bits} bits"

    @abstractmethod
    def values_of(self, rows: Rows) -> Tensor:
        """Return those rows as float32, ``(len(rows), columns)``."""

    def values(self) -> Tensor:
        return self.values_of(slice(None))

    def unpacked(self, rows: Rows) -> Tensor:
        """Return codes of those rows: uint8, ``(len(rows), columns)``."""
        return unpack(_take(self.codes, rows), self.bits, self.columns)

    def few_rows_product(self, x: Tensor, rows: slice) -> Tensor | None:
        """Return ``x W^T`` by a kernel for few rows of activations; None if it takes none of these, or of x."""
        return None

    def product_in_file(self, x: Tensor, rows: slice, bias: Tensor | None) -> Tensor | None:
        """Return ``x W^T + b`` by the operator that a file's runtime has a kernel for; None if it has none."""
        return None

    def tile_(self) -> None:
        """Bring codes into the order in which such a kernel reads them, if it takes this weight."""


class LinearWeight(PackedWeight):
    """Stores ``W = S (Q - Z)``: Q of 2 to 8 bits; for each block S in bfloat16 and, if asymmetric, Z of as many bits.

    Args:
        like: has the shape and type of W.
        codes: uint8, ``(rows, columns)``.
        scale: ``(rows, n_blocks)``.
        zero_point: ``(rows, n_blocks)``; None where it is ``2^(bits-1)``, which is symmetric quantization.
        bits: of a code.
        block_size: values with one scale; None is a scale for each row.
    """

    scale: Tensor
    zero_point: Tensor | None
    held = ("codes", "scale", "zero_point")

    def __init__(
        self,
        like: Tensor,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        bits: int,
        block_size: int | None,
    ) -> None:
        super().__init__(like, bits, block_size)
        self.tile = 0  # rows in a tile of codes, if these are in the kernel's order
        self._has_products = False
        self._kernel_scales = KernelCache()
        packed_zeros = None if zero_point is None else pack(zero_point.to(torch.uint8), bits)
        self.hold_(codes=pack(codes, bits), scale=scale.to(torch.bfloat16), zero_point=packed_zeros)

    @classmethod
    def nearest(cls, weight: Tensor, bits: int, block_size: int | None, symmetric: bool) -> LinearWeight:
        """Round ``weight`` to the nearest codes."""
        matrix = weight.detach().flatten(1).float()
        blocks = linear.blocks(matrix, block_size)
        scale, zero = linear.fitted_parameters(blocks, bits, symmetric)
        codes = linear.quantize(blocks, scale, zero, bits).flatten(1)[:, : matrix.shape[1]]
        return cls(weight, codes, scale.squeeze(-1), None if symmetric else zero.squeeze(-1), bits, block_size)

    @classmethod
    def joined(cls, like: Tensor, parts: Sequence[LinearWeight]) -> LinearWeight:
        """Join weights of the same columns, bits and blocks by their rows."""
        every, first = slice(None), parts[0]
        codes, scale = torch.cat([part.unpacked(every) for part in parts]), torch.cat([part.scale for part in parts])
        zero_point = None if first.zero_point is None else torch.cat([part._zeros(every) for part in parts])
        return cls(like, codes, scale, zero_point, first.bits, first.block_size)

    def _zeros(self, rows: Rows) -> Tensor:
        """Return zero points of those rows: ``(len(rows), n_blocks)``, or one for all."""
        if self.zero_point is None:
            return torch.full((1, 1), 2 ** (self.bits - 1), device=self.scale.device)
        return unpack(_take(self.zero_point, rows), self.bits, self.scale.shape[1])

    def values_of(self, rows: Rows) -> Tensor:
        scale = _take(self.scale, rows).float().unsqueeze(-1)
        zero = self._zeros(rows).unsqueeze(-1)
        blocks = linear.blocks(self.unpacked(rows), self.block_size)
        return linear.dequantize(blocks, scale, zero).flatten(1)[:, : self.columns]

    # The kernel's order of codes. Files have rows: another CPU's kernel reads other tiles.

    def unpacked(self, rows: Rows) -> Tensor:
        if not self.tile:
            return super().unpacked(rows)
        if isinstance(rows, Tensor):
            return int4_kernel.some_untiled(self.codes, rows, self.tile)
        start, stop, _ = rows.indices(self.rows)
        first = start - start % self.tile
        codes = int4_kernel.untiled(self.codes[first : stop + -stop % self.tile], self.tile)
        return codes[start - first : stop - first]

    def tile_(self) -> None:
        self._has_products = True
        if self.tile or self.bits != 4 or self.codes.device.type != "cpu" or self.codes.is_inference():
            return
        if int4_kernel.kernel_group(self.rows, self.columns, self.block_size):
            with torch.inference_mode(False), torch.no_grad():
                self.codes.data = int4_kernel.tiled(self.unpacked(slice(None)), int4_kernel.tile_rows())
            self.tile = int4_kernel.tile_rows()

    def few_rows_product(self, x: Tensor, rows: slice) -> Tensor | None:
        start, stop, _ = rows.indices(self.rows)
        if not self.tile or self.tile != int4_kernel.tile_rows() or start % self.tile or stop % self.tile:
            return None
        if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
            return None
        group = int4_kernel.kernel_group(self.rows, self.columns, self.block_size)
        repeat = (self.block_size or self.columns) // group
        scales: Tensor = self._kernel_scales.made(
            [self.scale, *(() if self.zero_point is None else (self.zero_point,))],
            [],
            lambda: int4_kernel.scales_and_zeros(self.scale.float(), self._zeros(slice(None)), repeat),
        )
        return int4_kernel.product(x, self.codes[rows], group, scales[:, rows].contiguous())

    def product_in_file(self, x: Tensor, rows: slice, bias: Tensor | None) -> Tensor | None:
        if not (kernels := file_kernels()) or self.bits > 4 or x.dim() < 2:
            return None  # of more bits, a runtime is as fast with the floats that it makes of codes when it loads them
        if (block := kernel_block(self.columns, self.block_size)) is None:
            return None
        scale, zero = _take(self.scale, rows).float(), None if self.zero_point is None else self._zeros(rows)
        rounds = block if kernels == "onnxruntime" else 0
        size, bias = self.block_size or self.columns, None if bias is None else bias.float()
        y: Tensor = PACKED(x.float(), self.unpacked(rows), scale, zero, bias, self.bits, size, rounds)
        return y.to(x.dtype)

    def saved(self) -> dict[str, Tensor]:
        if not self.tile:
            return super().saved()
        codes, before = pack(self.unpacked(slice(None)), self.bits).detach(), _SAVED.get(self, lambda: None)()
        if before is not None and torch.equal(codes, before):
            codes = before  # for another layer that has this weight
        _SAVED[self] = weakref.ref(codes)
        return super().saved() | {"codes": codes}

    def load_(self, name: str, state: Mapping[str, Any], prefix: str, *found: list[str]) -> None:
        codes = state.get(prefix + name)
        if self.tile and codes is not None and codes.shape == self.codes.shape and codes.dtype == torch.uint8:
            tiles = int4_kernel.tiled(unpack(codes, self.bits, self.columns), self.tile)
            state = ChainMap({prefix + name: tiles}, state)  # type: ignore[arg-type]
        super().load_(name, state, prefix, *found)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if self._has_products:
            self.tile_()
        return self


class NF4Weight(PackedWeight):
    """Stores ``W = A * NF4_VALUES[Q]`` with a largest magnitude A for each block, itself in 8 bits."""

    scale_codes: Tensor
    scale_offset: Tensor
    scale_step: Tensor
    held = ("codes", "scale_codes", "scale_offset", "scale_step")

    def __init__(self, weight: Tensor, block_size: int) -> None:
        super().__init__(weight, 4, block_size)
        blocks = linear.blocks(weight.detach().flatten(1).float(), block_size)
        codes, offset, step = nf4.scale_codes(blocks.abs().amax(dim=-1).flatten())
        absmax = nf4.scale_values(codes, offset, step).view(*blocks.shape[:2], 1)
        packed = pack(nf4.nf4_codes(blocks, absmax).flatten(1)[:, : self.columns], 4)
        self.hold_(codes=packed, scale_codes=codes.view(blocks.shape[:2]), scale_offset=offset, scale_step=step)

    def values_of(self, rows: Rows) -> Tensor:
        scales = _take(self.scale_codes, rows)
        count = self.scale_codes.shape[1]
        index = _take(torch.arange(self.rows, device=scales.device), rows)
        block = (index[:, None] * count + torch.arange(count, device=scales.device)) // nf4.SCALE_BLOCK
        absmax = nf4.scale_values(scales, self.scale_offset[block], self.scale_step[block])
        blocks = linear.blocks(self.unpacked(rows), self.block_size)
        return nf4.nf4_values(blocks, absmax.unsqueeze(-1)).flatten(1)[:, : self.columns]


def _take(tensor: Tensor, rows: Rows) -> Tensor:
    """Return some rows of a tensor; ids out of range raise, where indexing would count negative ones from the end."""
    return tensor[rows] if isinstance(rows, slice) else tensor.index_select(0, rows)
