"""Quantized attention: its projections are quantized, what lies between them is computed in float."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_compress.modules.attention_form import AttentionForm
from lightning_compress.modules.routing import StoredWeight
from lightning_compress.quantization.layers.linear import DynamicLinear, DynamicProduct
from lightning_compress.quantization.layers.packed import PackedLinear, product
from lightning_compress.quantization.layers.packed_weight import PackedWeight


class DynamicAttention(AttentionForm):
    """Attends with dynamic int8 projections, and in float32 between them."""

    def __init__(self, weights: Mapping[str, StoredWeight], out_proj: DynamicLinear, per_token: bool = False) -> None:
        super().__init__(weights, out_proj)
        self.products = nn.ModuleList(DynamicProduct(per_token) for _ in range(4))

    def forward(self, module: Any, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        output, weights = super().forward(module, query, *args, **kwargs)
        return output.to(query.dtype), None if weights is None else weights.to(query.dtype)

    def projected(self, module: Any, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        same = query is key and key is value
        query, key, value = (query.float(),) * 3 if same else (query.float(), key.float(), value.float())
        return super().projected(module, query, key, value)

    def part(self, index: int, x: Tensor, name: str, rows: slice, bias: Tensor | None) -> Tensor:
        projection: Tensor = self.products[index](x, self.weights[name], bias, rows)
        return projection


class PackedAttention(AttentionForm):
    """Attends with weights of few bits."""

    weights: Mapping[str, PackedWeight]  # type: ignore[assignment]

    def __init__(self, weights: Mapping[str, PackedWeight], out_proj: PackedLinear) -> None:
        super().__init__(weights, out_proj)
        for weight in self.weights.values():
            weight.tile_()

    def part(self, index: int, x: Tensor, name: str, rows: slice, bias: Tensor | None) -> Tensor:
        return product(x, self.weights[name], bias, rows)


def why_not(layer: nn.MultiheadAttention) -> str:
    """Say why a layer can have no quantized form; empty if it can."""
    if layer.bias_k is not None or layer.add_zero_attn:
        return "quantized attention adds no keys of its own (add_bias_kv, add_zero_attn)"
    return ""
