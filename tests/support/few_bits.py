"""Weights of few bits, read slowly: from the bytes that are stored, by the documented layout, in numpy and float64."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_compress.quantization.convert import record_of

NF4_CONSTANTS = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]
"""As published: Dettmers et al., "QLoRA", 2023, appendix E."""


def unpack_slowly(packed: np.ndarray[Any, Any], bits: int, length: int) -> np.ndarray[Any, Any]:
    """Codes ``(rows, length)`` of packed ``(rows, n_bytes)``, one after the other.

    The bits of a code lie in planes of 4, 2 and 1 (or 8), the widest with the lowest bits first. In a plane of ``n``
    bytes, code ``i`` lies in byte ``i mod n``, and the higher there the larger ``i`` is.
    """
    count = packed.shape[1] * 8 // bits
    codes = np.zeros((packed.shape[0], count), dtype=np.int64)
    start = shift = 0
    for width in (8, 4, 2, 1):
        if bits & width:
            size = count * width // 8
            for i in range(count):
                byte = packed[:, start + i % size].astype(np.int64)
                codes[:, i] |= ((byte >> (i // size * width)) & (2**width - 1)) << shift
            start, shift = start + size, shift + width
    return codes[:, :length]


def decode(state: dict[str, Tensor], scheme: dict[str, Any], columns: int) -> Tensor:
    """The float64 matrix of one packed weight, from its state and the plain description of its scheme."""
    arrays = {key: value.double().numpy() for key, value in state.items() if value.is_floating_point()}
    arrays |= {key: value.numpy() for key, value in state.items() if not value.is_floating_point()}
    bits = scheme.get("bits", 4)
    codes = unpack_slowly(arrays["codes"], bits, columns)
    rows = len(codes)
    values = np.zeros((rows, columns))
    if scheme["class"] == "NF4":
        n_blocks = arrays["scale_codes"].shape[1]
        for row, column in np.ndindex(rows, columns):
            block = row * n_blocks + column // scheme["block_size"]
            step, offset = arrays["scale_step"][block // 256], arrays["scale_offset"][block // 256]
            scale = np.exp(offset + step * arrays["scale_codes"].flat[block])
            values[row, column] = scale * NF4_CONSTANTS[codes[row, column]]
        return torch.from_numpy(values)
    size = scheme["group_size"] or columns
    zeros = np.full_like(arrays["scale"], 2 ** (bits - 1))
    if not scheme["symmetric"]:
        zeros = unpack_slowly(arrays["zero_point"], bits, arrays["scale"].shape[1])
    for row, column in np.ndindex(rows, columns):
        block = row, column // size
        values[row, column] = arrays["scale"][block] * (codes[row, column] - zeros[block])
    return torch.from_numpy(values)


def stored(state: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    """What a state dict has of the weight called ``key``: codes under its own name, the rest beside it."""
    beside = {name.removeprefix(f"{key}_"): value for name, value in state.items() if name.startswith(f"{key}_")}
    return {"codes": state[key], **beside}


def rounded(model: nn.Module, quantized: nn.Module) -> nn.Module:
    """A copy of the float ``model`` whose weights are what ``quantized`` stores."""
    twin, state = copy.deepcopy(model).eval(), quantized.state_dict()
    for layer in (record_of(quantized) or {})["layers"]:
        for name, weight in twin.get_submodule(layer["path"]).named_parameters(prefix=layer["path"]):
            if weight.dim() > 1:
                values = decode(stored(state, name), layer["scheme"], weight.flatten(1).shape[1])
                weight.data.copy_(values.view(weight.shape))
    return twin
