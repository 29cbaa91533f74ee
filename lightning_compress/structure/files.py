"""Saves and loads files without a Trainer: `save_compressed` and `load_compressed`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_compress.errors import CompressionError, in_a_line, invalid
from lightning_compress.modules.copying import copy_module
from lightning_compress.modules.routing import routed_modules
from lightning_compress.structure.change import changes, recorded
from lightning_compress.structure.checkpoint import (
    ENTRY,
    STATES,
    attach,
    describe,
    load_state,
    read_entry,
    saved_states,
)
from lightning_compress.structure.inert import read_inert
from lightning_compress.whole_file import whole_file

_REMEDY = "Save tensors and plain data: torch.save(model.state_dict(), path)."
_RESTORED = "_restored_callback_states"

Model = TypeVar("Model", bound=nn.Module)


def save_compressed(model: nn.Module, path: str) -> None:
    """Save a module that has no Trainer: quantized, or with channels removed; `load_compressed` reads the file.

    Args:
        model: any module, compressed or not.
        path: of the file.

    Raises:
        CompressionError: it is a part of what was quantized, or holds that, and doesn't know what was done. Or the file
            can't be written; what stood there stays.

    Example:
        >>> import tempfile, os
        >>> from lightning_compress import quantize
        >>> int8 = quantize(nn.Sequential(nn.Linear(8, 4)), "int8_dynamic")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_compressed(int8, os.path.join(folder, "int8.ckpt"))
        ...     again = load_compressed(os.path.join(folder, "int8.ckpt"), nn.Sequential(nn.Linear(8, 4)))
        >>> torch.equal(again(torch.ones(1, 8)), int8(torch.ones(1, 8)))
        True
    """
    if routed_modules(model) and not any(not change.is_float for change, _ in recorded(model)):
        remedy = "Save that one: a part, or a module around it, doesn't know what was done."
        raise invalid("model", "be the module that was quantized", type(model).__name__, remedy)
    try:
        with whole_file(path) as begun, begun.open("wb") as file:
            torch.save({"state_dict": model.state_dict(), ENTRY: describe(model)}, file)
    except OSError as error:
        raise invalid("path", "be a file that can be written", str(path), f"{in_a_line(error)}.") from error


def load_compressed(path: str, model: Model) -> Model:
    """Load any checkpoint of ours, or of plain Lightning, into a freshly built float ``model``.

    Everything comes back: masked weights, removed channels, fake-quantizers with their observers, an int8 form. What a
    fit needs of our callbacks' state (masks) waits on the model for the next fit with such a callback.

    Args:
        path: a Lightning checkpoint, ``save_weights_only`` included, or a plain state dict. No code in it is run:
            where it also holds objects of other classes, such as a network among the hyperparameters, these are left
            out, and named in a warning.
        model: the module as its constructor makes it. It is changed in place.

    Returns:
        ``model``.

    Raises:
        CompressionError: the file can't be read, or doesn't fit; the model is unchanged then.
    """
    try:
        checkpoint, left_out = read_inert(path, "load_compressed")
    except Exception as error:  # torch.load raises a dozen types, by file format
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise invalid("path", "be a readable checkpoint", str(path), why) from error
    for place, kind in left_out.items():
        if place.partition(".")[0] in ("", ENTRY, *STATES):
            must = "hold weights that can be read without running code from the file"
            raise invalid("path", must, str(path), f"`{place or 'its content'}` is of class {kind}. {_REMEDY}")
    if isinstance(checkpoint, dict) and checkpoint and all(isinstance(value, Tensor) for value in checkpoint.values()):
        checkpoint = {"state_dict": checkpoint}
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise invalid("path", "be a checkpoint with a `state_dict`", str(path))
    entry = read_entry(checkpoint)
    states = saved_states(checkpoint) | saved_states(entry)
    if ENTRY not in checkpoint:  # one of ours says what was done
        inferred = {change.key: change.infer(model, checkpoint["state_dict"]) for change in changes()}
        entry |= {key: record for key, record in inferred.items() if record is not None}
    # On a copy first: a load that fails leaves the model as it was.
    for target in (copy_module(model), model):
        try:
            _load(target, copy.copy(checkpoint), entry)
        except CompressionError as error:
            raise invalid("path", "hold a checkpoint of this model", str(path), str(error)) from error
    for change, _ in recorded(model):
        try:
            change.settle_(model)
        except Exception as error:  # not tried on the copy, since it takes as long as all the rest
            remedy = f"{in_a_line(error)} It was changed: build it anew."
            raise invalid("path", "hold a checkpoint of this model", str(path), remedy) from error
        change.forget_(model)
        if hasattr(model, "on_save_checkpoint"):
            attach(model)
    model.__dict__[_RESTORED] = states
    return model


def _load(model: nn.Module, checkpoint: dict[str, Any], entry: Mapping[str, Any]) -> None:
    """Do what a Trainer does when it loads: the module's own hooks, the structure, the weights."""
    for name, arguments in (("configure_model", ()), ("on_load_checkpoint", (checkpoint,))):
        if hasattr(type(model), name):
            getattr(type(model), name)(model, *arguments)
    load_state(model, entry, copy.copy(checkpoint["state_dict"]))


def restored_state(module: nn.Module, key: str) -> dict[str, Any] | None:
    """Return, once, the state of the callback with ``key`` that `load_compressed` left on the module."""
    state: dict[str, Any] | None = vars(module).get(_RESTORED, {}).pop(key, None)
    return state
