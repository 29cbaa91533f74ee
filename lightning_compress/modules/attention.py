"""How does attention compute between its projections, as in `nn.MultiheadAttention`, with heads of any width?"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_compress.errors import invalid


def attend(
    projected: Sequence[Tensor],
    num_heads: int,
    batch_first: bool,
    *,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """``softmax(q k^T / sqrt(d) + mask) v`` by head, before the output's projection.

    Args:
        projected: queries, keys, values: ``(L, N, num_heads * d)``, ``(N, L, num_heads * d)`` with ``batch_first``, or
            without N.
        num_heads: how many.
        batch_first: how ``projected`` is laid out.
        key_padding_mask: ``(N, S)`` or ``(S,)``; True or -inf at keys to leave out, else a number to add.
        need_weights: also return the attention weights.
        attn_mask: ``(L, S)`` or ``(N * num_heads, L, S)``, with the same meaning.
        average_attn_weights: the mean of the weights over all heads.
        is_causal: says that ``attn_mask`` is the causal mask.
        dropout: of the weights.

    Returns:
        The values that were attended to, laid out as the queries, and None or the weights: ``(N, L, S)``,
        ``(N, num_heads, L, S)`` if they aren't averaged, both without N if the queries have none.

    Raises:
        CompressionError: a mask has another shape or is neither boolean nor float, or is_causal without attn_mask.
    """
    if is_causal and attn_mask is None:
        raise invalid("attn_mask", "be given where is_causal=True, which only describes it", attn_mask)
    batched = projected[0].dim() == 3
    q, k, v = (_by_head(x, num_heads, batched, batch_first) for x in projected)
    # Only the attention without weights to show has a causal form of its own.
    causal = is_causal and key_padding_mask is None and not need_weights
    mask = _mask(None if causal else attn_mask, key_padding_mask, num_heads, q.shape[0], q.shape[2], k.shape[2])
    mask = None if mask is None else mask.to(q.dtype)
    weights: Tensor | None = None
    if need_weights:
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
        weights = F.dropout((scores if mask is None else scores + mask).softmax(dim=-1), dropout, dropout > 0)
        attended = weights @ v
        weights = weights.mean(dim=1) if average_attn_weights else weights
    else:
        attended = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, is_causal=causal)
    attended = attended.transpose(1, 2).flatten(2)
    if not batched:
        return attended.squeeze(0), None if weights is None else weights.squeeze(0)
    return attended if batch_first else attended.transpose(0, 1), weights


def _by_head(x: Tensor, num_heads: int, batched: bool, batch_first: bool) -> Tensor:
    """``(N, num_heads, L, d)``."""
    x = x.unsqueeze(0) if not batched else x if batch_first else x.transpose(0, 1)
    heads: Tensor = x.unflatten(2, (num_heads, -1))
    return heads.transpose(1, 2)


def _mask(attn: Tensor | None, padding: Tensor | None, heads: int, batch: int, length: int, keys: int) -> Tensor | None:
    """Return what is added to the scores ``(batch, heads, length, keys)``, of a shape that broadcasts to theirs."""
    total = None
    if attn is not None:
        total = _additive("attn_mask", attn, (length, keys), (batch * heads, length, keys))
        total = total.view(-1, heads if attn.dim() == 3 else 1, length, keys)
    if padding is not None:
        if padding.dim() == 1:
            padding = padding.unsqueeze(0)
        added = _additive("key_padding_mask", padding, (batch, keys)).view(batch, 1, 1, keys)
        total = added if total is None else total + added
    return total


def _additive(name: str, mask: Tensor, *shapes: tuple[int, ...]) -> Tensor:
    if tuple(mask.shape) not in shapes:
        raise invalid(name, f"have the shape {' or '.join(map(str, shapes))}", tuple(mask.shape))
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, device=mask.device).masked_fill(mask, -torch.inf)
    if not mask.is_floating_point():
        raise invalid(name, "be boolean or float", mask.dtype)
    return mask.float()
