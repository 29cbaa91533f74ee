"""What the tests look at in layers that are quantized one by one."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_compress.quantization.convert import record_of


def schemes(model: nn.Module) -> dict[str, str]:
    """Path to the scheme of each layer that has one of its own."""
    return {layer["path"]: layer["scheme"]["name"] for layer in (record_of(model) or {})["layers"]}


def count(model: nn.Module, kind: str) -> int:
    """How many modules are of the class with this name."""
    return sum(type(module).__name__ == kind for module in model.modules())


WEIGHT_ONLY, DYNAMIC = "int8_weight_only", "int8_dynamic"


def rounded(layer: Any) -> tuple[Tensor, Tensor]:
    """The weights that a quantized layer computes with, and the step of each row."""
    if isinstance(layer.weight, nn.Module):
        return layer.weight.values(slice(None)), layer.weight.scale.float()
    return layer.weight * layer.scale.view(-1, 1), layer.scale.view(-1, 1)
