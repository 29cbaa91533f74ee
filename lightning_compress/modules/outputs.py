"""What does a model give back, in whatever containers? Flattened, rebuilt, caught as it is called, compared."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.fx import Proxy
from torch.utils import _pytree as pytree

_VARIABLE = (Tensor, Proxy, torch.SymInt, torch.SymFloat, torch.SymBool)
"""What a call computes; all other leaves are constants of the structure."""


@dataclass(frozen=True)
class Structure:
    """The containers of a nest, with a place for each tensor. Two are equal if types, keys and constants are the same.

    Attributes:
        kind: what the container is; of a leaf, None for a tensor and a tuple around any other value.
        children: the structures of what it holds.
        template: what a mapping or dataclass is made from that torch's pytrees don't know.
    """

    kind: Any
    children: tuple[Structure, ...] = ()
    template: Any = field(default=None, compare=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Structure:
        return self

    def rebuild(self, tensors: Sequence[Any]) -> Any:
        """Return the containers with ``tensors`` in their places."""
        return self._rebuild(iter(tensors))

    def _rebuild(self, tensors: Iterator[Any]) -> Any:
        if self.kind is None:
            return next(tensors)
        values = [child._rebuild(tensors) for child in self.children]
        if self.template is not None:
            return _filled(self.template, values)
        return self.kind[0] if isinstance(self.kind, tuple) else pytree.tree_unflatten(values, self.kind)


def flatten(output: Any) -> tuple[list[Any], Structure]:
    """Return the tensors of ``output``, in order, and the `Structure` that puts them back in their places.

    It sees into what torch's pytrees know, any other mapping, and dataclasses.

    Example:
        >>> from collections import OrderedDict
        >>> tensors, structure = flatten(OrderedDict(out=torch.ones(1), aux=(None, torch.zeros(1))))
        >>> structure.rebuild([2, 3])
        OrderedDict([('out', 2), ('aux', (None, 3))])
    """
    tensors: list[Any] = []
    return tensors, _structure(output, tensors)


def _structure(value: Any, tensors: list[Any]) -> Structure:
    if isinstance(value, _VARIABLE):
        tensors.append(value)
        return Structure(None)
    values, spec = pytree.tree_flatten(value, is_leaf=lambda inner: inner is not value)
    if not spec.is_leaf():
        return Structure(spec, tuple(_structure(part, tensors) for part in values))
    if not isinstance(value, Mapping) and (not dataclasses.is_dataclass(value) or isinstance(value, type)):
        return Structure((value,))
    keys, names, values = _parts(value)
    children = tuple(_structure(part, tensors) for part in values)
    return Structure((type(value), keys, names), children, _filled(value, [None] * len(values)))


def _parts(value: Any) -> tuple[tuple[Any, ...], tuple[str, ...], list[Any]]:
    """Return the keys of a mapping, the names of its attributes (some keep items there too), and the values of both."""
    keys = tuple(value) if isinstance(value, Mapping) else ()
    if not hasattr(value, "__dict__"):
        names = tuple(part.name for part in dataclasses.fields(value)) if dataclasses.is_dataclass(value) else ()
    else:
        items = value.data if isinstance(value, UserDict) else value  # without its `data` one can't be copied
        names = (
            tuple(name for name, part in vars(value).items() if part is not items) if vars(value) is not value else ()
        )
    return keys, names, [*(value[key] for key in keys), *(getattr(value, name) for name in names)]


def _filled(template: Any, values: Sequence[Any]) -> Any:
    """Copy ``template``, with these values as its parts."""
    container = copy.copy(template)
    keys, names, _ = _parts(template)
    for key, value in zip(keys, values, strict=False):
        container[key] = value
    for name, value in zip(names, values[len(keys) :], strict=True):
        object.__setattr__(container, name, value)
    return container


@contextmanager
def outer_outputs(model: nn.Module) -> Iterator[list[tuple[nn.Module, Any]]]:
    """List the calls into ``model`` from outside of all modules, such as a step's: what is called, and its output.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.ReLU())
        >>> with outer_outputs(model) as outputs:
        ...     _ = model(torch.ones(1, 2)), model[1](torch.ones(3))
        >>> [tuple(output.shape) for _, output in outputs]
        [(1, 2), (3,)]
    """
    outputs, depth = list[tuple[nn.Module, Any]](), 0

    def enter(*_: Any) -> None:
        nonlocal depth
        depth += 1

    def leave(module: nn.Module, _: Any, output: Any) -> None:
        nonlocal depth
        depth -= 1
        if not depth:
            outputs.append((module, output))

    with ExitStack() as hooks, torch.compiler.set_stance("force_eager"):
        for module in model.modules():
            if not isinstance(module, torch.jit.ScriptModule):
                hooks.enter_context(module.register_forward_pre_hook(enter))
                hooks.enter_context(module.register_forward_hook(leave, always_call=True))
        yield outputs


def outputs_of_calls(module: nn.Module, run: Callable[[], Any]) -> list[Any]:
    """List what a run gives back, and what ``forward`` gave to it; without a ``forward``, what the last child gave."""
    with outer_outputs(module) as outputs:
        returned = run()
    whole = [output for inner, output in outputs if inner is module]
    parts = [output for inner, output in outputs if any(True for _ in inner.parameters())]
    return [returned, *(whole or parts[-1:])]


def cosine(expected: Any, got: Any) -> float:
    """Return the cosine similarity of all floats in two nests of outputs; 1 without any, or with nothing but zeros.

    A tensor of another shape, such as detections that are filtered, counts as zeros.
    """
    nests = (flatten(tree)[0] for tree in (expected, got))
    floats, others = ([x.float() for x in nest if isinstance(x, Tensor) and x.is_floating_point()] for nest in nests)
    pairs = [(x, y) for x, y in zip_longest(floats, others[: len(floats)])] or [(torch.zeros(1), torch.zeros(1))]
    alike = [(x, y if y is not None and y.shape == x.shape else torch.zeros_like(x)) for x, y in pairs]
    a, b = (torch.cat([tensor.flatten() for tensor in side]) for side in zip(*alike, strict=True))
    if not a.isfinite().all() or not a.any():
        return 1.0
    return F.cosine_similarity(a, b, dim=0).nan_to_num(-1.0).item()


def same_structure(expected: Any, got: Any) -> bool:
    """Whether two nests of outputs have the same containers and shapes, and floats and integers in the same places."""
    (tensors, structure), (others, other_structure) = flatten(expected), flatten(got)
    return structure == other_structure and all(
        tensor.shape == other.shape and tensor.is_floating_point() == other.is_floating_point()
        for tensor, other in zip(tensors, others, strict=True)
    )


def same_outputs(expected: Any, got: Any, tolerance: float = 1e-3) -> bool:
    """Whether two nests of outputs agree: integers exactly, floats to a ``tolerance`` (folded BatchNorm rounds)."""
    return same_structure(expected, got) and all(
        _close(leaf, other, tolerance) if leaf.is_floating_point() else torch.equal(leaf, other)
        for leaf, other in zip(flatten(expected)[0], flatten(got)[0], strict=True)
    )


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    a, b = a.float(), b.float()
    scale = a.abs().nan_to_num(0.0, 0.0, 0.0).amax().item() if a.numel() else 0.0
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * max(scale, 1e-3), equal_nan=True)


def least_cosine(expected: Sequence[Any], got: Sequence[Any]) -> float:
    """Return the least `cosine` of two runs' outputs, call by call; scalars such as losses have no direction.

    Example:
        >>> least_cosine([torch.ones(2), torch.ones(())], [torch.tensor([1.0, 0.0]), -torch.ones(())])
        0.7071067690849304
    """
    calls = zip(expected, got, strict=False)
    directed = (call for call in calls if any(tensor.numel() > 1 for tensor in flatten(call[0])[0]))
    return min((cosine(*call) for call in directed), default=1.0)


@contextmanager
def states_given_back(model: nn.Module) -> Iterator[dict[int, Any]]:
    """Collect what modules give back for their own next call, such as a cache of keys and values, by its `id`.

    That is an object of a class of its own, in a mapping, under the name of an argument that the call didn't give.
    """
    states = dict[int, Any]()

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if isinstance(output, Mapping):
            signature = inspect.signature(module.forward)
            free = signature.parameters.keys() - signature.bind_partial(*args, **kwargs).arguments.keys()
            given = [output[name] for name in free & output.keys()]
            own = (state for state in given if not isinstance(state, (Tensor, Mapping, list, tuple)))
            states.update({id(state): state for state in own if not dataclasses.is_dataclass(state)})

    with ExitStack() as hooks:
        for module in model.modules():
            if not isinstance(module, torch.jit.ScriptModule):
                hooks.enter_context(module.register_forward_hook(note, with_kwargs=True))
        yield states


def tensors_in(output: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Every tensor in an output: in containers, in fields and attributes of objects, at any depth.

    But for objects that were ``seen``, by their `id`.

    Example:
        >>> import torch
        >>> [leaf.item() for leaf in tensors_in({"a": torch.tensor(1), "b": [torch.tensor(2), "c"]})]
        [1, 2]
    """
    seen = set() if seen is None else seen
    if isinstance(output, Tensor):
        yield output
        return
    if output is None or isinstance(output, (str, bytes, int, float, complex, type)) or id(output) in seen:
        return
    seen.add(id(output))
    if isinstance(output, Mapping):
        parts: Any = output.values()
    elif isinstance(output, (list, tuple, set, frozenset)):
        parts = output
    elif dataclasses.is_dataclass(output):
        parts = [getattr(output, field.name, None) for field in dataclasses.fields(output)]
    else:
        slots = [name for kind in type(output).__mro__ for name in getattr(kind, "__slots__", ())]
        parts = [*getattr(output, "__dict__", {}).values(), *(getattr(output, name, None) for name in slots)]
        if not isinstance(output, Distribution) and callable(output):
            return
    for part in parts:
        yield from tensors_in(part, seen)
