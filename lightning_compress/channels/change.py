"""Removed channels as a change of a module's structure: recorded as plain data, and given to a full-size module."""

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
from lightning_compress.structure.change import Record, StructuralChange

_NOTHING: dict[str, Any] = {"shapes": {}, "numbers": {}, "buffers": {}}


class ChannelRemoval(StructuralChange):
    """The widths of a module that has lost channels. A narrow module serves, and is saved, as it is.

    Its record is ``{"shapes": {tensor: [before, now]}, "numbers": {path.name: [before, now]}, "buffers": {buffer: {dim:
    indices}}}``.
    """

    key = "channels"
    is_float = True

    def record(self, module: nn.Module) -> Record | None:
        record: dict[str, dict[str, Any]] = {"shapes": {}, "numbers": {}, "buffers": {}}
        for prefix, inner in _own_modules(module):
            kinds = inner.__dict__.get(RECORD, _NOTHING)
            for kind in ("shapes", "numbers"):
                record[kind] |= {prefix + name: list(entry) for name, entry in kinds[kind].items()}
            for name, entry in kinds["buffers"].items():
                record["buffers"][prefix + name] = {dim: indices.tolist() for dim, indices in entry["kept"].items()}
        return record if record["shapes"] else None

    def infer(self, module: nn.Module, state: Mapping[str, Any]) -> Record | None:
        """Find where torch's own layers are narrower in a plain state dict; of other layers the rest isn't known."""
        modules = modules_of(module)
        tensors = named_tensors(module)
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
                return None  # another model: loading says so
            if not isinstance(owner, STANDARD):
                raise CompressionError(
                    f"`path` must tell how {name} lost channels. Received: {tuple(value.shape)} for "
                    f"{tuple(tensor.shape)}, in a {type(owner).__name__}. Write the file with save_compressed, or with "
                    "a Trainer."
                )
            shapes[name] = [list(tensor.shape), list(value.shape)]
        return {"shapes": shapes, "numbers": {}, "buffers": {}} if shapes else None

    def same(self, module: nn.Module, record: Record | None) -> bool:
        return self.record(module) == (record or None)

    def apply_(self, module: nn.Module, record: Record) -> None:
        _take_widths_(module, record)

    def revert_(self, module: nn.Module) -> None:
        _take_widths_(module, {})


CHANGE = ChannelRemoval()


def _own_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the user's modules with the prefix of their names, those behind a quantized form too."""
    for path, module in model.named_modules():
        if CHILD not in path.split("."):
            here = prefix + (f"{clean_name(path)}." if path else "")
            yield here, module
            for name, child in children_aside(module).items():
                yield from _own_modules(child, f"{here}{name}.")


def _take_widths_(model: nn.Module, record: Record) -> None:
    """Give the model the widths of a record; where it names nothing, those that it was built with.

    The tensors are new: their values are to be loaded, but for buffers that no checkpoint holds.

    Raises:
        RuntimeError: the model was built with other widths than the record's.
    """
    tensors = named_tensors(model)
    own_record = CHANGE.record(model) or {}
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
    for module in model.modules():
        module.__dict__.pop(RECORD, None)
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
