"""Makes a module's structure match the checkpoint that is being loaded, and keeps ours out of the user's keys.

While a callback of ours is at work, the instance's ``on_save_checkpoint`` and ``on_load_checkpoint`` are wrapped: they
run for weights-only saves too, and on load before the weights, with the whole checkpoint in hand.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_compress.channels.cutting import record as channel_record
from lightning_compress.errors import CompressionError, invalid
from lightning_compress.modules.copying import copy_module
from lightning_compress.quantization import convert
from lightning_compress.structure.hyperparameters import plain_modules_
from lightning_compress.structure.inert import read_inert

ENTRY = "lightning_compress"
VERSION = 1
STATES = ("state_dict", "current_model_state")
"""Where a checkpoint holds weights; the second is what averaging callbacks add."""

_ADDED = {"prepared": "observers", "adapted": "adapters"}
"""Where an entry holds what such a form adds to the user's keys; of adapters, for each of a checkpoint's states."""

_REMEDY = "Save tensors and plain data: torch.save(model.state_dict(), path)."

_RESTORED = "_restored_callback_states"

Model = TypeVar("Model", bound=nn.Module)


def attach(module: nn.Module) -> None:
    """Wrap the instance's checkpoint hooks; may be called again."""
    if not _is_wrapped(module):
        # Partials of plain functions: a deep copy of the module gets wrappers of its own, and no callback with its
        # Trainer.
        module.__dict__["on_save_checkpoint"] = partial(_on_save, module)
        module.__dict__["on_load_checkpoint"] = partial(_on_load, module)


def detach(module: nn.Module) -> None:
    """Unwrap, unless the module is int8 or has lost channels: then what is saved later must still say so."""
    if _is_wrapped(module) and convert.form_of(module) == "float" and not channel_record.record_of(module):
        del module.__dict__["on_save_checkpoint"], module.__dict__["on_load_checkpoint"]


def _is_wrapped(module: nn.Module) -> bool:
    return getattr(module.__dict__.get("on_save_checkpoint"), "func", None) is _on_save


def callbacks_of(module: Any) -> dict[str, Any]:
    """Our callbacks by their keys, found anew each time: a hook that held them would copy them with the module."""
    trainer = getattr(module, "_trainer", None)
    callbacks = trainer.callbacks if trainer is not None else ()
    return {callback.state_key: callback for callback in callbacks if hasattr(callback, "sync_")}


def averaged_copies(trainer: Any) -> Iterator[nn.Module]:
    """The averaged copies that callbacks hold (`WeightAveraging`, SWA): every change is made to them too."""
    for callback in trainer.callbacks:
        average = getattr(callback, "_average_model", None)
        if isinstance(average, nn.Module):
            yield average.module if isinstance(average, AveragedModel) else average


def _on_save(module: Any, checkpoint: dict[str, Any]) -> None:
    callbacks = callbacks_of(module)
    for callback in callbacks.values():
        callback.sync_(module.trainer, module)
    type(module).on_save_checkpoint(module, checkpoint)
    entry = _describe(module)
    record = convert.record_of(module)
    if record is not None:
        if record["form"] in _ADDED:
            added = convert.added_keys(module)
            taken = [convert.take_added_(checkpoint[name], added) for name in STATES if name in checkpoint]
            entry[_ADDED[record["form"]]] = taken[0] if record["form"] == "prepared" else _once(taken)
        elif "current_model_state" in checkpoint:
            # The fit is over: the int8 model is the average, and the float average that a callback still holds isn't
            # wanted.
            checkpoint["state_dict"] = checkpoint.pop("current_model_state")
            checkpoint.pop("averaging_state", None)
    if "callbacks" not in checkpoint:
        entry["callbacks"] = {key: callback.state_dict() for key, callback in callbacks.items()}
    plain_modules_(checkpoint, module)
    if callbacks or entry.keys() - {"version", "callbacks"}:
        checkpoint[ENTRY] = entry


def _once(states: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The states, with later ones holding the very tensors of the first where values are the same: a frozen base."""
    first = states[0]
    return [
        {key: first[key] if torch.equal(first[key].cpu(), value.cpu()) else value for key, value in state.items()}
        for state in states
    ]


def _describe(module: nn.Module) -> dict[str, Any]:
    """What an entry says of a module's structure."""
    entry: dict[str, Any] = {"version": VERSION}
    if (record := convert.record_of(module)) is not None:
        entry["quantization"] = copy.deepcopy(record)
    if removed := channel_record.record_of(module):
        entry["channels"] = removed
    return entry


def _on_load(module: Any, checkpoint: dict[str, Any]) -> None:
    entry = read_entry(checkpoint)
    trainer = module.trainer
    if trainer.state.fn == "fit" and entry.get("quantization", {}).get("form") == "converted":
        raise CompressionError(
            "`ckpt_path` must be a float or a prepared checkpoint to train from. Received: one of a converted int8 "
            "model, whose float weights are gone. Resume from a checkpoint that was saved during training."
        )
    for callback in callbacks_of(module).values():
        callback.check_entry(entry, trainer.state.fn)
    type(module).on_load_checkpoint(module, checkpoint)
    states = _editable(checkpoint)
    _load_on_copy(module, entry, copy.copy(states[0]), strict=module.strict_loading)
    restore_structure_(module, entry, states, copies=averaged_copies(trainer))
    for key, state in entry.get("callbacks", {}).items():
        if key in callbacks_of(module):
            callbacks_of(module)[key].load_state_dict(state)


def read_entry(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Our entry of a checkpoint, empty if it has none.

    Raises:
        CompressionError: a newer version wrote it.
    """
    entry = checkpoint.get(ENTRY, {"version": VERSION})
    if entry.get("version") != VERSION:
        raise CompressionError(
            f"The checkpoint's `{ENTRY}` entry must have version {VERSION}. "
            f"Received: version={entry.get('version')!r}. Update lightning_compress."
        )
    return dict(entry)


def _editable(checkpoint: dict[str, Any]) -> list[dict[str, Any]]:
    """The checkpoint's states, made dicts of a kind that can carry the versions of its modules."""
    for name in STATES:
        if name in checkpoint and not isinstance(checkpoint[name], OrderedDict):
            checkpoint[name] = OrderedDict(checkpoint[name])
    return [checkpoint[name] for name in STATES if name in checkpoint]


def restore_structure_(
    module: nn.Module, entry: Mapping[str, Any], states: list[dict[str, Any]], copies: Iterable[nn.Module] = ()
) -> None:
    """Give ``module`` (and averaged copies of it) the structure that ``entry`` tells of, and ``states`` its keys."""
    record = entry.get("quantization")
    removed = entry.get("channels", {})
    if record is None or not channel_record.fits(module, removed):
        convert.revert_(module, "float")
    copies = list(copies)
    for each in (module, *copies):
        if not channel_record.fits(each, removed):
            convert.revert_(each, "float")
            channel_record.take_widths_(each, removed)
    if record is None:
        pass
    elif not _already(module, record):
        convert.rebuild_(module, record)
    for copied in copies:
        convert.quantized_like_(copied, module)
    if record is not None:
        added = convert.added_keys(module) if record["form"] in _ADDED else {}
        for index, state in enumerate(states):
            kept = entry.get(_ADDED.get(record["form"], ""), {})
            convert.put_added_(state, added, kept[index] if isinstance(kept, list) else kept)
            if not hasattr(state, "_metadata"):
                # Without their versions, torch reads quantized layers as if they were saved by its first release.
                state._metadata = module.state_dict()._metadata  # type: ignore[attr-defined]


def _load_on_copy(module: nn.Module, entry: Mapping[str, Any], state: dict[str, Any], strict: bool = True) -> None:
    """Try the whole load on a copy, so that one that fails leaves the module as it was."""
    _load_state(copy_module(module), entry, state, strict)


def _load(model: nn.Module, checkpoint: dict[str, Any], entry: Mapping[str, Any]) -> None:
    """What a Trainer does when it loads: the module's own hooks, the structure, the weights."""
    for name, arguments in (("configure_model", ()), ("on_load_checkpoint", (checkpoint,))):
        if hasattr(type(model), name):
            getattr(type(model), name)(model, *arguments)
    [state] = _editable({"state_dict": copy.copy(checkpoint["state_dict"])})
    _load_state(model, entry, state)


def _load_state(model: nn.Module, entry: Mapping[str, Any], state: dict[str, Any], strict: bool = True) -> None:
    try:
        restore_structure_(model, entry, [state])
        convert.check_shapes(model, state)
        model.load_state_dict(state, strict=strict)
    except (RuntimeError, KeyError, AttributeError, TypeError, IndexError) as error:
        # torch names every missing and unexpected key and every other shape; quantized layers only their own.
        raise CompressionError(
            f"The checkpoint must fit {type(model).__name__}. Received: {type(error).__name__}: {str(error)[:800]} "
            "Build the model as it was built for training."
        ) from error


def _already(module: nn.Module, record: Mapping[str, Any]) -> bool:
    """Whether a prepared module has just the units that the checkpoint has."""
    mine = convert.record_of(module)
    return mine is not None and mine["form"] == record["form"] in _ADDED and _plain(mine) == _plain(record)


def _plain(record: Mapping[str, Any]) -> list[Any]:
    units = [[unit["path"], unit["hooked"], unit["floats"]] for unit in record["units"]]
    return [record["scheme"], units, record["layers"], record.get("low_rank"), record.get("trained")]


def save_compressed(model: nn.Module, path: str) -> None:
    """Save a module that has no Trainer: quantized, or with channels removed; `load_compressed` reads the file.

    Args:
        model: any module, compressed or not.
        path: of the file.

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
    torch.save({"state_dict": model.state_dict(), ENTRY: _describe(model)}, path)


def load_compressed(path: str, model: Model) -> Model:
    """Load any checkpoint of ours, or of plain Lightning, into a freshly built float ``model``.

    Everything comes back: masked weights, removed channels, fake-quantizers with their observers, an int8 form. What a
    fit needs of our callbacks' state (masks) waits on the model for the next fit with such a callback.

    Args:
        path: a Lightning checkpoint, ``save_weights_only`` included, or a plain state dict. No code in it is run:
            where it also holds objects of other classes, such as a network among the hyperparameters, these are left
            out, and named in a warning.
        model: the module as its constructor makes it. It is changed in place and returned.

    Raises:
        CompressionError: the file can't be read, or doesn't fit; the model is unchanged then.
    """
    try:
        checkpoint, left_out = read_inert(path, "load_compressed")
    except Exception as error:  # torch.load raises a dozen types, by file format
        raise invalid("path", "be a readable checkpoint", str(path), f"{type(error).__name__}: {error}") from error
    for place, kind in left_out.items():
        if place.partition(".")[0] in ("", ENTRY, *STATES):
            must = "hold weights that can be read without running code from the file"
            raise invalid("path", must, str(path), f"`{place or 'its content'}` is of class {kind}. {_REMEDY}")
    if isinstance(checkpoint, dict) and checkpoint and all(isinstance(one, Tensor) for one in checkpoint.values()):
        checkpoint = {"state_dict": checkpoint}
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise invalid("path", "be a checkpoint with a `state_dict`", str(path))
    entry = read_entry(checkpoint)
    if ENTRY not in checkpoint:  # one of ours says which channels left
        entry["channels"] = channel_record.by_shapes(model, checkpoint["state_dict"])
    # On a copy first: a load that fails leaves the model as it was.
    for target in (copy_module(model), model):
        try:
            _load(target, copy.copy(checkpoint), entry)
        except CompressionError as error:
            raise invalid("path", "hold a checkpoint of this model", str(path), str(error)) from error
    if entry.get("quantization", {}).get("form") == "converted":
        convert.forget_(model)
    if hasattr(model, "on_save_checkpoint") and (convert.record_of(model) or channel_record.record_of(model)):
        attach(model)
    model.__dict__[_RESTORED] = {**checkpoint.get("callbacks", {}), **entry.get("callbacks", {})}
    return model


def restored_state(module: nn.Module, key: str) -> dict[str, Any] | None:
    """The state of the callback with ``key`` that `load_compressed` left on the module; given once."""
    states: dict[str, Any] = module.__dict__.get(_RESTORED, {})
    state: dict[str, Any] | None = states.pop(key, None)
    return state
