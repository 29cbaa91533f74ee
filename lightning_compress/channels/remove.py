"""Takes channels out of a module: a plan's slices stay, everything else of its tensors goes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_compress.channels.layers import keep_scales_, settle_, weight_norms
from lightning_compress.errors import CompressionError
from lightning_compress.optimizers import Kept, resize_
from lightning_compress.targets import clean_name

RECORD = "_removed_channels"
"""Where a cut module keeps what a checkpoint must say of it: plain data, carried by deep copies and pickles."""


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by clean name, each under its first name."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found.setdefault(id(tensor), (clean_name(name), tensor))
    return dict(found.values())


def check_shapes(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise unless the model's tensors have just the shapes that a plan was made for."""
    mine = {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}
    for name, shape in shapes.items():
        if mine.get(name) != shape:
            raise CompressionError(
                f"`plan` must be of this model as it is now. Received: {name} of shape {shape} in the plan, "
                f"{mine.get(name)} in the model. Plan again."
            )


@torch.no_grad()
def cut_(
    model: nn.Module, kept: Mapping[str, Kept], attributes: Mapping[str, int]
) -> dict[Tensor, tuple[torch.Size, Kept]]:
    """Keep only the slices that stay, and bring the layers' numbers in line. Parameters stay the same objects.

    Args:
        model: the module, or a copy of it.
        kept: name of each tensor that shrinks to what stays of it.
        attributes: ``path.name`` of other numbers that follow, with their new values.

    Returns:
        Each parameter that shrank, with its shape before and what stayed.
    """
    tensors = named_tensors(model)
    modules = {clean_name(path): module for path, module in model.named_modules()}
    normed = weight_norms(model)
    scales = {id(magnitude): dim for magnitude, _, dim, _ in normed}
    note_(model, {name: tuple(tensors[name].shape) for name in kept}, _numbers(modules, attributes))
    changed, left = {}, dict[int, Tensor]()
    for name, dims in kept.items():
        tensor = tensors[name]
        if id(tensor) in scales and scales[id(tensor)] in dims:
            left[id(tensor)] = dims[scales[id(tensor)]]
        changed[tensor] = (tensor.shape, dims)
        resize_(tensor, dims)
    keep_scales_(normed, left)
    set_numbers_(model, attributes)
    return {tensor: change for tensor, change in changed.items() if isinstance(tensor, nn.Parameter)}


def set_numbers_(model: nn.Module, attributes: Mapping[str, int]) -> None:
    """Set the numbers that follow widths, and let torch's layers read theirs from their tensors."""
    for path, module in model.named_modules():
        path = clean_name(path)
        groups = attributes.get(f"{path}.groups".lstrip(".")) if isinstance(module, _ConvNd) else None
        settle_(module, groups)
    modules = {clean_name(path): module for path, module in model.named_modules()}
    for full, value in attributes.items():
        path, _, name = full.rpartition(".")
        setattr(modules[path], name, value)


def _numbers(modules: Mapping[str, nn.Module], attributes: Mapping[str, int]) -> dict[str, int]:
    return {full: getattr(modules[full.rpartition(".")[0]], full.rpartition(".")[2]) for full in attributes}


def note_(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], numbers: Mapping[str, int]) -> None:
    """Write down what tensors and numbers were before the first cut."""
    record: dict[str, Any] = model.__dict__.setdefault(RECORD, {"shapes": {}, "numbers": {}})
    model.__dict__[RECORD] = {
        "shapes": {**{name: list(shape) for name, shape in shapes.items()}, **record["shapes"]},
        "numbers": {**numbers, **record["numbers"]},
    }


def zero_(model: nn.Module, kept: Mapping[str, Kept]) -> None:
    """Zero what `cut_` would take out: what remains computes the same."""
    tensors = named_tensors(model)
    normed = weight_norms(model)
    with torch.no_grad():
        for name, dims in kept.items():
            for dim, indices in dims.items():
                gone = torch.ones(tensors[name].shape[dim], dtype=torch.bool)
                gone[indices] = False
                tensors[name].index_fill_(dim, gone.nonzero().flatten().to(tensors[name].device), 0)
        keep_scales_([one for one in normed if bool(one[0].all())], {})


def replicas_cut_(models: Iterable[nn.Module], kept: Mapping[str, Kept], attributes: Mapping[str, int]) -> None:
    """The same cut on copies of the module."""
    for model in models:
        cut_(model, kept, attributes)
