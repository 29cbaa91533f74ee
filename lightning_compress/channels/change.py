"""Removed channels as a change of a module's structure: recorded as plain data, and given to a full-size module."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.channels.cutting.cached import cached_tensors, forget_, is_cached, present
from lightning_compress.channels.cutting.cut import FITS, RECORD, fits_of, note_, note_fit_, set_numbers_
from lightning_compress.channels.cutting.layers import STANDARD
from lightning_compress.errors import CompressionError
from lightning_compress.modules.paths import clean_name, modules_of, named_tensors
from lightning_compress.modules.resizing import KeptIndices, assign_, resize_, take
from lightning_compress.structure.change import Record, StructuralChange

_NOTHING: dict[str, Any] = {"shapes": {}, "numbers": {}, "buffers": {}}


class ChannelRemoval(StructuralChange):
    """The widths of a module that has lost channels. A narrow module serves, and is saved, as it is.

    Its record is ``{"shapes": {tensor: [before, now]}, "numbers": {path.name: [before, now]}, "buffers": {buffer: {dim:
    indices}}}``, with ``"fits"``, what layers behind removed channels were fitted to, if they were.
    """

    key = "channels"
    is_float = True

    def record(self, module: nn.Module) -> Record | None:
        record: dict[str, Any] = {"shapes": {}, "numbers": {}, "buffers": {}}
        for path, inner in modules_of(module).items():
            prefix = f"{path}." if path else ""
            kinds = inner.__dict__.get(RECORD, _NOTHING)
            for kind in ("shapes", "numbers"):
                record[kind] |= {prefix + name: list(entry) for name, entry in kinds[kind].items()}
            for name, entry in kinds["buffers"].items():
                record["buffers"][prefix + name] = {dim: indices.tolist() for dim, indices in entry["kept"].items()}
        if fits := fits_of(module):
            record[FITS] = copy.deepcopy(fits)
        return record if record["shapes"] else None

    def infer(self, module: nn.Module, state: Mapping[str, Any]) -> Record | None:
        """Find where torch's own layers are narrower in a plain state dict; of other layers the rest isn't known."""
        modules = modules_of(module)
        tensors = named_tensors(module)
        shapes: dict[str, list[list[int]]] = {}
        for key, value in state.items():
            name = clean_name(key)
            tensor = tensors.get(name)
            if tensor is None or not isinstance(value, Tensor) or tensor.dim() != value.dim():
                continue
            if tensor.shape == value.shape:
                continue
            if any(size > whole for size, whole in zip(value.shape, tensor.shape, strict=True)):
                return None  # another model: loading says so
            owner = modules.get(name.rpartition(".")[0])
            if not isinstance(owner, STANDARD) or not value.numel():
                raise CompressionError(
                    f"`path` must tell how {name} lost channels. Received: {tuple(value.shape)} for "
                    f"{tuple(tensor.shape)}, in a {type(owner).__name__}. Write the file with save_compressed, or with "
                    "a Trainer."
                )
            shapes[name] = [list(tensor.shape), list(value.shape)]
        return {"shapes": shapes, "numbers": {}, "buffers": {}} if shapes else None

    def same(self, module: nn.Module, record: Record | None) -> bool:
        own, other = ({**(found or {}), FITS: None} for found in (self.record(module), record))
        return own == other

    def apply_(self, module: nn.Module, record: Record) -> None:
        """Give the module the widths of a record; where it names nothing, those that it was built with.

        The tensors are new: their values are to be loaded, but for buffers that no checkpoint holds.

        Raises:
            RuntimeError: the module was built with other widths than the record's.
        """
        tensors = named_tensors(module)
        own, record = {**_NOTHING, **(self.record(module) or {})}, {**_NOTHING, **record}
        wanted = {name: tuple(before) for name, (before, _) in own["shapes"].items()}
        built = {name: tuple(tensor.shape) for name, tensor in tensors.items()} | wanted
        for name, (before, now) in record["shapes"].items():
            if name not in tensors:
                continue  # what the module makes while it loads, such as adapters; what it doesn't, the load reports
            if built[name] != tuple(before):
                raise RuntimeError(
                    f"size mismatch for {name}: built as {tuple(before)} where the checkpoint was written, as "
                    f"{built[name]} here."
                )
            wanted[name] = tuple(now)
        kept = {
            name: {int(dim): torch.tensor(indices, dtype=torch.int64) for dim, indices in dims.items()}
            for name, dims in record["buffers"].items()
        }
        whole = {
            f"{path}.{name}".lstrip("."): entry["whole"]
            for path, inner in modules_of(module).items()
            for name, entry in inner.__dict__.get(RECORD, _NOTHING)["buffers"].items()
        }
        before_of = {name: tensors[name].detach().clone() for name in kept if name not in whole and not is_cached(name)}
        for name, shape in wanted.items():
            if tuple(tensors[name].shape) == shape and name not in whole:
                continue
            value = whole.get(name, tensors[name].detach())
            fits = name in kept or tuple(value.shape) == shape
            assign_(tensors[name], take(value, kept.get(name, {})) if fits else tensors[name].new_zeros(shape))
        numbers = {name: before for name, (before, _) in own["numbers"].items()}
        set_numbers_(module, numbers | {name: now for name, (_, now) in record["numbers"].items()})
        before_of |= _take_cached_(module, kept, whole)
        for inner in module.modules():
            inner.__dict__.pop(RECORD, None)
        modules = modules_of(module)
        for kind in ("shapes", "numbers"):
            for name, entry in record[kind].items():
                note_(module, modules, kind, name, list(entry))
        for fit in record.get(FITS, ()):
            note_fit_(module, fit)
        for name, dims in kept.items():
            note_(module, modules, "buffers", name, {"kept": dims, "whole": whole.get(name, before_of.get(name))})

    def revert_(self, module: nn.Module) -> None:
        self.apply_(module, {})


CHANGE = ChannelRemoval()


@torch.no_grad()
def _take_cached_(
    model: nn.Module, kept: Mapping[str, KeptIndices], whole: Mapping[str, Tensor | None]
) -> dict[str, Tensor]:
    """Cut the tensors that modules keep beside their own; returns those as they were."""
    for name, tensor in cached_tensors(model).items():
        if (value := whole.get(name)) is not None:
            assign_(tensor, value)
    tensors = cached_tensors(model)
    kept = present(model, {name: dims for name, dims in kept.items() if is_cached(name)})
    before = {name: tensors[name].detach().clone() for name in kept}
    for name, dims in kept.items():
        resize_(tensors[name], dims)
    forget_(model)
    return before
