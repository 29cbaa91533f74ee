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
from lightning_compress.quantization.lora.adapters import LowRank
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
        # What is converted is made anew: its weights are no tensors to be loaded into.
        return own["form"] == record["form"] in _EXTRA and _plain(own) == _plain(record)

    def apply_(self, module: nn.Module, record: Record) -> None:
        rebuild_(module, record)

    def revert_(self, module: nn.Module) -> None:
        convert.revert_(module, "float")

    def strip_(self, module: nn.Module) -> None:
        if CHILD in module._modules:
            unroute_(module)
            hide_float_values_(module)
        restore_fast_path_(module)

    def finish_(self, module: nn.Module) -> None:
        convert.convert_prepared_(module)
        if convert.form_of(module) == "adapted":
            convert.revert_(module, "float")

    def forget_(self, module: nn.Module) -> None:
        convert.forget_(module)

    def extra_state(self, module: nn.Module, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        form = convert.form_of(module)
        if form not in _EXTRA:
            return {}
        added = _added_keys(module)
        taken = [{key: state.pop(key) for key in added if key in state} for state in states]
        extra = [{key: value for key, value in state.items() if added[key] is None} for state in taken]
        return {_EXTRA[form]: extra[0] if form == "prepared" else _once(extra)}

    def load_extra_(self, module: nn.Module, states: Sequence[dict[str, Any]], entry: Record) -> None:
        form = convert.form_of(module)
        added = _added_keys(module) if form in _EXTRA else {}
        extra = entry.get(_EXTRA.get(form, ""), {})
        for index, state in enumerate(states):
            values = extra[index] if isinstance(extra, list) else extra
            for key, source in added.items():
                value = values.get(key) if source is None else state.get(source)
                if value is not None:
                    state[key] = value
            if not hasattr(state, "_metadata"):
                # Without their versions, torch reads quantized layers as if they were saved by its first release.
                state._metadata = module.state_dict()._metadata  # type: ignore[attr-defined]
        if form == "converted":
            _check_shapes(module, states[0])

    def sync_(self, copied: nn.Module, module: nn.Module) -> None:
        if (record := convert.record_of(module)) is None:
            convert.revert_(copied, "float")
            return
        if convert.form_of(copied) != record["form"]:
            rebuild_(copied, record)
        if record["form"] == "prepared":
            copy_ranges_(copied, module)
        if record["form"] == "adapted":
            convert.forget_(copied)
            for own, weight in zip(convert.packed_weights(copied), convert.packed_weights(module), strict=True):
                own.load_state_dict(weight.state_dict())

    def replaces_average(self, record: Record) -> bool:
        return bool(record["form"] == "converted")

    def check(self, record: Record, use: str) -> None:
        if (use, record["form"]) in _USES:
            raise CompressionError(_USES[use, record["form"]])


def _plain(record: Record) -> list[Any]:
    """Find what of a record loading cares about."""
    units = [[unit["path"], unit["hooked"], unit["floats"]] for unit in record["units"]]
    return [record["scheme"], units, record["layers"], record.get("low_rank"), record.get("trained")]


def _once(states: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Let later states hold the very tensors of the first where values are the same, as in a frozen base."""
    first = states[0]
    return [
        {key: first[key] if torch.equal(first[key].cpu(), value.cpu()) else value for key, value in state.items()}
        for state in states
    ]


def rebuild_(model: nn.Module, record: Mapping[str, Any]) -> None:
    """Give a model the form that ``record`` tells of; its weights are loaded afterwards.

    Raises:
        CompressionError: the model hasn't the modules that the record names.
    """
    convert.revert_(model, "float")
    convert.take_stored_(model, record)
    if record["form"] == "adapted":
        paths = [layer["path"] for layer in record["layers"]]
        convert.adapt_and_record_(model, paths, LowRank(**record["low_rank"]), record)
        convert.forget_(model)
        return
    convert.prepare_(model, record)
    if record["form"] == "converted":
        convert.convert_(model, judge=False)  # it has no weights yet


def _added_keys(model: nn.Module) -> dict[str, str | None]:
    """Return the keys of the state that aren't the user's, each with the user's key of the same tensor, or None."""
    state = model.state_dict(keep_vars=True)
    own = {id(value): key for key, value in state.items() if CHILD not in key.split(".")}
    return {key: own.get(id(value)) for key, value in state.items() if CHILD in key.split(".")}


def _check_shapes(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Raise `RuntimeError` where an int8 layer would take weights of another shape: it doesn't look at them itself."""
    for key, value in model.state_dict().items():
        own, other = _shapes(value), _shapes(state.get(key))
        if key in state and own != other:
            raise RuntimeError(f"size mismatch for {key}: {other} in the checkpoint, {own} in the model.")


def _shapes(value: Any) -> list[tuple[int, ...]]:
    """Return shapes of the tensors of a state entry; packed parameters are a tuple of them."""
    values = value if isinstance(value, tuple) else (value,)
    return [tuple(tensor.shape) for tensor in values if isinstance(tensor, Tensor)]


@torch.no_grad()
def copy_ranges_(twin: nn.Module, model: nn.Module) -> None:
    """Give a prepared ``twin`` the observers' values of ``model``."""
    added = _added_keys(model)
    source, target = model.state_dict(keep_vars=True), twin.state_dict(keep_vars=True)
    for key, alias in added.items():
        if alias is None and key in target and target[key].shape == source[key].shape:
            target[key].copy_(source[key])


CHANGE = Quantization()
