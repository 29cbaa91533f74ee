"""Fake-quantizes weights of few bits while they train: torchao's QAT, one layer at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_compress.modules.isolation import isolated_random_state
from lightning_compress.quantization.layers.packed import matrix_of
from lightning_compress.quantization.layers.packed_weight import LinearWeight
from lightning_compress.quantization.numerics import linear
from lightning_compress.quantization.schemes import Scheme, WeightOnly


def why_float(layer: nn.Module, scheme: Scheme) -> str:
    """Why a layer trains in float and is rounded afterwards only; empty if it can be fake-quantized."""
    if not isinstance(scheme, WeightOnly):
        return f"no fake-quantizer for {scheme.name}"
    if type(layer) not in (nn.Linear, nn.Embedding):
        return f"no fake-quantizer for the weights of {type(layer).__name__}"
    if isinstance(layer, nn.Embedding) and layer.sparse:
        return "torchao's fake-quantizer takes no sparse gradients"
    if not scheme.symmetric:
        return "torchao's fake-quantizer has no integer zero points"
    if layer.weight.dtype == torch.float64:
        return "torchao's fake-quantizer takes no float64"
    if matrix_of(layer).shape[1] % (scheme.group_size or 1):
        return f"its {matrix_of(layer).shape[1]} inputs don't divide into groups of {scheme.group_size}"
    return ""


def fake_quantized(layer: nn.Module, scheme: WeightOnly) -> nn.Module:
    """``layer`` as one that rounds its weight in each forward and passes gradients straight through.

    The parameters stay the same objects. The scale is ``max|W| / (2^(bits-1) - 1/2)`` of each group, which clips the
    largest weights by at most half a step, in the bfloat16 in which it will be stored.
    """
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    kind: dict[str, Any] = {"granularity": "per_channel"}
    if scheme.group_size is not None:
        kind = {"group_size": scheme.group_size}
    weights = IntxFakeQuantizeConfig(getattr(torch, f"int{scheme.bits}"), scale_precision=torch.bfloat16, **kind)
    holder = nn.ModuleDict({"layer": layer})
    with isolated_random_state():  # it makes a new layer first
        quantize_(holder, QATConfig(weight_config=weights, step="prepare"), filter_fn=lambda module, _: module is layer)
    return holder["layer"]


@torch.no_grad()
def trained_weight(fake: Any, scheme: WeightOnly) -> LinearWeight:
    """The weight of a fake-quantized layer in the codes that it trained with."""
    rounded = fake.weight_fake_quantizer(fake.weight).float()
    scale = fake.weight_fake_quantizer.scale.float().view(len(rounded), -1)
    blocks = linear.blocks(rounded, scheme.group_size)  # they are codes times the scale already
    codes = linear.quantize(blocks, scale.unsqueeze(-1), torch.tensor(2.0 ** (scheme.bits - 1)), scheme.bits)
    return LinearWeight(codes.flatten(1), scale, None, scheme.bits, scheme.group_size)
