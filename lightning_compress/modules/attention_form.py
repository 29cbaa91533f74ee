"""The form in which attention computes with projections of its own, whatever these are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_compress.modules.attention import attend
from lightning_compress.modules.routing import Form, StoredWeight

PACKED, _APART = "in_proj_weight", ("q_proj_weight", "k_proj_weight", "v_proj_weight")


class AttentionForm(Form):
    """Attends as `nn.MultiheadAttention` in evaluation: ``W_o softmax(q k^T / sqrt(d) + mask) v``.

    A subclass computes ``q, k, v = W_q x, W_k y, W_v z``, the projections. Queries that may attend to nothing get NaN
    with ``need_weights`` and the output bias without, as in torch's documented function; torch's fused path, which it
    takes without gradients, gives NaN for some of the latter too.

    Args:
        weights: of the projections, by the names of the layer's parameters.
        out_proj: computes the layer's ``out_proj``.

    References:
        Vaswani et al., "Attention Is All You Need", 2017 (arXiv:1706.03762), section 3.2.
    """

    def __init__(self, weights: Mapping[str, StoredWeight], out_proj: Form | None = None) -> None:
        super().__init__(weights)
        if out_proj is not None:
            self.inner["out_proj"] = out_proj

    def forward(
        self,
        module: Any,
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
        self.bind_(module)
        attended, weights = attend(
            self.projected(module, query, key, value),
            module.num_heads,
            module.batch_first,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        return module.out_proj(attended), weights

    def projected(self, module: Any, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Return queries, keys and values, laid out as they came."""
        bias, inputs, every = module._parameters["in_proj_bias"], (query, key, value), slice(None)
        if PACKED in self.weights and query is key and key is value:
            return list(self.part(3, query, PACKED, every, bias).chunk(3, dim=-1))
        thirds = [None] * 3 if bias is None else bias.chunk(3)
        if PACKED not in self.weights:
            parts = zip(_APART, inputs, thirds, strict=True)
            return [self.part(index, x, name, every, third) for index, (name, x, third) in enumerate(parts)]
        width = self.weights[PACKED].shape[0] // 3  # type: ignore[index]
        rows = [slice(width * index, width * (index + 1)) for index in range(3)]
        return [self.part(index, inputs[index], PACKED, rows[index], thirds[index]) for index in range(3)]

    def part(self, index: int, x: Tensor, name: str, rows: slice, bias: Tensor | None) -> Tensor:
        """Return a projection of ``x``: 0 to 2 for queries, keys and values, 3 for all three from one product."""
        raise NotImplementedError


def projections_of(layer: nn.MultiheadAttention) -> dict[str, Tensor]:
    """Return the weights of a layer's projections by their names: one for queries, keys and values, or three."""
    return {name: layer.get_parameter(name) for name in (PACKED, *_APART) if layer._parameters[name] is not None}
