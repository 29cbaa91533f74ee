"""Fake-quantizes weights of few bits while they train: torchao's QAT, one layer at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_compress.modules.isolation import isolated_random_state
from lightning_compress.modules.routing import Form
from lightning_compress.quantization.layers.packed_weight import LinearWeight
from lightning_compress.quantization.numerics import linear


def why_not(layer: nn.Module, symmetric: bool, group_size: int | None) -> str:
    """Say why a layer trains in float and is rounded afterwards only; empty if it can be fake-quantized."""
    if type(layer) not in (nn.Linear, nn.Embedding):
        return f"no fake-quantizer for the weights of {type(layer).__name__}"
    if isinstance(layer, nn.Embedding) and layer.sparse:
        return "torchao's fake-quantizer takes no sparse gradients"
    if not symmetric:
        return "torchao's fake-quantizer has no integer zero points"
    if layer.weight.dtype == torch.float64:
        return "torchao's fake-quantizer takes no float64"
    inputs: int = layer.weight[0].numel()  # type: ignore[index]
    if inputs % (group_size or 1):
        return f"its {inputs} inputs don't divide into groups of {group_size}"
    return ""


class FakeQuantized(Form):
    """Rounds a layer's weight in each forward and passes gradients straight through, in torchao's own layer.

    Its parameters are the layer's, the same objects. The scale is ``max|W| / (2^(bits-1) - 1/2)`` of each group, which
    clips the largest weights by at most half a step, in the bfloat16 in which it will be stored.
    """

    def __init__(self, layer: nn.Module, bits: int, group_size: int | None) -> None:
        from torchao.quantization import quantize_
        from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

        super().__init__()
        kind: dict[str, Any] = {"granularity": "per_channel"} if group_size is None else {"group_size": group_size}
        weights = IntxFakeQuantizeConfig(getattr(torch, f"int{bits}"), scale_precision=torch.bfloat16, **kind)
        config = QATConfig(weight_config=weights, step="prepare")
        holder = nn.ModuleDict({"layer": layer})
        with isolated_random_state():  # it makes a new layer first
            quantize_(holder, config, filter_fn=lambda module, _: module is layer)
        self.layer = holder["layer"]

    def forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for name, parameter in self.layer._parameters.items():
            value = getattr(module, name)  # another one after a move or a load; a computed one of a parametrized layer
            if value is not parameter:
                self.layer._parameters[name] = value
        if self.layer.training != module.training:
            self.layer.train(module.training)
        return self.layer(*args, **kwargs)


@torch.no_grad()
def trained_weight(form: FakeQuantized, layer: Any, bits: int, group_size: int | None) -> LinearWeight:
    """Return the weight of a fake-quantized layer in the codes that it trained with."""
    quantizer: Any = form.layer.weight_fake_quantizer
    rounded = quantizer(layer.weight).float()
    scale = quantizer.scale.float().view(len(rounded), -1)
    blocks = linear.blocks(rounded, group_size)  # they are codes times the scale already
    codes = linear.quantize(blocks, scale.unsqueeze(-1), torch.tensor(2.0 ** (bits - 1)), bits)
    return LinearWeight(layer.weight, codes.flatten(1), scale, None, bits, group_size)
