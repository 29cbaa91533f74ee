"""Quantization as a change of a module's structure: see `StructuralChange`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.errors import CompressionError
from lightning_compress.modules.fast_path import restore_fast_path_
from lightning_compress.modules.routing import CHILD, unroute_
from lightning_compress.quantization import convert
from lightning_compress.quantization.layers.float_values import hide_float_values_
from lightning_compress.structure.change import Record, StructuralChange

_EXTRA = {"prepared": "observers", "adapted": "adapters"}
"""Where an entry holds what such a form adds to the user's keys; of adapters, for each of a checkpoint's states."""

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


class Quantization:
    """The forms of a quantized module: prepared, converted, adapted."""

    key = "quantization"
    is_float = False

    def record(self, module: nn.Module) -> Record | None:
        return convert.record_of(module)

    def infer(self, module: nn.Module, state: Mapping[str, Any]) -> Record | None:
        return None

    def same(self, module: nn.Module, record: Record | None) -> bool:
        own = convert.record_of(module)
        if own is None or record is None:
            return own is record
        # What is converted is made anew: its weights are no tensors to be loaded into.
        return own["form"] == record["form"] in _EXTRA and _plain(own) == _plain(record)

    def apply_(self, module: nn.Module, record: Record) -> None:
        convert.rebuild_(module, record)

    def revert_(self, module: nn.Module) -> None:
        convert.revert_(module, "float")

    def strip_(self, module: nn.Module) -> None:
        if CHILD in module._modules:
            unroute_(module)
            hide_float_values_(module)
        restore_fast_path_(module)

    def forget_(self, module: nn.Module) -> None:
        convert.forget_(module)

    def extra_state(self, module: nn.Module, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        form = convert.form_of(module)
        if form not in _EXTRA:
            return {}
        added = convert.added_keys(module)
        taken = [convert.take_added_(state, added) for state in states]
        return {_EXTRA[form]: taken[0] if form == "prepared" else _once(taken)}

    def load_extra_(self, module: nn.Module, states: Sequence[dict[str, Any]], entry: Record) -> None:
        form = convert.form_of(module)
        added = convert.added_keys(module) if form in _EXTRA else {}
        for index, state in enumerate(states):
            extra = entry.get(_EXTRA.get(form, ""), {})
            convert.put_added_(state, added, extra[index] if isinstance(extra, list) else extra)
            if not hasattr(state, "_metadata"):
                # Without their versions, torch reads quantized layers as if they were saved by its first release.
                state._metadata = module.state_dict()._metadata  # type: ignore[attr-defined]
        if form == "converted":
            convert.check_shapes(module, states[0])

    def sync_(self, copied: nn.Module, module: nn.Module) -> None:
        convert.quantized_like_(copied, module)

    def replaces_average(self, record: Record) -> bool:
        return bool(record["form"] == "converted")

    def check(self, record: Record, use: str) -> None:
        if (use, record["form"]) in _USES:
            raise CompressionError(_USES[use, record["form"]])


def _plain(record: Record) -> list[Any]:
    """What of a record loading cares about."""
    units = [[unit["path"], unit["hooked"], unit["floats"]] for unit in record["units"]]
    return [record["scheme"], units, record["layers"], record.get("low_rank"), record.get("trained")]


def _once(states: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The states, with later ones holding the very tensors of the first where values are the same: a frozen base."""
    first = states[0]
    return [
        {key: first[key] if torch.equal(first[key].cpu(), value.cpu()) else value for key, value in state.items()}
        for state in states
    ]


CHANGE: StructuralChange = Quantization()
