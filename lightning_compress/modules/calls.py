"""How does a batch become the arguments of a module's ``forward``? And how does it run without a Trainer?"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.errors import CompressionError
from lightning_compress.modules.isolation import isolated_random_state
from lightning_compress.modules.outputs import flatten
from lightning_compress.modules.paths import device_of

Call = tuple[tuple[Any, ...], dict[str, Any]]


def bind_batch(model: nn.Module, batch: Any) -> list[Call]:
    """Return the ways ``(args, kwargs)`` in which ``batch`` fits the signature of ``model.forward``, likeliest first.

    The entries of a mapping, the fields of a named tuple or of a dataclass are the arguments whose names they have; of
    a tuple or list the first element counts (by the same rule); anything else is the first argument.

    Raises:
        CompressionError: the batch doesn't bind.

    Example:
        >>> import torch
        >>> args, kwargs = bind_batch(nn.Linear(2, 1), (torch.zeros(3, 2), torch.zeros(3)))[0]
        >>> args[0].shape, kwargs
        (torch.Size([3, 2]), {})
    """
    signature = _signature(model)
    calls, error = list[Call](), TypeError("it is empty")
    for args, kwargs in _bindings(batch, signature.parameters):
        try:
            signature.bind(*args, **kwargs)
            calls.append((args, kwargs))
        except TypeError as misfit:
            error = misfit if not calls else error
    if calls:
        return calls
    raise _misfit(model, str(error))


def _signature(model: nn.Module) -> inspect.Signature:
    # Of the class: on the instance, forward may be routed into a traced form that takes anything.
    return inspect.signature(MethodType(type(model).forward, model))


def parameter_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of what ``model.forward`` takes by position."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(name for name, parameter in _signature(model).parameters.items() if parameter.kind in kinds)


def _misfit(model: nn.Module, reason: str) -> CompressionError:
    return CompressionError(
        f"The batch must bind to {type(model).__name__}.forward{_signature(model)}. "
        f"Received: {reason}. Define `calibration_step(batch)` on the module."
    )


def _bindings(batch: Any, parameters: Mapping[str, inspect.Parameter]) -> Iterator[Call]:
    fields = _fields(batch)
    if fields is not None:
        if matching := _matching(fields, parameters):
            yield (), matching
        yield (batch,), {}
        if not isinstance(batch, Mapping):
            yield from (((first,), {}) for first in list(fields.values())[:1])
    elif isinstance(batch, tuple | list):
        if batch and isinstance(batch[0], Mapping) and (matching := _matching(batch[0], parameters)):
            yield (), matching
        yield from (((first,), {}) for first in batch[:1])
    else:
        yield (batch,), {}


def _fields(batch: Any) -> Mapping[Any, Any] | None:
    """Return the named parts of a batch, if they have names."""
    if isinstance(batch, Mapping):
        return batch
    if isinstance(batch, tuple) and hasattr(batch, "_asdict"):
        return dict(batch._asdict())
    if dataclasses.is_dataclass(batch):
        return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return None


def _matching(fields: Mapping[Any, Any], parameters: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """Return the entries that name parameters; all where ``forward`` takes ``**kwargs`` and nothing else matches."""
    found = {key: value for key, value in fields.items() if key in parameters}
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    return found or (dict(fields) if takes_any else {})


def bind_example(example: Any, device: Any = None) -> Call:
    """Read an `example_input_array` as Lightning does: a tuple is the arguments, a dict the keywords."""
    if device is not None:
        example = pytree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, example)
    if isinstance(example, dict):
        return (), example
    return (tuple(example) if isinstance(example, tuple) else (example,)), {}


def run_example(model: nn.Module) -> Any:
    """Run ``forward`` on the ``example_input_array``: its shapes are right, its values may be anything."""
    args, kwargs = bind_example(model.example_input_array, device_of(model))
    return model(*args, **kwargs)


class Forward:
    """Runs ``forward`` on batches, bound in the likeliest way that works; what has worked is tried first from then on.

    Raises:
        CompressionError: when called with a batch that doesn't bind, or none of several ways works.
    """

    __name__ = "forward"

    def __init__(self) -> None:
        self._first = 0

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        calls = bind_batch(model, batch)
        if len(calls) == 1 and not isinstance(batch, Mapping):
            args, kwargs = calls[0]
            return model(*args, **kwargs)
        reason = ""
        for place in sorted(range(len(calls)), key=lambda place: place != self._first):
            args, kwargs = calls[place]
            try:
                output = model(*args, **kwargs)
            except Exception as error:  # the next way may be what `forward` means
                reason = reason or f"{type(error).__name__}: {error}"
            else:
                self._first = place
                return output
        raise _misfit(model, reason)


def run_step(model: nn.Module, batch: Any) -> Any:
    """Run a batch through a module without a Trainer: by its ``calibration_step(batch)``, else by ``forward``."""
    return way_without_trainer(model)(model, batch)


def way_without_trainer(model: Any) -> Callable[[Any, Any], Any]:
    """Return a `run_step` that remembers how a batch was bound."""
    if getattr(model, "calibration_step", None) is None:
        return Forward()
    return calibration_step


def calibration_step(model: Any, batch: Any) -> Any:
    """Run a batch through a module that has a step for this."""
    return model.calibration_step(batch)


def take_examples(loader: Any, count: int = 2) -> Any | None:
    """Take a small batch from a ``DataLoader`` over a map-style dataset, or from a list of batches; else return None.

    Its first items are collated by hand: no iterator, worker or sampler of the user's is started or moved on. A dataset
    that draws from a generator of its own does draw; ``example_input_array`` avoids that.

    Example:
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> [x.shape for x in take_examples(DataLoader(TensorDataset(torch.ones(9, 3), torch.ones(9)), batch_size=4))]
        [torch.Size([2, 3]), torch.Size([2])]
    """
    if isinstance(loader, list | tuple):
        return loader[0] if loader else None
    dataset: Any = getattr(loader, "dataset", None)
    if isinstance(dataset, torch.utils.data.IterableDataset) or not hasattr(dataset, "__len__") or len(dataset) == 0:
        return None
    with isolated_random_state():
        first = list(range(min(count, len(dataset))))
        if loader.batch_sampler is None:  # the dataset is asked for whole batches, by lists or by single indices
            by_lists = isinstance(loader.sampler, torch.utils.data.BatchSampler)
            return loader.collate_fn(dataset[first if by_lists else 0])
        return loader.collate_fn([dataset[index] for index in first])


def to_device_of(inputs: Any, module: nn.Module) -> Any:
    """Move nested ``inputs`` to the device of ``module``, floating tensors to its dtype."""
    parameter = next((p for p in module.parameters() if p.is_floating_point()), None)
    if parameter is None:
        return inputs
    if isinstance(inputs, Tensor):
        return inputs.to(parameter.device, parameter.dtype if inputs.is_floating_point() else inputs.dtype)
    if isinstance(inputs, Mapping):
        return {key: to_device_of(value, module) for key, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return [to_device_of(value, module) for value in inputs]
    return inputs


def first_batches(batches: Iterable[Any], samples: float) -> Iterator[Any]:
    """Yield batches until they hold so many samples.

    Example:
        >>> list(first_batches(torch.ones(5, 2).split(2), samples=3))
        [tensor([[1., 1.],
                [1., 1.]]), tensor([[1., 1.],
                [1., 1.]])]
    """
    seen = 0
    for batch in batches:
        yield batch
        seen += samples_in(batch)
        if seen >= samples:  # before another is read
            return


def samples_in(inputs: Any) -> int:
    """How many samples a batch holds, in whatever containers: the length of dimension 0 of its first tensor with one.

    Example:
        >>> samples_in({"scale": torch.tensor(2.0), "x": torch.ones(4, 3)}), samples_in("text")
        (4, 1)
    """
    found = (leaf.shape[0] for leaf in flatten(inputs)[0] if isinstance(leaf, Tensor) and leaf.dim())
    return max(1, next(found, 1))
