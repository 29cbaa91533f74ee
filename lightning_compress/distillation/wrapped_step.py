"""A LightningModule's own ``training_step``, on the instance, so that a callback can add to its loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from lightning_compress.callback import compression_callbacks


def wrap_step_(module: Any) -> None:
    """Hand the instance's ``training_step`` to the callback that ``serves`` the module; a deep copy keeps its own."""
    # A partial of a plain function: a deep copy gets one of its own, and no callback with its Trainer.
    wrapped = partial(_served_step, module, module.__dict__.get("training_step"))
    wrapped.__wrapped__ = type(module).training_step  # type: ignore[attr-defined]  # Lightning reads its signature
    module.__dict__["training_step"] = wrapped


def unwrap_step_(module: Any) -> None:
    """Give the instance back what it had; may be called twice."""
    wrapped = module.__dict__.get("training_step")
    if isinstance(wrapped, partial) and wrapped.func is _served_step:
        del module.__dict__["training_step"]
        if wrapped.args[1] is not None:
            module.__dict__["training_step"] = wrapped.args[1]


def _served_step(module: Any, previous: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
    step = previous or partial(type(module).training_step, module)
    for callback in [] if module._trainer is None else compression_callbacks(module._trainer):  # a copy may have none
        if callback.serves(module):
            return callback.teach(partial(step, **kwargs), module, args)
    return step(*args, **kwargs)
