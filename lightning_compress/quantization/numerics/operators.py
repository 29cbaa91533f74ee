"""Operators that stand for roundings and stored weights in a graph that becomes a file; they run in torch too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightning_compress.quantization.numerics import linear


def rounded_values(x: Tensor, scale: float, zero_point: int, low: int, high: int) -> Tensor:
    """Return ``(clamp(round(x / scale) + zero_point, low, high) - zero_point) * scale``."""
    return ((torch.round(x * (1.0 / scale)) + zero_point).clamp(low, high) - zero_point) * scale


def stored_values(codes: Tensor, scale: Tensor) -> Tensor:
    """Return ``S Q``, with a scale for each of the first dimension."""
    return codes * scale.view(-1, *(1,) * (codes.dim() - 1))


rounded = torch.library.custom_op("lightning_compress::rounded", rounded_values, mutates_args=())
stored = torch.library.custom_op("lightning_compress::stored", stored_values, mutates_args=())


@torch.library.custom_op("lightning_compress::dynamic", mutates_args=())
def dynamic(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, rounds: bool) -> Tensor:
    """Return ``x (S Q)^T + b``; with ``rounds``, of ``x`` in 8 bits, by one scale and zero point for all of it."""
    if not rounds or not x.numel():
        return functional.linear(x, stored(codes, scale), bias)
    low, high = x.amin().clamp(max=0.0), x.amax().clamp(min=0.0)
    step = torch.where(low == high, 1.0, (high - low) / 255)
    zero = (-low / step).round().clamp(0, 255)
    integers = ((x / step).round() + zero).clamp(0, 255) - zero
    y = (integers.double() @ codes.T.double()).float() * (step * scale)  # the integers of int32, exactly
    return y if bias is None else y + bias


@torch.library.custom_op("lightning_compress::packed", mutates_args=())
def packed(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    block: int,
    rounds: int,
) -> Tensor:
    """Return ``x (S (Q - Z))^T + b``; with ``rounds``, of ``x`` in 8 bits, by a scale for so many columns of a row."""
    if rounds:
        blocks = linear.blocks(x.flatten(0, -2), rounds)
        step = blocks.abs().amax(dim=-1, keepdim=True) / 127
        blocks = (blocks * torch.where(step == 0, 0.0, 1.0 / step)).round() * step
        x = blocks.flatten(1)[:, : x.shape[-1]].view(x.shape)
    zeros = torch.full_like(scale, 2 ** (bits - 1)) if zero is None else zero
    weight = linear.dequantize(linear.blocks(codes, block), scale.unsqueeze(-1), zeros.unsqueeze(-1))
    return functional.linear(x, weight.flatten(1)[:, : codes.shape[1]], bias)


@torch.library.custom_op("lightning_compress::lstm", mutates_args=())
def lstm(
    x: Tensor, codes: Sequence[Tensor], scales: Sequence[Tensor], biases: Sequence[Tensor], h: Tensor, c: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute a layer of `torch.lstm` on ``(T, N, input_size)``, with the sequence and each state in 8 bits.

    Weights and biases are those of the input and of the state, and both once more where there is a reverse direction.
    """
    outputs, lasts = [], []
    for reverse, (hidden, cell) in enumerate(zip(h, c, strict=True)):
        of_input, of_state = 2 * reverse, 2 * reverse + 1
        gates = dynamic(x, codes[of_input], scales[of_input], biases[of_input], True) + biases[of_state]
        steps = []
        for step in gates.flip(0) if reverse else gates:
            found = step + dynamic(hidden, codes[of_state], scales[of_state], None, True)
            enter, forget, candidate, leave = found.chunk(4, dim=-1)
            cell = forget.sigmoid() * cell + enter.sigmoid() * candidate.tanh()
            hidden = leave.sigmoid() * cell.tanh()
            steps.append(hidden)
        outputs.append(torch.stack(steps[::-1] if reverse else steps))
        lasts.append((hidden, cell))
    hs, cs = zip(*lasts, strict=True)
    return torch.cat(outputs, dim=-1), torch.stack(hs), torch.stack(cs)


@rounded.register_fake
def _(x: Tensor, scale: float, zero_point: int, low: int, high: int) -> Tensor:
    return torch.empty_like(x)


@stored.register_fake
def _(codes: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(codes, dtype=scale.dtype)


@dynamic.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, rounds: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


@packed.register_fake
def _(x: Tensor, codes: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


@lstm.register_fake
def _(x: Tensor, codes: Any, scales: Any, biases: Any, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(*x.shape[:2], h.shape[0] * h.shape[2]), torch.empty_like(h), torch.empty_like(c)


ROUNDED = torch.ops.lightning_compress.rounded.default
STORED = torch.ops.lightning_compress.stored.default
DYNAMIC = torch.ops.lightning_compress.dynamic.default
PACKED = torch.ops.lightning_compress.packed.default
LSTM = torch.ops.lightning_compress.lstm.default
