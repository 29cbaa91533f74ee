"""Draws the weights of the least important units to zero before channels leave, group by group."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_compress.channels.tracing.groups import Group

_ALPHA = 4.0


@torch.no_grad()
def regularize_(
    groups: Sequence[Group],
    tensors: Mapping[str, Tensor],
    ranked: Sequence[Tensor],
    strength: float,
    stepped: Container[int],
) -> None:
    """Add the gradient of a penalty on whole units to the gradients of their weights.

    ``strength / 2 * sum_u gamma_u ||W[u]||^2`` with ``gamma_u = 2^(4 (I_max - I_u) / (I_max - I_min))``: a unit that
    matters least in its group is drawn sixteen times as strongly as the one that matters most.

    Args:
        groups: whose units are drawn.
        tensors: by name, with gradients.
        ranked: importance ``I`` of each unit of each group.
        strength: factor of the penalty.
        stepped: ids of the parameters that the coming step is of.

    References:
        Fang et al., "DepGraph", 2023 (arXiv:2301.12900), eqs. 5 and 6.
    """
    for group, scores in zip(groups, ranked, strict=True):
        low, high = scores.min(), scores.max()
        gamma = 2 ** (_ALPHA * (high - scores) / (high - low).clamp(min=1e-12))
        pull = torch.cat([strength * gamma, torch.zeros(1, dtype=gamma.dtype)])  # the last for what isn't the group's
        for member in group.members:
            tensor = tensors[member.name]
            if isinstance(tensor, nn.Parameter) and tensor.grad is not None and id(tensor) in stepped:
                shape = [1] * tensor.dim()
                shape[member.dim] = -1
                factor = pull[member.units].to(tensor.device, tensor.dtype).view(shape)
                tensor.grad.addcmul_(tensor.detach(), factor)
