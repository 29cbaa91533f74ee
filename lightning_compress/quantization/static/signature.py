"""The calls that a traced form holds for: where their tensors stand, and the values of everything else."""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.errors import CompressionError

PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device)


class Signature:
    """Knows where the tensors of a call stand, how large they were, and the values of everything else.

    A traced form holds for calls of this shape only: a flag that steers control flow is baked in. Immutable and plain:
    ``example`` is what a checkpoint keeps of it.

    Raises:
        CompressionError: the call holds something that is neither tensor nor plain data.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        leaves, self.spec = pytree.tree_flatten((args, kwargs))
        for leaf in leaves:
            if not isinstance(leaf, (Tensor, *PLAIN)):
                raise CompressionError(f"its input holds a {type(leaf).__name__}")
        self.constants = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]
        self.inputs = [
            torch.zeros((), dtype=leaf.dtype).expand(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor)
        ]
        self.is_one_tensor = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)

    @property
    def example(self) -> list[Any]:
        """``[args, kwargs]`` with zeros of its shape, stored as a single one, in the place of each tensor."""
        args, kwargs = self.rebuild(list(self.inputs))
        return [args, kwargs]

    def __deepcopy__(self, memo: dict[int, Any]) -> Signature:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Signature, tuple(self.example)

    def tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor] | None:
        """Return the tensors of a call that has this shape; None if it hasn't."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec != self.spec:
            return None
        found = []
        for leaf, constant in zip(leaves, self.constants, strict=True):
            if constant is None and isinstance(leaf, Tensor):
                found.append(leaf)
            elif constant is None or isinstance(leaf, Tensor) or leaf != constant[0]:
                return None
        return found

    def of_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor] | None:
        """Return the tensors of a call of ``module`` that has this shape; None if it hasn't."""
        if self.is_one_tensor and len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            return [args[0]]  # nearly every call, and binding it would take longer than a small layer
        return self.tensors(*canonical(module, args, kwargs))

    def rebuild(self, tensors: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return ``(args, kwargs)`` with ``tensors`` in their places."""
        rest = iter(tensors)
        leaves = [next(rest) if constant is None else constant[0] for constant in self.constants]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return tuple(args), dict(kwargs)


def canonical(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the same call in one form: by position where that can be, without what only repeats a default."""
    bound = _signature(type(module).forward).bind(module, *args, **kwargs)
    for name, parameter in bound.signature.parameters.items():
        value = bound.arguments.get(name, parameter.empty)
        if value is parameter.default or (isinstance(value, PLAIN) and value == parameter.default):
            bound.arguments.pop(name, None)
    return bound.args[1:], bound.kwargs


_signature = lru_cache(maxsize=256)(inspect.signature)
