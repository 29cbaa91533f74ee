"""Quantization as a change of a module's structure: see `StructuralChange`."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from lightning_compress.errors import CompressionError
from lightning_compress.modules.fast_path import restore_fast_path_
from lightning_compress.modules.paths import modules_of
from lightning_compress.modules.routing import Form, form_of, routed_modules, strip_
from lightning_compress.quantization import convert
from lightning_compress.quantization.static.int8_unit import Int8Unit
from lightning_compress.structure.change import Record, StructuralChange

_EXTRA = "ranges"
"""Where an entry holds what forms know beside the weights: the ranges of activations."""

_USES = {
    ("fit", "converted"): "`ckpt_path` must be a float or a prepared checkpoint to train from. Received: one of a "
    "converted int8 model, whose float weights are gone. Resume from a checkpoint that was saved during training.",
    ("train", "adapted"): "`model` must have float weights. Received: one with adapters over 4-bit weights (QLoRA). "
    "Merge them first: merge_adapters(model); of a checkpoint after load_compressed, and fit without `ckpt_path`.",
    ("float", "adapted"): "`model` must be a float model. Received: one with adapters over 4-bit weights (QLoRA). "
    "Merge them first: merge_adapters(model).",
    ("float", "prepared"): "`model` must be a float model. Received: one that is prepared already. Quantize last, and "
    "start from the float model.",
    ("float", "converted"): "`model` must be a float model. Received: one that is converted already. Quantize last, "
    "and start from the float model.",
}
"""What a use says to a form that it can't take."""


class Quantization(StructuralChange):
    """Makes and takes back the forms of a quantized module: prepared, converted, adapted."""

    key = "quantization"
    is_float = False

    def record(self, module: nn.Module) -> Record | None:
        record: Record | None = vars(module).get(convert.RECORD)
        return record

    def same(self, module: nn.Module, record: Record | None) -> bool:
        own = convert.record_of(module)
        if own is None or record is None:
            return own is record
        return bool(own["form"] == record["form"]) and _plain(own) == _plain(record)

    def apply_(self, module: nn.Module, record: Record) -> None:
        convert.rebuild_(module, record)

    def revert_(self, module: nn.Module) -> None:
        convert.revert_(module, "float")

    def strip_(self, module: nn.Module) -> None:
        if form_of(module) is not None:
            strip_(module)
        restore_fast_path_(module)

    def finish_(self, module: nn.Module) -> None:
        convert.convert_prepared_(module)
        if convert.form_name(module) == "adapted":
            convert.revert_(module, "float")

    def forget_(self, module: nn.Module) -> None:
        convert.forget_(module)

    def extra_state(self, module: nn.Module) -> dict[str, Any]:
        states = {path: copy.deepcopy(form.extra_state()) for path, form in _forms(module).items()}
        return {_EXTRA: {path: state for path, state in states.items() if state}}

    def load_extra_(self, module: nn.Module, entry: Record) -> None:
        for path, form in _forms(module).items():
            if path in entry.get(_EXTRA, {}):
                form.load_extra_(entry[_EXTRA][path])

    def settle_(self, module: nn.Module) -> None:
        for inner, form in routed_modules(module).items():
            if isinstance(form, Int8Unit):
                form.build_(inner)

    def sync_(self, copied: nn.Module, module: nn.Module) -> None:
        if (record := convert.record_of(module)) is None:
            convert.revert_(copied, "float")
            return
        if convert.form_name(copied) != record["form"]:
            convert.revert_(copied, "float")
            convert.rebuild_(copied, record, convert.traces_of(module))
        if record["form"] == "prepared":
            self.load_extra_(copied, self.extra_state(module))
        if record["form"] == "adapted":
            convert.forget_(copied)
            for own, weight in zip(convert.packed_weights(copied), convert.packed_weights(module), strict=True):
                if own.codes.device == weight.codes.device:
                    own.hold_(**weight.saved())  # the same memory: a file has them once
                else:
                    own.copy_(weight.tensors())

    def replaces_average(self, record: Record) -> bool:
        return bool(record["form"] == "converted")

    def check(self, record: Record, use: str) -> None:
        if (use, record["form"]) in _USES:
            raise CompressionError(_USES[use, record["form"]])


def _plain(record: Record) -> list[Any]:
    """Find what of a record loading cares about."""
    units = [
        [*(unit.get(name) for name in ("path", "hooked", "floats", "coded")), list(unit["moved"])]
        for unit in record["units"]
    ]
    return [record["scheme"], units, record["layers"], record.get("low_rank"), record.get("trained")]


def _forms(module: nn.Module) -> dict[str, Form]:
    """Return the forms in a model by the paths of their modules."""
    return {path: form for path, inner in modules_of(module).items() if (form := form_of(inner)) is not None}


CHANGE = Quantization()
