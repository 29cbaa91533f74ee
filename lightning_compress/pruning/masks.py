"""Masks as data: counted, also over a fit, checked, read from a file, packed into bits for a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from lightning_compress.errors import CompressionError, invalid, nearest
from lightning_compress.pruning.methods import Masks, pruned


def sparsity_of(masks: Mapping[str, Tensor]) -> float:
    """Divide masked elements by all elements.

    Example:
        >>> sparsity_of({"weight": torch.tensor([True, False, False, True])})
        0.5
    """
    total = sum(mask.numel() for mask in masks.values())
    return pruned(masks.values()) / total if total else 0.0


HISTORY_POINTS = 100
"""How many points of time the history of a fit holds at most, about."""


class SparsityPoint(NamedTuple):
    """Holds the sparsity after some optimizer step: overall, and by parameter name."""

    step: int
    sparsity: float
    by_layer: dict[str, float]


def add_point_(history: list[SparsityPoint], step: int, masks: Masks, at_end: bool) -> None:
    """Note the sparsity of every layer where it has moved on visibly, or ends."""
    now = sparsity_of(masks)
    last = history[-1].sparsity if history else None
    if last is None or now - last >= 1 / HISTORY_POINTS or (at_end and now > last):
        by_layer = {name: sparsity_of({name: mask}) for name, mask in masks.items()}
        history.append(SparsityPoint(step, now, by_layer))


def check_masks(masks: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Masks:
    """Check ``masks`` against the targeted ``weights``, and make them bool; a weight without a mask stays dense.

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
    """Load the masks that ``torch.save({name: mask}, path)`` wrote, with ``weights_only=True``.

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


class PackedMask(TypedDict):
    """A mask as plain data: its shape, and one bit for each element, eight in a byte."""

    shape: list[int]
    bits: Tensor


_BITS = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)


def pack(masks: Mapping[str, Tensor]) -> dict[str, PackedMask]:
    """Turn masks into plain data, one bit for each element.

    Example:
        >>> masks = {"weight": torch.tensor([[True, False, True]])}
        >>> torch.equal(unpack(pack(masks))["weight"], masks["weight"])
        True
    """
    packed: dict[str, PackedMask] = {}
    for name, mask in masks.items():
        flat = mask.detach().cpu().flatten()
        padded = torch.nn.functional.pad(flat.to(torch.uint8), (0, -len(flat) % 8)).view(-1, 8)
        packed[name] = {"shape": list(mask.shape), "bits": (padded * _BITS).sum(dim=1, dtype=torch.uint8)}
    return packed


def unpack(packed: Mapping[str, PackedMask]) -> Masks:
    """Bring back the masks that `pack` packed, on the CPU.

    Raises:
        CompressionError: there are more or fewer bits than the shape has elements.
    """
    masks = {}
    for name, entry in packed.items():
        size, bits = torch.Size(entry["shape"]), entry["bits"]
        if bits.dtype != torch.uint8 or bits.shape != (-(-size.numel() // 8),):
            raise CompressionError(
                f"`masks` must have a bit for each element. Received: {name} of shape {tuple(size)} in "
                f"{bits.dtype} of shape {tuple(bits.shape)}."
            )
        flat = ((bits.unsqueeze(1) & _BITS) != 0).flatten()[: size.numel()]
        masks[name] = flat.view(size)
    return masks
