"""Matrices of few bits: packed codes and scales, and the float values of any of their rows."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.quantization.layers import int4_kernel
from lightning_compress.quantization.numerics import linear, nf4
from lightning_compress.quantization.numerics.packing import pack, unpack

Rows = slice | Tensor


class PackedWeight(nn.Module):
    """Stores a matrix ``(rows, columns)`` in few bits; blocks lie along the rows, the input dimension.

    Its tensors move and are saved with the module, but are no buffers: whoever averages a model's buffers would average
    codes. Scales keep their own type, whatever the model is cast to.
    """

    codes: Tensor
    held: tuple[str, ...]
    """Names of its tensors."""

    def __init__(self, shape: tuple[int, int], bits: int, block_size: int | None) -> None:
        super().__init__()
        self.rows, self.columns = shape
        self.bits = bits
        self.block_size = block_size

    @abstractmethod
    def values(self, rows: Rows) -> Tensor:
        """Return those rows as float32, ``(len(rows), columns)``."""

    def forward(self) -> Tensor:
        """Return the whole matrix in float32."""
        return self.values(slice(None))

    def unpacked(self, rows: Rows) -> Tensor:
        """Return codes of those rows: uint8, ``(len(rows), columns)``."""
        return unpack(_take(self.codes, rows), self.bits, self.columns)

    def few_rows_product(self, x: Tensor) -> Tensor | None:
        """Return ``x W^T`` by a kernel for few rows of activations; None if there is none for this weight, or here."""
        return None

    def tensors(self) -> dict[str, Tensor]:
        """Return what it holds, by name."""
        found = {name: getattr(self, name) for name in self.held}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        for name, tensor in self.tensors().items():
            moved: Tensor = fn(tensor)
            setattr(self, name, moved if moved.dtype == tensor.dtype else tensor.to(moved.device))
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination.update((prefix + name, tensor) for name, tensor in self.tensors().items())

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for name, tensor in self.tensors().items():
            value = state_dict.get(prefix + name)
            if value is None:
                missing_keys.append(prefix + name)
            elif value.shape != tensor.shape or value.dtype != tensor.dtype:
                own, other = (f"{tuple(values.shape)} of {values.dtype}" for values in (tensor, value))
                error_msgs.append(f"size mismatch for {prefix}{name}: {other} in the checkpoint, {own} in the model.")
            else:
                setattr(self, name, value.to(tensor.device, copy=True))

    def extra_repr(self) -> str:
        blocks = "" if self.block_size is None else f", block_size={self.block_size}"
        return f"{self.rows} x {self.columns}, bits={self.bits}{blocks}"

    def __len__(self) -> int:
        return self.rows


class LinearWeight(PackedWeight):
    """Stores ``W = S (Q - Z)``: Q of 2 to 8 bits; for each block S in bfloat16 and, if asymmetric, Z of as many bits.

    Args:
        codes: uint8, ``(rows, columns)``.
        scale: ``(rows, n_blocks)``.
        zero: ``(rows, n_blocks)``; None where it is ``2^(bits-1)``, which is symmetric quantization.
        bits: of a code.
        block_size: values with one scale; None is a scale for each row.
    """

    scale: Tensor
    zero: Tensor | None
    held = ("codes", "scale", "zero")

    def __init__(self, codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, block_size: int | None) -> None:
        super().__init__((codes.shape[0], codes.shape[1]), bits, block_size)
        self.codes = pack(codes, bits)
        self.scale = scale.to(torch.bfloat16)
        self.zero = None if zero is None else pack(zero.to(torch.uint8), bits)
        self._kernel_scales: Tensor | None = None

    @classmethod
    def nearest(cls, matrix: Tensor, bits: int, block_size: int | None, symmetric: bool) -> LinearWeight:
        """Round ``matrix`` to the nearest codes."""
        blocks = linear.blocks(matrix.detach().float(), block_size)
        scale, zero = linear.fitted_parameters(blocks, bits, symmetric)
        codes = linear.quantize(blocks, scale, zero, bits).flatten(1)[:, : matrix.shape[1]]
        return cls(codes, scale.squeeze(-1), None if symmetric else zero.squeeze(-1), bits, block_size)

    def _zeros(self, rows: Rows) -> Tensor:
        """Return zero points of those rows: ``(len(rows), n_blocks)``, or one for all."""
        if self.zero is None:
            return torch.full((1, 1), 2 ** (self.bits - 1), device=self.scale.device)
        return unpack(_take(self.zero, rows), self.bits, self.scale.shape[1])

    def values(self, rows: Rows) -> Tensor:
        scale = _take(self.scale, rows).float().unsqueeze(-1)
        zero = self._zeros(rows).unsqueeze(-1)
        blocks = linear.blocks(self.unpacked(rows), self.block_size)
        return linear.dequantize(blocks, scale, zero).flatten(1)[:, : self.columns]

    # The kernel's order of codes: taken when it is first of use, left for all that isn't a product.

    def unpacked(self, rows: Rows) -> Tensor:
        if self._kernel_scales is None:
            return super().unpacked(rows)
        size = int4_kernel.tile_rows()
        if isinstance(rows, Tensor):
            return int4_kernel.some_untiled(self.codes, rows, size)
        start, stop, _ = rows.indices(self.rows)
        first = start - start % size
        codes = int4_kernel.untiled(self.codes[first : stop + -stop % size], size)
        return codes[start - first : stop - first]

    def few_rows_product(self, x: Tensor) -> Tensor | None:
        if self.bits != 4 or x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
            return None
        group = int4_kernel.kernel_group(self.rows, self.columns, self.block_size)
        if not group:
            return None
        if self._kernel_scales is None:
            count = (self.block_size or self.columns) // group
            with torch.inference_mode(False), torch.no_grad():
                codes = super().unpacked(slice(None))
                self._kernel_scales = int4_kernel.scales_and_zeros(self.scale.float(), self._zeros(slice(None)), count)
                self.codes = int4_kernel.tiled(codes, int4_kernel.tile_rows())
        return int4_kernel.product(x, self.codes, group, self._kernel_scales)

    def _in_rows(self) -> None:
        if self._kernel_scales is not None:
            with torch.inference_mode(False), torch.no_grad():
                self.codes = pack(self.unpacked(slice(None)), self.bits)
            self._kernel_scales = None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._in_rows()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._in_rows()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._in_rows()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        self._in_rows()
        return self.__dict__


class NF4Weight(PackedWeight):
    """Stores ``W = A * NF4_VALUES[Q]`` with a largest magnitude A for each block, itself in 8 bits."""

    held = ("codes", "scale_codes", "scale_offset", "scale_step")

    def __init__(self, matrix: Tensor, block_size: int) -> None:
        super().__init__((matrix.shape[0], matrix.shape[1]), 4, block_size)
        blocks = linear.blocks(matrix.detach().float(), block_size)
        codes, offset, step = nf4.scale_codes(blocks.abs().amax(dim=-1).flatten())
        absmax = nf4.scale_values(codes, offset, step).view(*blocks.shape[:2], 1)
        self.codes = pack(nf4.nf4_codes(blocks, absmax).flatten(1)[:, : self.columns], 4)
        self.scale_codes = codes.view(blocks.shape[:2])
        self.scale_offset, self.scale_step = offset, step

    def values(self, rows: Rows) -> Tensor:
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
