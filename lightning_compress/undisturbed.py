"""Runs a model in evaluation and leaves no trace: flags, buffers, attributes and random state are put back."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put ``model`` in evaluation mode under ``inference_mode``, and back as it was afterwards.

    Restored are the training flag of every module, the content of every buffer (observers move even in evaluation),
    attributes that ``forward`` assigned (a cache made under ``inference_mode`` would break the next backward), and the
    global random state of torch, numpy and Python. Containers that ``forward`` changed in place are not.

    Example:
        >>> model = nn.Dropout()
        >>> with undisturbed(model):
        ...     model.training
        False
        >>> model.training
        True
    """
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    modules = list(model.modules())
    flags = [module.training for module in modules]
    attributes = [_attributes(module) for module in modules]
    # Outside of inference mode, so that what is put back is an ordinary tensor again.
    with torch.inference_mode(False), torch.no_grad():
        buffers = [(tensor, tensor.clone()) for tensor in _buffers(modules)]
    try:
        with torch.random.fork_rng(devices=_cuda_devices(model)):
            model.eval()
            with torch.inference_mode():
                yield
    finally:
        for module, before, flag in zip(modules, attributes, flags, strict=True):
            _restore(module, before)
            # A scripted module keeps its flag in C++.
            module.training = flag
        _restore_buffers(buffers)
        random.setstate(python_state)
        if numpy and numpy_state is not None:
            numpy.random.set_state(numpy_state)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter or buffer, the CPU if it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def _cuda_devices(model: nn.Module) -> list[int]:
    return sorted({parameter.device.index or 0 for parameter in model.parameters() if parameter.is_cuda})


def _attributes(module: nn.Module) -> dict[str, Any]:
    # `_buffers`, `_modules` and the like are dicts that a forward may change in place, hence one level of copies.
    return {key: dict(value) if type(value) is dict else value for key, value in vars(module).items()}


def _restore(module: nn.Module, before: dict[str, Any]) -> None:
    now = vars(module)
    for key in [key for key in now if key not in before]:
        del now[key]
    for key, value in before.items():
        current = now.get(key)
        if type(value) is not dict or type(current) is not dict:
            now[key] = value
        elif list(value) != list(current) or any(value[name] is not current[name] for name in value):
            current.clear()
            current.update(value)


def _buffers(modules: list[nn.Module]) -> list[Tensor]:
    found = {id(tensor): tensor for module in modules for tensor in module._buffers.values() if tensor is not None}
    return list(found.values())


def _restore_buffers(buffers: list[tuple[Tensor, Tensor]]) -> None:
    # Inference mode may write to ordinary tensors and to inference tensors alike.
    with torch.inference_mode():
        for tensor, before in buffers:
            if tensor.shape != before.shape:
                tensor.resize_(before.shape)
            if not torch.equal(tensor, before):
                tensor.copy_(before)
