"""Mask arithmetic: from sparsity and weights to masks, exact to one element. Pure; nothing is changed in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_compress.errors import CompressionError, invalid, nearest
from lightning_compress.pruning.methods import Rule

Scope = Literal["global", "layer"]
Masks = dict[str, Tensor]
"""Parameter name to a bool tensor of the parameter's shape; False is pruned."""


def grow(
    weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], sparsity: float, rule: Rule, scope: Scope
) -> Masks:
    """Masks at ``sparsity`` in which everything that ``masks`` prune stays pruned.

    ``global`` prunes round(sparsity * N) of all N elements, ``layer`` the same of each tensor; structured rules take
    whole units, the nearest number, and leave every tensor at least one. Where ``masks`` already prune more, they stay
    as they are.

    Args:
        weights: name to weight tensor.
        masks: name to bool mask.
        sparsity: fraction of the elements that is pruned afterwards, counted in masked elements.
        rule: decides which go.
        scope: ``global`` or ``layer``.
    """
    if rule.fixes_sparsity:
        return {name: rule.mask(weight, masks[name], 0) for name, weight in weights.items()}
    if scope == "layer":
        step = _grow_units if rule.structured else _grow_elements
        return {name: step(weight, masks[name], sparsity, rule) for name, weight in weights.items()}
    return (
        _grow_global_units(weights, masks, sparsity, rule)
        if rule.structured
        else _grow_global(weights, masks, sparsity, rule)
    )


def _missing(mask: Tensor, sparsity: float) -> int:
    return round(sparsity * mask.numel()) - int(mask.numel() - mask.sum())


def _grow_elements(weight: Tensor, mask: Tensor, sparsity: float, rule: Rule) -> Tensor:
    amount = _missing(mask, sparsity)
    return rule.mask(weight, mask, amount) if amount > 0 else mask


def _kept_units(mask: Tensor, dim: int) -> Tensor:
    return mask.movedim(dim, 0).flatten(1).any(dim=1)


def _grow_units(weight: Tensor, mask: Tensor, sparsity: float, rule: Rule) -> Tensor:
    kept = _kept_units(mask, rule.dim)
    goal = min(round(sparsity * len(kept)), len(kept) - 1)
    amount = goal - int(len(kept) - kept.sum())
    return rule.mask(weight, mask, amount) if amount > 0 else mask


def _grow_global(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], sparsity: float, rule: Rule) -> Masks:
    """One ranking over all that is still kept, as one long vector."""
    total = sum(mask.numel() for mask in masks.values())
    kept = torch.cat([weight[masks[name]] for name, weight in weights.items()])
    amount = round(sparsity * total) - (total - kept.numel())
    if amount <= 0:
        return dict(masks)
    keep = rule.mask(kept, torch.ones_like(kept, dtype=torch.bool), amount)
    grown, start = {}, 0
    for name in weights:
        grown[name] = masks[name].clone()
        size = int(masks[name].sum())
        grown[name][masks[name]] = keep[start : start + size]
        start += size
    return grown


def _grow_global_units(
    weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], sparsity: float, rule: Rule
) -> Masks:
    """Takes the lowest units of all layers until the masked elements are nearest to the goal."""
    names = list(weights)
    kept = [_kept_units(masks[name], rule.dim).cpu() for name in names]
    sizes = [masks[name].numel() // len(units) for name, units in zip(names, kept, strict=True)]
    total = sum(mask.numel() for mask in masks.values())
    missing = round(sparsity * total) - sum(int((~units).sum()) * size for units, size in zip(kept, sizes, strict=True))
    ranked = sorted(
        (float(score), layer, unit)
        for layer, name in enumerate(names)
        for unit, score in enumerate(rule.unit_scores(weights[name]).cpu())
        if kept[layer][unit]
    )
    for _, layer, unit in ranked:
        if missing < sizes[layer] / 2:
            break
        if kept[layer].sum() > 1:
            kept[layer][unit] = False
            missing -= sizes[layer]
    return {name: _unit_mask(masks[name], units, rule.dim) for name, units in zip(names, kept, strict=True)}


def _unit_mask(mask: Tensor, units: Tensor, dim: int) -> Tensor:
    shape = [1] * mask.dim()
    shape[dim] = -1
    return mask & units.to(mask.device).view(shape)


def applied(masks: Mapping[str, Tensor], magnitudes: Mapping[str, tuple[str, Tensor]]) -> Masks:
    """The masks as they are multiplied in: a unit of a weight norm that is pruned whole has its magnitude zeroed.

    Its direction stays, as weight norm divides by the direction's length.

    Args:
        masks: name to bool mask.
        magnitudes: name of a direction to name and tensor of its magnitudes, of size 1 along all dimensions but the
            units'.
    """
    masks = dict(masks)
    for name, (magnitude_name, magnitude) in magnitudes.items():
        alive = masks[name]
        for dim, size in enumerate(magnitude.shape):
            alive = alive.any(dim=dim, keepdim=True) if size == 1 else alive
        alive = alive if magnitude.dim() else alive.any()
        if not bool(alive.all()):
            masks[magnitude_name] = alive
            masks[name] = masks[name] | ~alive
    return masks


def sparsity_of(masks: Mapping[str, Tensor]) -> float:
    """Masked elements over all elements.

    Example:
        >>> sparsity_of({"weight": torch.tensor([True, False, False, True])})
        0.5
    """
    total = sum(mask.numel() for mask in masks.values())
    return 1.0 - sum(int(mask.sum()) for mask in masks.values()) / total if total else 0.0


def check_masks(masks: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Masks:
    """``masks`` as bool tensors, checked against the targeted ``weights``; a weight without a mask stays dense.

    Raises:
        CompressionError: a name that is no targeted weight, a shape that differs, or a value other than 0 and 1.
    """
    checked = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    for name, mask in masks.items():
        if name not in weights:
            raise CompressionError(f"`masks` must name targeted weights. Received: {name!r}. {nearest(name, weights)}")
        if not isinstance(mask, Tensor) or mask.shape != weights[name].shape:
            shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise CompressionError(
                f"`masks` must have their weight's shape {tuple(weights[name].shape)}. Received: {name} with {shape}."
            )
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise CompressionError(f"`masks` must hold only 0 and 1. Received: other values in {name}.")
        checked[name] = mask.to(device=weights[name].device, dtype=torch.bool)
    return checked


def read_masks(path: str) -> Masks:
    """The masks that ``torch.save({name: mask}, path)`` wrote; loaded with ``weights_only=True``.

    Raises:
        CompressionError: there is no such file, or it holds something else.
    """
    try:
        masks = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a dozen types, by file format
        raise invalid("mask_file", "be a readable file of masks", path, f"{type(error).__name__}: {error}") from error
    if not isinstance(masks, dict) or not all(isinstance(mask, Tensor) for mask in masks.values()):
        raise invalid("mask_file", "hold a dict from parameter names to mask tensors", path)
    return masks


_BITS = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)


def pack(masks: Mapping[str, Tensor]) -> dict[str, Any]:
    """Masks as plain data, one bit for each element.

    Example:
        >>> masks = {"weight": torch.tensor([[True, False, True]])}
        >>> torch.equal(unpack(pack(masks))["weight"], masks["weight"])
        True
    """
    packed = {}
    for name, mask in masks.items():
        flat = mask.detach().cpu().flatten()
        padded = torch.nn.functional.pad(flat.to(torch.uint8), (0, -len(flat) % 8)).view(-1, 8)
        packed[name] = {"shape": list(mask.shape), "bits": (padded * _BITS).sum(dim=1, dtype=torch.uint8)}
    return packed


def unpack(packed: Mapping[str, Any]) -> Masks:
    """The masks that `pack` packed, on the CPU."""
    masks = {}
    for name, entry in packed.items():
        size = torch.Size(entry["shape"])
        flat = ((entry["bits"].unsqueeze(1) & _BITS) != 0).flatten()[: size.numel()]
        masks[name] = flat.view(size)
    return masks
