"""Example inputs: the one rule by which a batch becomes the arguments of a module's ``forward``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.errors import CompressionError

Call = tuple[tuple[Any, ...], dict[str, Any]]


def example_call(model: nn.Module, batch: Any = None) -> Call:
    """``(args, kwargs)`` for ``model.forward``: its ``example_input_array``, else ``batch`` bound to the signature.

    A mapping gives the keys that name parameters of ``forward``; a tuple or list gives its first element (by the same
    rule); anything else is the first argument.

    Raises:
        CompressionError: there is neither, or the batch doesn't bind.

    Example:
        >>> import torch
        >>> args, kwargs = example_call(nn.Linear(2, 1), (torch.zeros(3, 2), torch.zeros(3)))
        >>> args[0].shape, kwargs
        (torch.Size([3, 2]), {})
    """
    example = getattr(model, "example_input_array", None)
    if example is not None:
        return bind_example(example, next((parameter.device for parameter in model.parameters()), None))
    if batch is None:
        raise CompressionError(
            f"`{type(model).__name__}` must have example inputs. Received: no batch, no `example_input_array`. "
            "Set `self.example_input_array` on the module, or pass a batch."
        )
    parameters = _signature(model).parameters
    calls: list[Call] = []
    first = batch
    if isinstance(batch, (tuple, list)) and not hasattr(batch, "_fields"):
        first = batch[0] if batch else batch
    if isinstance(first, Mapping):
        calls.append(((), _matching(first, parameters)))
    if not isinstance(batch, Mapping):
        calls.append(((first,), {}))
    for call in calls:
        if (error := _misfit(model, call)) is None:
            return call
    raise CompressionError(
        f"The batch must bind to {type(model).__name__}.forward{_signature(model)}. "
        f"Received: {error}. Set `example_input_array`, or define `calibration_step(batch)` on the module."
    )


def _signature(model: nn.Module) -> inspect.Signature:
    # Of the class: on the instance, forward may be routed into a traced form that takes anything.
    return inspect.signature(MethodType(type(model).forward, model))


def _misfit(model: nn.Module, call: Call) -> str | None:
    """Why ``forward`` can't be called so; None if it can."""
    try:
        _signature(model).bind(*call[0], **call[1])
    except TypeError as error:
        return str(error)
    return None


def bind_example(example: Any, device: Any = None) -> Call:
    """An `example_input_array` as Lightning reads it: a tuple is the arguments, a dict the keywords."""
    if device is not None:
        example = pytree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, example)
    if isinstance(example, dict):
        return (), example
    return (tuple(example) if isinstance(example, tuple) else (example,)), {}


def _matching(batch: Mapping[Any, Any], parameters: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """The entries that name parameters; all of them where ``forward`` takes ``**kwargs`` and nothing else matches."""
    found = {key: value for key, value in batch.items() if key in parameters}
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    return found or (dict(batch) if takes_any else {})


def run_step(model: nn.Module, batch: Any) -> Any:
    """What a look at the model runs: its own ``calibration_step(batch)`` if it has one, else ``forward``."""
    step = getattr(model, "calibration_step", None)
    if step is not None:
        return step(batch)
    args, kwargs = example_call(model, batch)
    return model(*args, **kwargs)
