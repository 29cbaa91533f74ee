"""Makes a module's structure match the checkpoint that is being loaded, and keeps ours out of the user's keys.

While a callback of ours is at work, the instance's ``on_save_checkpoint`` and ``on_load_checkpoint`` are wrapped: they
run for weights-only saves too, and on load before the weights, with the whole checkpoint in hand.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from lightning_compress.errors import CompressionError
from lightning_compress.modules.copying import copy_module
from lightning_compress.structure.change import changes, in_entry, is_converted, match_, recorded
from lightning_compress.structure.hyperparameters import plain_modules_
from lightning_compress.structure.listener import averaged_copies, listeners

ENTRY = "lightning_compress"
VERSION = 1
STATES = ("state_dict", "current_model_state")
"""Where a checkpoint holds weights; the second is what averaging callbacks add."""


def attach(module: nn.Module) -> None:
    """Wrap the instance's checkpoint hooks; may be called again."""
    if not _is_wrapped(module):
        # Partials of plain functions: a deep copy of the module gets wrappers of its own, and no callback with its
        # Trainer.
        module.__dict__["on_save_checkpoint"] = partial(_on_save, module)
        module.__dict__["on_load_checkpoint"] = partial(_on_load, module)


def detach(module: nn.Module) -> None:
    """Unwrap the hooks, unless the module's structure is changed: then files that are saved later must say so."""
    if _is_wrapped(module) and not any(True for _ in recorded(module)):
        del module.__dict__["on_save_checkpoint"], module.__dict__["on_load_checkpoint"]


def _is_wrapped(module: nn.Module) -> bool:
    return getattr(module.__dict__.get("on_save_checkpoint"), "func", None) is _on_save


def _on_save(module: Any, checkpoint: dict[str, Any]) -> None:
    callbacks = listeners(module)
    for callback in callbacks.values():
        callback.sync_(module.trainer, module)
    type(module).on_save_checkpoint(module, checkpoint)
    entry = describe(module)
    if is_converted(module) and "current_model_state" in checkpoint:
        # The fit is over, and the module is the average; the float one that a callback still holds isn't wanted.
        checkpoint["state_dict"] = checkpoint.pop("current_model_state")
        checkpoint.pop("averaging_state", None)
    saved = {key: callback for key, callback in callbacks.items() if callback.kept_with_weights}
    if "callbacks" not in checkpoint:
        entry["callbacks"] = {key: callback.state_dict() for key, callback in saved.items()}
    plain_modules_(checkpoint, module)
    if saved or entry.keys() - {"version", "callbacks"}:
        checkpoint[ENTRY] = entry


def describe(module: nn.Module) -> dict[str, Any]:
    """Return the entry that describes a module's structure."""
    entry: dict[str, Any] = {"version": VERSION}
    for change, record in recorded(module):
        entry |= {change.key: copy.deepcopy(record), **change.extra_state(module)}
    return entry


def _on_load(module: Any, checkpoint: dict[str, Any]) -> None:
    entry, stage = read_entry(checkpoint), module.trainer.state.fn
    callbacks = listeners(module)
    saved = saved_states(checkpoint) | saved_states(entry)
    with _damage_told(module):
        for change, record in in_entry(entry):
            change.check(record, stage)
        for key, callback in callbacks.items():
            callback.check_entry(entry, stage)
            if saved.get(key):
                callback.check_state(saved[key])
    type(module).on_load_checkpoint(module, checkpoint)
    # On a copy first: a load that fails leaves the module as it was.
    load_state(copy_module(module), entry, copy.copy(checkpoint["state_dict"]), strict=module.strict_loading)
    _restore_structure_(module, entry, averaged_copies(module.trainer))
    for key, state in entry.get("callbacks", {}).items():
        if key in callbacks:
            callbacks[key].load_state_dict(state)


def saved_states(part: Mapping[str, Any]) -> dict[str, Any]:
    """Return the callbacks' states in a checkpoint, or in our entry of it.

    Raises:
        CompressionError: they aren't a dict.
    """
    states = part.get("callbacks", {})
    if not isinstance(states, Mapping):
        raise CompressionError(f"The checkpoint's `callbacks` must be a dict. Received: {type(states).__name__}.")
    return dict(states)


def read_entry(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return our entry of a checkpoint, empty if it has none.

    Raises:
        CompressionError: a newer version wrote it.
    """
    entry = checkpoint.get(ENTRY, {"version": VERSION})
    if not isinstance(entry, Mapping):
        raise CompressionError(f"The checkpoint's `{ENTRY}` entry must be a dict. Received: {type(entry).__name__}.")
    version = entry.get("version")
    if not isinstance(version, int) or version != VERSION:
        raise CompressionError(
            f"The checkpoint's `{ENTRY}` entry must have version {VERSION}. "
            f"Received: version={version!r}. Update lightning_compress."
        )
    return dict(entry)


def load_state(module: nn.Module, entry: Mapping[str, Any], state: dict[str, Any], strict: bool = True) -> None:
    """Give ``module`` the structure and the weights of a checkpoint.

    Raises:
        CompressionError: they are of another module.
    """
    with _damage_told(module):
        _restore_structure_(module, entry)
        module.load_state_dict(state, strict=strict)


@contextmanager
def _damage_told(module: nn.Module) -> Iterator[None]:
    try:
        yield
    except CompressionError:
        raise
    except Exception as error:  # a damaged entry raises whatever it may
        # torch names every missing and unexpected key and every other shape, in many lines.
        found = " ".join(str(error).split())[:800]
        raise CompressionError(
            f"The checkpoint must fit {type(module).__name__}. Received: {type(error).__name__}: {found} "
            "Build the model as it was built for training."
        ) from error


def _restore_structure_(module: nn.Module, entry: Mapping[str, Any], copies: Iterable[nn.Module] = ()) -> None:
    """Give a module and its averaged copies the structure of ``entry``."""
    match_(module, entry)
    for change, _ in in_entry(entry):
        change.load_extra_(module, entry)
    for copied in copies:
        match_(copied, entry)
        for change in changes():
            change.sync_(copied, module)
