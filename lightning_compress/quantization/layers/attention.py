"""Quantized attention: its projections are quantized layers, what lies between them is computed in float."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lightning_compress.modules.attention import attend
from lightning_compress.quantization.layers.linear import DynamicLinear


class QuantizedAttention(nn.Module):
    """Attends as `nn.MultiheadAttention` in evaluation: ``W_o softmax(q k^T / sqrt(d) + mask) v`` in quantized layers.

    ``q, k, v = W_q x, W_k y, W_v z``. Queries that may attend to nothing get NaN with ``need_weights`` and the output
    bias without, as in torch's documented function; torch's fused path, which it takes without gradients, gives NaN
    for some of the latter too.

    Args:
        layer: float; it isn't changed.
        make: makes a quantized layer of the part with this name: ``in_proj.0`` to ``in_proj.2``, ``out_proj``.

    References:
        Vaswani et al., "Attention Is All You Need", 2017 (arXiv:1706.03762), section 3.2.
    """

    used = frozenset(("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias", "out_proj"))
    """Names of the float layer's tensors and children that it takes the place of."""
    whole = False
    """Whether queries, keys and values may come from one product."""

    def __init__(self, layer: nn.MultiheadAttention, make: Callable[[str, nn.Linear], nn.Module]) -> None:
        super().__init__()
        self.num_heads, self.batch_first = layer.num_heads, layer.batch_first
        # One for q, k and v, or, where key or value have a size of their own, three.
        self.in_proj = nn.ModuleList(
            make(f"in_proj.{index}", part) for index, part in enumerate(_projections(layer, self.whole))
        )
        self.out_proj = make("out_proj", _linear(layer.out_proj.weight, layer.out_proj.bias))
        self._thirds: list[nn.Module] | None = None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Do what `nn.MultiheadAttention.forward` does, with its shapes, and masks that are boolean or float.

        Raises:
            CompressionError: a mask has another shape or is neither boolean nor float, or is_causal without attn_mask.
        """
        attended, weights = attend(
            self._project(query, key, value),
            self.num_heads,
            self.batch_first,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        return self.out_proj(attended), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Return queries, keys and values, laid out as they came."""
        if len(self.in_proj) == 1 and query is key and key is value:
            return list(self.in_proj[0](query).chunk(3, dim=-1))
        projections: Any = self.in_proj
        if len(self.in_proj) == 1:
            if self._thirds is None:
                self._thirds = _thirds(self.in_proj[0])
            projections = self._thirds
        return [project(x) for project, x in zip(projections, (query, key, value), strict=True)]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._thirds = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_thirds": None}


class DynamicAttention(QuantizedAttention):
    """Attends with `DynamicLinear` projections, and in float32 between them.

    Example:
        >>> import torch
        >>> attention = DynamicAttention.from_float(nn.MultiheadAttention(16, 4, batch_first=True), reduce_range=False)
        >>> x = torch.randn(2, 5, 16)
        >>> output, weights = attention(x, x, x)
        >>> output.shape, weights.shape, attention.in_proj[0].weight.dtype
        (torch.Size([2, 5, 16]), torch.Size([2, 5, 5]), torch.int8)
    """

    whole = True

    @classmethod
    def from_float(cls, layer: nn.MultiheadAttention, reduce_range: bool, per_token: bool = False) -> DynamicAttention:
        """Return the dynamic form of an attention layer, on the CPU."""
        return cls(layer, lambda _, linear: DynamicLinear.from_float(linear, reduce_range, per_token))

    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        output, weights = super().forward(query, *args, **kwargs)
        return output.to(query.dtype), None if weights is None else weights.to(query.dtype)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        same = query is key and key is value
        query, key, value = (query.float(),) * 3 if same else (query.float(), key.float(), value.float())
        return super()._project(query, key, value)


def why_not(layer: nn.MultiheadAttention) -> str:
    """Say why a layer can have no quantized form; empty if it can."""
    if layer.bias_k is not None or layer.add_zero_attn:
        return "quantized attention adds no keys of its own (add_bias_kv, add_zero_attn)"
    return ""


def _projections(layer: nn.MultiheadAttention, whole: bool) -> list[nn.Linear]:
    weights: list[Tensor] = [layer.in_proj_weight]
    if layer.in_proj_weight is None:
        weights = [layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight]
    elif not whole:
        weights = [*layer.in_proj_weight.chunk(3)]
    biases = [None] * len(weights) if layer.in_proj_bias is None else layer.in_proj_bias.chunk(len(weights))
    return [_linear(weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a layer that shares the memory of its weight."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    linear.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)  # type: ignore[assignment]
    return linear


def _thirds(linear: nn.Module) -> list[nn.Module]:
    """Return the three projections that are packed in one, as layers of their own that share its memory."""
    thirds = []
    for index in range(3):
        third = copy.copy(linear)
        third._buffers = {
            name: None if buffer is None else buffer.chunk(3)[index] for name, buffer in linear._buffers.items()
        }
        thirds.append(third)
    return thirds
