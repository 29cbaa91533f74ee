"""Dynamic int8 attention: its four projections in int8, what lies between them in float32."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.errors import CompressionError, invalid
from lightning_compress.quantization.layers.linear import DynamicLinear
from lightning_compress.quantization.schemes import DynamicInt8, describe


class DynamicAttention(nn.Module):
    """`nn.MultiheadAttention` in evaluation: ``W_o softmax(q k^T / sqrt(d) + mask) v``, each product with a W in int8.

    ``q, k, v = W_q x, W_k y, W_v z`` are one product in self-attention. Queries that may attend to nothing get NaN
    with ``need_weights`` and the output bias without, as in torch's documented function; torch's fused path, which
    it takes without gradients, gives NaN for some of the latter too.

    Args:
        layer: float, on any device; it isn't changed.
        reduce_range: 7-bit activations, for CPUs without VNNI.

    Example:
        >>> attention = DynamicAttention.from_float(nn.MultiheadAttention(16, 4, batch_first=True), DynamicInt8())
        >>> x = torch.randn(2, 5, 16)
        >>> output, weights = attention(x, x, x)
        >>> output.shape, weights.shape, attention.in_proj[0].weight.dtype
        (torch.Size([2, 5, 16]), torch.Size([2, 5, 5]), torch.int8)

    References:
        Vaswani et al., "Attention Is All You Need", 2017 (arXiv:1706.03762), section 3.2.
    """

    used = frozenset(("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias", "out_proj"))
    """Names of the float layer's tensors and children that it takes the place of."""

    def __init__(self, layer: nn.MultiheadAttention, reduce_range: bool) -> None:
        super().__init__()
        self.num_heads, self.batch_first = layer.num_heads, layer.batch_first
        weights = [layer.in_proj_weight]
        if layer.in_proj_weight is None:
            weights = [layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight]
        biases = [None] * len(weights) if layer.in_proj_bias is None else layer.in_proj_bias.cpu().chunk(len(weights))
        # One for q, k and v, or, where key or value have a size of their own, three.
        self.in_proj = nn.ModuleList(
            DynamicLinear(weight.cpu(), bias, reduce_range) for weight, bias in zip(weights, biases, strict=True)
        )
        out_bias = None if layer.out_proj.bias is None else layer.out_proj.bias.cpu()
        self.out_proj = DynamicLinear(layer.out_proj.weight.cpu(), out_bias, reduce_range)
        self._thirds: list[nn.Module] | None = None

    @classmethod
    def from_float(cls, layer: nn.MultiheadAttention, scheme: DynamicInt8) -> DynamicAttention:
        """The dynamic form of an attention layer, on the CPU.

        Raises:
            CompressionError: the layer adds keys and values of its own.
        """
        if layer.bias_k is not None or layer.add_zero_attn:
            raise CompressionError("int8 attention adds no keys of its own (add_bias_kv, add_zero_attn)")
        return cls(layer, describe(scheme)["reduce_range"])

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

        Args:
            query: ``(L, N, embed_dim)``, ``(N, L, embed_dim)`` if `batch_first`, or ``(L, embed_dim)``.
            key: ``(S, N, kdim)`` and so on.
            value: ``(S, N, vdim)`` and so on.
            key_padding_mask: ``(N, S)`` or ``(S,)``; True or -inf at keys to leave out, else a number to add.
            need_weights: also return the attention weights.
            attn_mask: ``(L, S)`` or ``(N * num_heads, L, S)``, with the same meaning.
            average_attn_weights: the mean of the weights over all heads.
            is_causal: says that ``attn_mask`` is the causal mask.

        Returns:
            The output, of the shape of ``query``, and None or the weights: ``(N, L, S)``, ``(N, num_heads, L, S)`` if
            they aren't averaged, both without N if ``query`` has none.

        Raises:
            CompressionError: a mask has another shape or is neither boolean nor float, or is_causal without attn_mask.
        """
        if is_causal and attn_mask is None:
            raise invalid("attn_mask", "be given where is_causal=True, which only describes it", attn_mask)
        q, k, v = (self._by_head(x, query.dim() == 3) for x in self._project(query, key, value))
        # Only the attention without weights to show has a causal form of its own.
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = self._mask(None if causal else attn_mask, key_padding_mask, len(q), q.shape[2], k.shape[2])
        weights: Tensor | None = None
        if need_weights:
            scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
            weights = (scores if mask is None else scores + mask).softmax(dim=-1)
            attended = weights @ v
            weights = (weights.mean(dim=1) if average_attn_weights else weights).to(query.dtype)
        else:
            attended = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
        output = self.out_proj(attended.transpose(1, 2).flatten(2)).to(query.dtype)
        if query.dim() == 2:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Queries, keys and values, laid out as they came, in float32."""
        if len(self.in_proj) == 1 and query is key and key is value:
            return list(self.in_proj[0](query.float()).chunk(3, dim=-1))
        projections: Any = self.in_proj
        if len(self.in_proj) == 1:
            if self._thirds is None:
                self._thirds = _thirds(self.in_proj[0])
            projections = self._thirds
        return [project(x.float()) for project, x in zip(projections, (query, key, value), strict=True)]

    def _by_head(self, x: Tensor, is_batched: bool) -> Tensor:
        """``(N, num_heads, L, d)``."""
        x = x.unsqueeze(0) if not is_batched else x if self.batch_first else x.transpose(0, 1)
        heads: Tensor = x.unflatten(2, (self.num_heads, -1))
        return heads.transpose(1, 2)

    def _mask(self, attn: Tensor | None, padding: Tensor | None, batch: int, length: int, keys: int) -> Tensor | None:
        """What is added to the scores ``(batch, num_heads, length, keys)``, of a shape that broadcasts to theirs."""
        total = None
        if attn is not None:
            total = _additive("attn_mask", attn, (length, keys), (batch * self.num_heads, length, keys))
            total = total.view(-1, self.num_heads if attn.dim() == 3 else 1, length, keys)
        if padding is not None:
            if padding.dim() == 1:
                padding = padding.unsqueeze(0)
            added = _additive("key_padding_mask", padding, (batch, keys)).view(batch, 1, 1, keys)
            total = added if total is None else total + added
        return total

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._thirds = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_thirds": None}


def _additive(name: str, mask: Tensor, *shapes: tuple[int, ...]) -> Tensor:
    if tuple(mask.shape) not in shapes:
        raise invalid(name, f"have the shape {' or '.join(map(str, shapes))}", tuple(mask.shape))
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape).masked_fill(mask, -torch.inf)
    if not mask.is_floating_point():
        raise invalid(name, "be boolean or float", mask.dtype)
    return mask.float()


def _thirds(linear: nn.Module) -> list[nn.Module]:
    """The three projections that are packed in one, as layers of their own that share its memory."""
    thirds = []
    for index in range(3):
        third = copy.copy(linear)
        third._buffers = {
            name: None if buffer is None else buffer.chunk(3)[index] for name, buffer in linear._buffers.items()
        }
        thirds.append(third)
    return thirds
