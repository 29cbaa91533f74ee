"""Runs `nn.MultiheadAttention` with fewer heads than its width asks for, which torch's own forward can't."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.errors import CompressionError
from lightning_compress.modules.attention import attend


class NarrowAttention(nn.MultiheadAttention):
    """The same layer with some heads taken out: ``W_o`` is ``(embed_dim, num_heads * head_dim)``.

    A layer becomes one when its heads are cut (`narrow_`); names and meaning of its parameters stay.
    """

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
        """As `nn.MultiheadAttention.forward`.

        Raises:
            CompressionError: the layer adds keys and values of its own.
        """
        if self.bias_k is not None or self.add_zero_attn:
            raise CompressionError("attention that adds keys of its own (add_bias_kv, add_zero_attn) can't lose heads")
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        projected = [F.linear(*operands) for operands in zip((query, key, value), weights, biases, strict=True)]
        attended, shown = attend(
            projected,
            self.num_heads,
            self.batch_first,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
            dropout=self.dropout if self.training else 0.0,
        )
        return F.linear(attended, self.out_proj.weight, self.out_proj.bias), shown


def _narrow(kind: type[nn.MultiheadAttention]) -> type[nn.MultiheadAttention]:
    """Return the class derived from `NarrowAttention` too: what it does around torch's forward stays."""
    if kind is nn.MultiheadAttention:
        return NarrowAttention

    def reduce(layer: nn.MultiheadAttention) -> tuple[Any, ...]:  # a pickle finds only `kind` by its name
        return _blank, (kind,), layer.__dict__

    return type(
        f"Narrow{kind.__name__}", (kind, NarrowAttention), {"__reduce__": reduce, "__module__": kind.__module__}
    )


def _blank(kind: type[nn.MultiheadAttention]) -> nn.MultiheadAttention:
    narrow = _narrow(kind)
    return narrow.__new__(narrow)


def narrow_(layer: nn.MultiheadAttention) -> None:
    """Bring an attention layer in line with the shapes of its tensors, which may hold fewer heads.

    Example:
        >>> layer = nn.MultiheadAttention(8, 4)
        >>> layer.in_proj_weight.data = layer.in_proj_weight.data[:12]
        >>> layer.in_proj_bias.data, layer.out_proj.weight.data = layer.in_proj_bias[:12], layer.out_proj.weight[:, :4]
        >>> narrow_(layer)
        >>> type(layer).__name__, layer.num_heads
        ('NarrowAttention', 2)
    """
    out_features, inner = layer.out_proj.weight.shape
    layer.out_proj.out_features, layer.out_proj.in_features = out_features, inner
    if layer.in_proj_weight is not None:
        layer.embed_dim = layer.kdim = layer.vdim = layer.in_proj_weight.shape[1]
    else:
        layer.embed_dim = layer.q_proj_weight.shape[1]
        layer.kdim, layer.vdim = layer.k_proj_weight.shape[1], layer.v_proj_weight.shape[1]
    layer.num_heads = inner // layer.head_dim
    if inner != layer.embed_dim and not isinstance(layer, NarrowAttention):
        layer.__class__ = _narrow(type(layer))
        # Torch's fused encoder layer would read the weights as those of a whole one.
        layer._qkv_same_embed_dim = False
