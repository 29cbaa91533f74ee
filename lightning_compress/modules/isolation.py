"""Runs that leave no trace in the module that is run: containers and numbers that it keeps are put back."""

from __future__ import annotations

import copy
import random
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.modules.fast_path import without_fast_path
from lightning_compress.modules.routing import CHILD, all_modules

_CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict)
_OF_TORCH = frozenset(vars(nn.Module())) - {"training"}


@contextmanager
def attributes_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Give these modules copies of the containers and tensors among its attributes, and its own ones back afterwards.

    Lists that a step appends to, states of metrics, caches and counters are what they were, and what was added is gone.
    Parameters, buffers, hooks and children aren't looked at, nor are objects of other classes.

    Example:
        >>> model = nn.ReLU()
        >>> model.outputs = [1]
        >>> with attributes_kept([model]):
        ...     model.outputs.append(2)
        ...     model.count = 3
        >>> model.outputs, hasattr(model, "count")
        ([1], False)
    """
    memo: dict[int, Any] = {}
    before = [(module, {name: vars(module)[name] for name in _own(module)}) for module in modules]
    try:
        for module, attributes in before:
            vars(module).update({name: _copied(value, memo) for name, value in attributes.items()})
        yield
    finally:
        for module, attributes in before:
            for name in _own(module) - attributes.keys():
                del vars(module)[name]
            vars(module).update(attributes)


def _own(module: nn.Module) -> set[str]:
    return {name for name in vars(module) if name not in _OF_TORCH}


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        made = value.detach().clone()
        memo[id(value)] = made if value.is_leaf is False else made.requires_grad_(value.requires_grad)
    elif type(value) in _CONTAINERS:
        made = memo[id(value)] = copy.copy(value)
        if isinstance(value, dict):
            made.update({key: _copied(item, memo) for key, item in value.items()})
        elif not isinstance(value, set):
            made.clear()
            made.extend(_copied(item, memo) for item in value)
    else:
        return value
    return memo[id(value)]


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Put the global generators of Python, numpy and torch (all CUDA devices) back at the end of the block."""
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy:
                numpy.random.set_state(numpy_state)


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


@contextmanager
def leaving_no_trace(model: nn.Module) -> Iterator[None]:
    """Evaluation without gradients, after which nothing of the model is changed but observers, and nothing was drawn.

    Buffers, containers and numbers that it keeps, and the global random states are put back.
    """
    modules = [module for path, module in model.named_modules() if CHILD not in path.split(".")]
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        random_state_kept(),
        without_fast_path(),
        evaluating(model),
        attributes_kept(modules),
        _buffers_kept(modules),
    ):
        yield


@contextmanager
def _buffers_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    before = [
        (module, name, buffer, buffer.clone())
        for module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for module, name, buffer, value in before:
            module._buffers[name] = buffer
            buffer.copy_(value)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, with every module's own mode put back afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


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


def training_modes(model: nn.Module) -> dict[Any, bool]:
    """Every module's mode before evaluation: Lightning doesn't put back that of one which leaves the tree meanwhile."""
    return {module: module.training for module in all_modules(model)}


def restore_modes_(modes: dict[Any, bool]) -> None:
    """Put modules back into the modes that `training_modes` saw."""
    for module, mode in modes.items():
        module.training = mode
