"""Draws the picture of docs/fewer_bits.md: 4 bits with one scale, one for each row, one for each block of 32 weights.

A few weights are twenty times larger than the rest, as in trained transformers. With one scale they leave little to
the others; with blocks each spoils only its own.
"""

from __future__ import annotations

import sys

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import LogNorm

from lightning_compress.quantization.numerics.linear import blocks, dequantize, parameters, quantize

weights = torch.randn(32, 256, generator=torch.Generator().manual_seed(1))
for row, column in ((3, 40), (11, 200), (12, 90), (25, 143)):
    weights[row, column] *= 20 / weights[row, column].abs()
usual = weights.abs() < 10

shapes = {
    "one scale": weights.view(1, -1),
    "one for each row": weights,
    "one for each block of 32": blocks(weights, 32),
}
figure, axes = plt.subplots(len(shapes), 1, figsize=(8, 5), sharex=True, layout="constrained")
for axis, (name, values) in zip(axes, shapes.items(), strict=True):
    scale, zero = parameters(values, bits=4, symmetric=True)
    rounded = dequantize(quantize(values, scale, zero, bits=4), scale, zero).view_as(weights)
    error = (rounded - weights).abs()
    share = (error[usual].square().sum() / weights[usual].square().sum()).sqrt()
    image = axis.imshow(error.clamp_min(1e-2).numpy(), norm=LogNorm(1e-2, 3), cmap="viridis", aspect="auto")
    axis.set_title(f"{name}: error of the usual weights {share:.0%}", loc="left", fontsize=10)
    axis.set_ylabel("output")
    print(f"{name}: relative error of the usual weights {share:.3f}")
axes[-1].set_xlabel("input")
figure.colorbar(image, ax=axes, label="|rounded - weight|, where weights have deviation 1")
figure.savefig(sys.argv[1] if len(sys.argv) > 1 else "scales.png", dpi=110)
