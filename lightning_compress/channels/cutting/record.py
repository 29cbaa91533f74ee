"""Records as plain data which channels a module has lost, and gives a full-size module the same widths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.channels.cutting.cached import cached_tensors, forget_, is_cached, kept_of
from lightning_compress.channels.cutting.cut import RECORD, note_whole_, set_numbers_
from lightning_compress.channels.cutting.layers import STANDARD
from lightning_compress.errors import CompressionError
from lightning_compress.modules.paths import clean_name, modules_of, named_tensors
from lightning_compress.modules.resizing import assign_, resize_, take
from lightning_compress.modules.routing import CHILD, children_aside

Record = dict[str, Any]
"""``{"shapes": {tensor: [before, now]}, "numbers": {path.name: [before, now]}, "buffers": {buffer: {dim: indices}}}``;
empty if nothing was removed."""


def record_of(model: nn.Module) -> Record:
    """Return what was removed from ``model`` or parts of it, as plain data."""
    record: Record = {"shapes": {}, "numbers": {}, "buffers": {}}
    for prefix, module in _own_modules(model):
        for kind, entries in module.__dict__.get(RECORD, {}).items():
            for name, entry in entries.items():
                record[kind][prefix + name] = _plain(entry) if kind == "buffers" else list(entry)
    return record if record["shapes"] else {}


def _own_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the user's modules with the prefix of their names, those behind a quantized form too."""
    for path, module in model.named_modules():
        if CHILD not in path.split("."):
            here = prefix + (f"{clean_name(path)}." if path else "")
            yield here, module
            for name, child in children_aside(module).items():
                yield from _own_modules(child, f"{here}{name}.")


def _plain(entry: Mapping[str, Any]) -> dict[int, list[int]]:
    return {dim: indices.tolist() for dim, indices in entry["kept"].items()}


def fits(model: nn.Module, record: Record) -> bool:
    """Whether the model has the widths that a record tells of, and no others."""
    own_record = record_of(model)
    return not (own_record or record) or own_record == record


def take_widths_(model: nn.Module, record: Record) -> None:
    """Give the model the widths of a record; where it names nothing, those that it was built with.

    The tensors are new: their values are to be loaded, but for buffers that no checkpoint holds.

    Raises:
        RuntimeError: the model was built with other widths than the record's.
    """
    tensors = named_tensors(model)
    own_record = record_of(model)
    built = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    built.update({name: tuple(shapes[0]) for name, shapes in own_record.get("shapes", {}).items()})
    wanted = {name: tuple(shapes[0]) for name, shapes in own_record.get("shapes", {}).items()}
    for name, (before, now) in record.get("shapes", {}).items():
        if name not in tensors:
            continue  # what the module makes while it loads, such as adapters; what it doesn't make, the load reports
        if built[name] != tuple(before):
            raise RuntimeError(
                f"size mismatch for {name}: built as {tuple(before)} where the checkpoint was written, as "
                f"{built[name]} here."
            )
        wanted[name] = tuple(now)
    numbers = {name: before for name, (before, _) in own_record.get("numbers", {}).items()}
    numbers.update({name: now for name, (_, now) in record.get("numbers", {}).items()})
    whole = _whole_buffers(model)
    buffers = [name for name in record.get("buffers", {}) if not is_cached(name)]
    before_of = {name: tensors[name].detach().clone() for name in buffers if name not in whole}
    for name, shape in wanted.items():
        if tuple(tensors[name].shape) == shape and name not in whole:
            continue
        value = whole.get(name, tensors[name].detach())
        kept = {int(dim): torch.tensor(indices) for dim, indices in record.get("buffers", {}).get(name, {}).items()}
        value = take(value, kept) if kept or tuple(value.shape) == shape else tensors[name].new_zeros(shape)
        assign_(tensors[name], value)
    set_numbers_(model, numbers)
    before_of.update(_take_cached_(model, record, whole))
    _forget_(model)
    modules = modules_of(model)
    for kind, entries in record.items():
        for full, entry in entries.items():
            path, _, own = full.rpartition(".")
            if path not in modules:
                continue
            own_record = modules[path].__dict__.setdefault(RECORD, {"shapes": {}, "numbers": {}, "buffers": {}})
            own_record[kind][own] = list(entry)
            if kind == "buffers":
                kept = {int(dim): torch.tensor(indices) for dim, indices in entry.items()}
                own_record[kind][own] = {"kept": kept, "whole": whole.get(full, before_of.get(full))}
    if record:
        note_whole_(model, {kind: record[kind] for kind in ("shapes", "numbers")})


@torch.no_grad()
def _take_cached_(model: nn.Module, record: Record, whole: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Cut the tensors that modules keep beside their own as a record tells; returns those as they were."""
    for name, tensor in cached_tensors(model).items():
        if (value := whole.get(name)) is not None:
            assign_(tensor, value)
    entries = {name: entry for name, entry in record.get("buffers", {}).items() if is_cached(name)}
    kept = kept_of(
        model, {name: {int(dim): torch.tensor(one) for dim, one in dims.items()} for name, dims in entries.items()}
    )
    tensors = cached_tensors(model)
    before = {name: tensors[name].detach().clone() for name in kept}
    for name, dims in kept.items():
        resize_(tensors[name], dims)
    forget_(model)
    return before


def _whole_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return buffers that no checkpoint holds, as they were before they shrank."""
    found = {}
    for prefix, module in _own_modules(model):
        for name, entry in module.__dict__.get(RECORD, {}).get("buffers", {}).items():
            found[prefix + name] = entry["whole"]
    return found


def _forget_(model: nn.Module) -> None:
    for module in model.modules():
        module.__dict__.pop(RECORD, None)


def by_shapes(model: nn.Module, state: Mapping[str, Any]) -> Record:
    """Infer the record of a plain state dict from its shapes: torch's own layers may be narrower in it.

    Raises:
        CompressionError: a tensor of another kind of layer is narrower: what follows from it isn't known.
    """
    modules = modules_of(model)
    tensors = named_tensors(model)
    shapes: dict[str, list[list[int]]] = {}
    for key, value in state.items():
        name = clean_name(key)
        tensor = tensors.get(name)
        if tensor is None or not isinstance(value, Tensor):
            continue
        if tensor.shape == value.shape or tensor.dim() != value.dim():
            continue
        owner = modules.get(name.rpartition(".")[0])
        narrower = all(narrow <= size for narrow, size in zip(value.shape, tensor.shape, strict=True))
        if not narrower:
            return {}  # another model: loading says so
        if not isinstance(owner, STANDARD):
            raise CompressionError(
                f"`path` must tell how {name} lost channels. Received: {tuple(value.shape)} for {tuple(tensor.shape)}, "
                f"in a {type(owner).__name__}. Write the file with save_compressed, or with a Trainer."
            )
        shapes[name] = [list(tensor.shape), list(value.shape)]
    return {"shapes": shapes, "numbers": {}, "buffers": {}} if shapes else {}
