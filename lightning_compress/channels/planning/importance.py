"""How much each unit of a group matters: one number for each, the mean over a group being 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_compress.channels.tracing.groups import Group, Member, layer_of
from lightning_compress.errors import invalid, nearest

Importance = Literal["l1", "l2", "batchnorm", "taylor", "fpgm", "random"]
IMPORTANCES: tuple[str, ...] = get_args(Importance)


def check_importance(name: str) -> None:
    """Raise unless there is an importance of that name."""
    if name not in IMPORTANCES:
        raise invalid("importance", "be the name of one", name, nearest(str(name), IMPORTANCES))


def rank(
    groups: Sequence[Group],
    tensors: Mapping[str, Tensor],
    modules: Mapping[str, nn.Module],
    importance: str,
    taylor: Mapping[str, Tensor],
    seed: int,
) -> list[Tensor]:
    """The importance of each unit of each group, float64 ``(size,)``; the mean over a group is 1.

    With ``W_m[u]`` the slice of unit ``u`` in weight ``m`` of the group (what makes the channel and what takes it in):

    - ``l1``, ``l2``: mean over ``m`` of ``sum |W_m[u]|^p``;
    - ``batchnorm``: mean over the group's BatchNorms of ``|gamma[u]|``;
    - ``taylor``: ``taylor`` as `taylor_step` carried it along;
    - ``fpgm``: mean over what makes the channel of ``sum_v ||W_m[u] - W_m[v]||``, the distance to the geometric median;
    - ``random``: uniform.

    Args:
        groups: whose units are ranked.
        tensors: by name.
        modules: by path.
        importance: one of `IMPORTANCES`.
        taylor: a group's name to what its units were seen to matter.
        seed: for ``random``.

    References:
        Fang et al., "DepGraph", 2023 (arXiv:2301.12900), section 3.3, for the mean over a group; Liu et al., "Network
        Slimming", 2017 (arXiv:1708.06519); He et al., "Filter Pruning via Geometric Median", 2019 (arXiv:1811.00250).
    """
    generator = torch.Generator().manual_seed(seed)
    ranked = []
    for group in groups:
        if importance == "random":
            scores = torch.rand(group.size, generator=generator, dtype=torch.float64) + 1e-9
        elif importance == "taylor":
            scores = taylor.get(group.name, torch.zeros(group.size, dtype=torch.float64))
        else:
            scores = _group_scores(group, tensors, modules, importance)
        mean = scores.mean()
        ranked.append(scores / mean if mean > 0 else torch.ones_like(scores))
    return ranked


def _group_scores(
    group: Group, tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module], importance: str
) -> Tensor:
    found = []
    for member in group.members:
        tensor = tensors[member.name]
        if not isinstance(tensor, nn.Parameter) or not tensor.is_floating_point():
            continue
        scale = isinstance(modules.get(layer_of(member.name)), _BatchNorm) and member.name.endswith("weight")
        if importance == "batchnorm":
            if scale:
                found.append(by_unit(tensor.detach().abs(), member, group.size))
        elif tensor.dim() > 1 and importance == "fpgm":
            if member.makes:
                found.append(_distances(tensor.detach(), member, group.size))
        elif tensor.dim() > 1:
            value = tensor.detach().abs()
            found.append(by_unit(value if importance == "l1" else value.square(), member, group.size))
    if not found:
        return torch.ones(group.size, dtype=torch.float64)
    return torch.stack(found).mean(0)


def by_unit(values: Tensor, member: Member, size: int) -> Tensor:
    """Sums of a tensor's values over each unit's slices, float64 ``(size,)``."""
    others = [dim for dim in range(values.dim()) if dim != member.dim]
    sums = (values.sum(others, dtype=torch.float64) if others else values.double()).cpu()
    mine = member.units >= 0
    return torch.zeros(size, dtype=torch.float64).index_add_(0, member.units[mine], sums[mine])


def _distances(weight: Tensor, member: Member, size: int) -> Tensor:
    rows = weight.double().movedim(member.dim, 0).reshape(weight.shape[member.dim], -1).cpu()
    mine = member.units >= 0
    places, rows = member.units[mine], rows[mine]
    order = places.argsort(stable=True)
    counts = torch.bincount(places, minlength=size)
    if bool((counts == counts[0]).all()):
        rows = rows[order].reshape(size, -1)
        return torch.cdist(rows, rows).sum(1)
    return torch.zeros(size, dtype=torch.float64).index_add_(0, places, torch.cdist(rows, rows).sum(1))


@torch.no_grad()
def taylor_step(groups: Sequence[Group], tensors: Mapping[str, Tensor], carried: dict[str, Tensor]) -> None:
    """Add a step's ``(sum over the unit's weights of gradient * weight)^2``: what the loss would change by without it.

    Args:
        groups: whose units are looked at.
        tensors: by name, with gradients.
        carried: a group's name to its sums so far; changed in place.

    References:
        Molchanov et al., "Importance Estimation for Neural Network Pruning", 2019 (arXiv:1906.10771), eq. 8.
    """
    for group in groups:
        total = torch.zeros(group.size, dtype=torch.float64)
        seen = False
        for member in group.members:
            tensor = tensors[member.name]
            if isinstance(tensor, nn.Parameter) and tensor.grad is not None and member.makes:
                gradient = tensor.grad.to_dense() if tensor.grad.is_sparse else tensor.grad
                total += by_unit(tensor * gradient, member, group.size)
                seen = True
        if seen:
            before = carried.get(group.name)
            carried[group.name] = total.square() + (before if before is not None and len(before) == len(total) else 0.0)
