"""Updates torch's own layers after a cut: their attributes follow from the shapes of their tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrizations import _WeightNorm

from lightning_compress.channels.cutting.narrow_attention import narrow_

STANDARD = (
    _ConvNd,
    nn.Linear,
    nn.Embedding,
    nn.EmbeddingBag,
    _NormBase,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.PReLU,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
)
"""Layers that say in their tensors' shapes what they are."""


def settle_(layer: Any, groups: int | None = None) -> None:
    """Set the attributes of one of torch's layers by the shapes of its tensors, and the groups if they changed too.

    Example:
        >>> layer = nn.Linear(4, 3)
        >>> layer.weight.data = layer.weight.data[:2]
        >>> settle_(layer)
        >>> layer
        Linear(in_features=4, out_features=2, bias=True)
    """
    if isinstance(layer, _ConvNd):
        weight: Any = layer.weight
        rows, columns = weight.shape[:2]
        if groups is None and layer.groups == layer.out_channels and columns == 1:
            groups = rows  # depthwise
        layer.groups = groups or layer.groups
        layer.in_channels, layer.out_channels = columns * layer.groups, rows
        if layer.transposed:
            layer.in_channels, layer.out_channels = rows, columns * layer.groups
    elif isinstance(layer, nn.MultiheadAttention):
        narrow_(layer)
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
        layer.embedding_dim = layer.weight.shape[1]
    elif isinstance(layer, _NormBase):
        known = layer.weight if layer.weight is not None else layer.running_mean
        if known is not None:
            layer.num_features = len(known)
    elif isinstance(layer, (nn.LayerNorm, nn.RMSNorm)) and layer.weight is not None:
        layer.normalized_shape = tuple(layer.weight.shape)
    elif isinstance(layer, nn.GroupNorm) and layer.weight is not None:
        layer.num_channels = len(layer.weight)
    elif isinstance(layer, nn.PReLU):
        layer.num_parameters = len(layer.weight)
    elif isinstance(layer, nn.RNNBase):
        first: Any = layer
        gates = {"LSTM": 4, "GRU": 3}.get(layer.mode, 1)
        layer.input_size, layer.hidden_size = first.weight_ih_l0.shape[1], len(first.weight_hh_l0) // gates
        layer._flat_weights = [getattr(layer, name) for name in layer._flat_weights_names]
        layer.flatten_parameters()
    elif isinstance(layer, nn.RNNCellBase):
        layer.hidden_size, layer.input_size = layer.weight_hh.shape[1], layer.weight_ih.shape[1]


Normed = list[tuple[Tensor, Tensor, int, Tensor]]


def weight_norms(model: nn.Module) -> Normed:
    """Return each weight norm's magnitudes, directions and dimension, and the ratio of magnitude to norm."""
    found = []
    for module in model.modules():
        for parametrized in getattr(module, "parametrizations", {}).values():
            for parametrization in parametrized:
                if isinstance(parametrization, _WeightNorm) and len(parametrized) == 1:
                    found.append((parametrized.original0, parametrized.original1, parametrization.dim))
        hooks: Any = module._forward_pre_hooks.values()
        for hook in hooks:
            if type(hook).__name__ == "WeightNorm":  # the older form, a hook
                name = hook.name
                found.append((getattr(module, f"{name}_g"), getattr(module, f"{name}_v"), hook.dim))
    return [
        (magnitude, direction, -1 if dim in (None, -1) else dim % direction.dim(), magnitude.detach() / norm)
        for magnitude, direction, dim in found
        if direction.numel() and (norm := _norm(direction, dim)).shape == magnitude.shape
    ]


def _norm(direction: Tensor, dim: int | None) -> Tensor:
    return torch.norm_except_dim(direction.detach(), 2, -1 if dim is None else dim)


@torch.no_grad()
def keep_scales_(normed: Normed, left_of: dict[int, Tensor]) -> None:
    """Set magnitudes so that what is left of each weight is what it was before, by the indices that are left of it."""
    for magnitude, direction, dim, scale in normed:
        if not direction.numel():
            continue  # of a block that has left
        indices = left_of.get(id(magnitude))
        left = scale if indices is None else scale.index_select(dim, indices.to(scale.device))
        magnitude.copy_(left * _norm(direction, dim))
