"""Cuts channels out of a module: the slices of a plan stay, the rest of its tensors goes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from lightning_compress.channels.cutting.cached import cached_tensors, forget_, is_cached, present
from lightning_compress.channels.cutting.layers import keep_scales_, settle_, weight_norms
from lightning_compress.channels.cutting.skipped import SKIPPED, pass_over_, set_skipped_
from lightning_compress.channels.cutting.written import WRITTEN, set_written_
from lightning_compress.errors import CompressionError
from lightning_compress.modules.paths import clean_name, modules_of, named_tensors
from lightning_compress.modules.resizing import Cut, KeptIndices, resize_

FITS = "fits"
RECORD = "_removed_channels"
"""Where a cut layer keeps what a checkpoint must say of it: plain data, carried by deep copies and pickles."""


def check_shapes(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise unless the model's tensors have just the shapes that a plan was made for."""
    own = {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}
    for name in {**shapes, **own}:
        shape = shapes.get(name)
        if own.get(name) != shape:
            raise CompressionError(
                f"`plan` must be of this model as it is now. Received: {name} of shape {shape} in the plan, "
                f"{own.get(name)} in the model. Plan again."
            )


def _all_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**named_tensors(model), **cached_tensors(model)}


@torch.no_grad()
def cut_(model: nn.Module, kept: Mapping[str, KeptIndices], numbers: Mapping[str, Any]) -> Cut:
    """Keep only some slices of tensors, and update the layers' attributes. Parameters stay the same objects.

    Returns what was done, for whatever else keeps state of the module's tensors.
    """
    tensors, kept = _all_tensors(model), present(model, kept)
    normed = weight_norms(model)
    scales = {id(magnitude): dim for magnitude, _, dim, _ in normed}
    before = {name: tensors[name].shape for name in kept}
    if kept:
        _note_(model, kept, numbers)
    left = dict[int, Tensor]()
    for name, dims in kept.items():
        key = id(tensors[name])
        if scales.get(key) in dims:
            left[key] = dims[scales[key]]
        resize_(tensors[name], dims)
    keep_scales_(normed, left)
    set_numbers_(model, numbers)
    forget_(model)
    changes = {tensors[name]: (before[name], kept[name]) for name in kept if isinstance(tensors[name], nn.Parameter)}
    return Cut(kept, numbers, changes)


def set_numbers_(model: nn.Module, numbers: Mapping[str, Any]) -> None:
    """Set the attributes that follow widths; torch's layers read theirs from their tensors."""
    modules = modules_of(model)
    for path, module in modules.items():
        if is_parametrized(module) and not all(parameter.numel() for parameter in module.parameters()):
            continue  # of a block that has left: its weight can't be computed
        settle_(module, numbers.get(f"{path}.groups".lstrip(".")) if isinstance(module, _ConvNd) else None)
    for full, value in sorted(numbers.items(), key=lambda item: item[0].endswith(SKIPPED)):
        path, _, name = full.rpartition(".")
        if name == WRITTEN:
            set_written_(modules[path], value)
        elif name == SKIPPED:
            set_skipped_(modules[path], value)
        else:
            setattr(modules[path], name, value)
    pass_over_(model)


def _note_(model: nn.Module, kept: Mapping[str, KeptIndices], numbers: Mapping[str, Any]) -> None:
    """Record what tensors and attributes were before the first cut, and what they are after this one."""
    tensors, modules = _all_tensors(model), modules_of(model)
    held = set(map(clean_name, model.state_dict()))
    for name, dims in kept.items():
        path, _, own = name.rpartition(".")
        record = _record(modules[path])
        before = list(tensors[name].shape)
        after = [len(dims[dim]) if dim in dims else size for dim, size in enumerate(before)]
        if not is_cached(name):
            note_(model, modules, "shapes", name, [record["shapes"].get(own, [before])[0], after])
        if name not in held and not isinstance(tensors[name], nn.Parameter):
            entry = record["buffers"].setdefault(own, {"kept": {}, "whole": tensors[name].clone()})
            for dim, indices in dims.items():
                entry["kept"][dim] = entry["kept"][dim][indices] if dim in entry["kept"] else indices
    for name, value in numbers.items():
        path, _, own = name.rpartition(".")
        first = getattr(modules[path], own, None)
        note_(model, modules, "numbers", name, [_record(modules[path])["numbers"].get(own, [first])[0], value])


def note_(model: nn.Module, modules: Mapping[str, nn.Module], kind: str, name: str, entry: Any) -> None:
    """Record something of a tensor or attribute with the module that owns it, if there is one.

    A part that is taken out knows of itself so. But for buffers the whole knows too, as an int8 form may take the
    module's place.
    """
    path, _, own = name.rpartition(".")
    if path in modules:
        _record(modules[path])[kind][own] = entry
    if kind != "buffers":
        _record(model)[kind][name] = list(entry)


def note_fit_(model: nn.Module, fit: dict[str, Any]) -> None:
    """Record to what the layers behind removed channels were fitted."""
    _record(model).setdefault(FITS, []).append(fit)


def fits_of(model: nn.Module) -> list[dict[str, Any]]:
    """Return what `note_fit_` has recorded."""
    found: list[dict[str, Any]] = model.__dict__.get(RECORD, {}).get(FITS, [])
    return found


def _record(module: nn.Module) -> dict[str, Any]:
    record: dict[str, Any] = module.__dict__.setdefault(RECORD, {"shapes": {}, "numbers": {}, "buffers": {}})
    return record


@torch.no_grad()
def zero_(model: nn.Module, kept: Mapping[str, KeptIndices]) -> None:
    """Set to zero what `cut_` would remove: what remains computes the same."""
    tensors, kept = _all_tensors(model), present(model, kept)
    normed = weight_norms(model)
    # A weight norm's rows go with their magnitudes: a direction of zeros has none.
    rows = {id(direction): dim for _, direction, dim, _ in normed}
    magnitudes = {id(magnitude) for magnitude, _, _, _ in normed}
    names = sorted(kept, key=lambda name: id(tensors[name]) in magnitudes)
    for name in names:
        tensor = tensors[name]
        if id(tensor) in magnitudes:
            keep_scales_(normed, {})
            normed = []
        for dim, indices in kept[name].items():
            if rows.get(id(tensor)) != dim:
                gone = torch.ones(tensor.shape[dim], dtype=torch.bool)
                gone[indices] = False
                tensor.index_fill_(dim, gone.nonzero().flatten().to(tensor.device), 0)
    keep_scales_(normed, {})
