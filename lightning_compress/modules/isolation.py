"""How is a module run without a trace? Its modes, buffers and attributes, and the random states, are put back."""

from __future__ import annotations

import copy
import random
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.modules.fast_path import without_fast_path
from lightning_compress.modules.routing import with_forms

_CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict)
_OF_TORCH = frozenset(vars(nn.Module()))
_PARTS = ("sampler", "batch_sampler", "dataset", "datasets", "data_source", "transform", "transforms")
_HOOKS = _OF_TORCH - {"_parameters", "_buffers", "_modules", "training"}


@contextmanager
def isolated_random_state(seed: int | None = None, loaders: Any = None) -> Iterator[None]:
    """Put the global generators of Python, numpy and torch (all CUDA devices) back at the end of the block.

    Args:
        seed: what they draw from in the block; by default they go on.
        loaders: a nest of loaders; the generators that they, their samplers, datasets and transforms hold are put back
            too: torch's, numpy's and Python's.
    """
    numpy = sys.modules.get("numpy")
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices), ExitStack() as stack:
        for generator in _generators(getattr(loaders, "iterables", loaders)):
            if isinstance(generator, torch.Generator):
                stack.callback(generator.set_state, generator.get_state())
            elif isinstance(generator, random.Random):
                stack.callback(generator.setstate, generator.getstate())
            else:  # numpy's, of either kind
                bits: Any = getattr(generator, "bit_generator", None) or generator._bit_generator
                stack.callback(setattr, bits, "state", bits.state)
        stack.callback(random.setstate, random.getstate())
        if numpy:
            stack.callback(numpy.random.set_state, numpy.random.get_state())
        if seed is not None:
            torch.default_generator.manual_seed(seed)
            # CUDA that hasn't started would remember a seed until then.
            if devices or (torch.accelerator.is_available() and not torch.cuda.is_available()):
                torch.manual_seed(seed)
            random.seed(seed)
            if numpy:
                numpy.random.seed(seed % 2**32)
        yield


def _generators(loaders: Any) -> Iterator[Any]:
    """Yield the random generators that loaders, and what they are made of, hold."""
    numpy = sys.modules.get("numpy")
    kinds = (torch.Generator, random.Random, *((numpy.random.Generator, numpy.random.RandomState) if numpy else ()))
    left, seen = pytree.tree_leaves(loaders), set[int]()
    while left:
        holder = left.pop()
        if id(holder) in seen or not hasattr(holder, "__dict__"):
            continue
        seen.add(id(holder))
        yield from (value for value in vars(holder).values() if isinstance(value, kinds))
        left += pytree.tree_leaves([vars(holder).get(name) for name in _PARTS])


def random_states() -> tuple[Any, ...]:
    """Return the states of the global generators of Python, numpy and torch, for `restore_random_states_`."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    numpy = sys.modules.get("numpy")
    return torch.get_rng_state(), cuda, random.getstate(), numpy and numpy.random.get_state()


def restore_random_states_(states: tuple[Any, ...]) -> None:
    """Put the global generators back to where `random_states` saw them."""
    cpu, cuda, python, numpy = states
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)
    random.setstate(python)
    if numpy is not None:
        sys.modules["numpy"].random.set_state(numpy)


def training_modes(model: nn.Module) -> dict[nn.Module, bool]:
    """The mode of every module, for `restore_modes_`; also of those that leave the tree meanwhile."""
    return {module: module.training for module in model.modules()}


def restore_modes_(modes: dict[nn.Module, bool]) -> None:
    """Put modules back into the modes that `training_modes` saw."""
    for module, mode in modes.items():
        module.training = mode


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put ``model`` in evaluation mode, and every module back into its own mode afterwards."""
    with ExitStack() as stack:
        stack.callback(restore_modes_, training_modes(model))
        model.eval()
        yield


@contextmanager
def isolated_inference(model: nn.Module) -> Iterator[None]:
    """Put ``model`` in evaluation mode under ``inference_mode``, and back as it was afterwards: the way to measure it.

    Restored are the training flag of every module, the content of every buffer (observers move even in evaluation),
    attributes that ``forward`` assigned (a cache made under ``inference_mode`` would break the next backward), and the
    global random state of torch, numpy and Python. Containers that ``forward`` changed in place are not.

    Example:
        >>> model = nn.Dropout()
        >>> with isolated_inference(model):
        ...     model.training
        False
        >>> model.training
        True
    """
    with _State(with_forms(model)), isolated_random_state(), torch.inference_mode():
        model.eval()
        yield


@contextmanager
def isolated_evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluate ``model`` without gradients so that only its observers change: the way to look at what it calls.

    Torch's fused path, which calls no layers, is off. Buffers, attributes, the content of containers, and the global
    random states are put back.
    """
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        isolated_random_state(),
        without_fast_path(),
        evaluation_mode(model),
        isolated_state(model.modules()),
    ):
        yield


@contextmanager
def isolated_state(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Give ``modules`` copies of the containers and tensors among their attributes; put their own back afterwards.

    Lists that a step appends to, states of metrics, caches, counters and buffers are what they were, and what was added
    is gone. Values of parameters, hooks, and objects of other classes aren't looked at.

    Example:
        >>> model = nn.ReLU()
        >>> model.outputs = [1]
        >>> with isolated_state([model]):
        ...     model.outputs.append(2)
        ...     model.count = 3
        >>> model.outputs, hasattr(model, "count")
        ([1], False)
    """
    with _State(modules) as state:
        memo = dict[int, Any]()
        for module in state.modules:
            attributes = {name: value for name, value in vars(module).items() if name not in _OF_TORCH}
            vars(module).update({name: _copied(value, memo) for name, value in attributes.items()})
        yield


@contextmanager
def restored_on_error(module: nn.Module) -> Iterator[None]:
    """If the block fails, put the modes, buffers and attributes of ``module`` back."""
    with ExitStack() as stack:
        stack.enter_context(_State(with_forms(module)))
        yield
        stack.pop_all()


class _State:
    """The attributes, buffers and modes of modules, as they are when this is made; put back when it is left."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.modules = list(modules)
        self._attributes = {
            inner: {name: value for name, value in vars(inner).items() if name not in _HOOKS} for inner in self.modules
        }
        # `_buffers`, `_modules` and the like are dicts that a forward may change in place, hence one level of copies.
        values = (value for attributes in self._attributes.values() for value in attributes.values())
        self._dicts = [(value, dict(value)) for value in values if type(value) is dict]
        self._modes = {module: module.training for module in self.modules}
        buffers = [buffer for module in self.modules for buffer in module._buffers.values() if buffer is not None]
        # Outside of inference mode, so that what is put back is an ordinary tensor again.
        with torch.inference_mode(False), torch.no_grad():
            self._buffers = [(buffer, buffer.clone()) for buffer in buffers if not nn.parameter.is_lazy(buffer)]

    def __enter__(self) -> _State:
        return self

    def __exit__(self, *_: object) -> None:
        for module, attributes in self._attributes.items():
            for name in vars(module).keys() - attributes.keys() - _HOOKS:
                del vars(module)[name]
            vars(module).update(attributes)
        for changed, items in self._dicts:
            if _identities(items) != _identities(changed):
                changed.clear()
                changed.update(items)
        restore_modes_(self._modes)  # a scripted module keeps its flag in C++
        # Inference mode may write to ordinary tensors and to inference tensors alike.
        with torch.inference_mode():
            for buffer, values in self._buffers:
                if buffer.shape != values.shape:
                    buffer.resize_(values.shape)
                if not torch.equal(buffer, values):
                    buffer.copy_(values)


def _identities(items: dict[Any, Any]) -> list[tuple[Any, int]]:
    return [(key, id(value)) for key, value in items.items()]


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        twin = value.detach().clone()
        memo[id(value)] = twin.requires_grad_(value.requires_grad) if value.is_leaf else twin
    elif type(value) in _CONTAINERS:
        twin = memo[id(value)] = copy.copy(value)
        if isinstance(value, dict):
            twin.update({key: _copied(item, memo) for key, item in value.items()})
        elif not isinstance(value, set):
            twin.clear()
            twin.extend(_copied(item, memo) for item in value)
    else:
        return value
    return memo[id(value)]
