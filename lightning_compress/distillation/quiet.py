"""Looks at models and data that leave no trace: buffers are put back, no iterator is moved on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.random_state import random_state_kept


def take_examples(loader: Any, count: int = 2) -> Any | None:
    """A small batch from a ``DataLoader`` over a map-style dataset, or a list of batches; or None.

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
    with random_state_kept():
        first = list(range(min(count, len(dataset))))
        if loader.batch_sampler is None:  # the dataset is asked for whole batches, by a list or one by one
            by_lists = isinstance(loader.sampler, torch.utils.data.BatchSampler)
            return loader.collate_fn(dataset[first if by_lists else 0])
        return loader.collate_fn([dataset[index] for index in first])


def to_device_of(inputs: Any, module: nn.Module) -> Any:
    """Nested ``inputs`` on the device of ``module``, floating tensors in its dtype."""
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


@contextmanager
def buffers_restored_on_error(module: nn.Module) -> Iterator[None]:
    """If the block fails, put all buffers of ``module`` back: the same tensors with the same values."""
    kept = [
        (child, name, buffer, None if nn.parameter.is_lazy(buffer) else buffer.detach().clone())
        for child in module.modules()
        for name, buffer in child._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    except BaseException:
        for child, name, buffer, values in kept:
            if values is not None:
                buffer.data = values
                child._buffers[name] = buffer
        raise
