"""Makes runs comparable: nothing that is drawn at random differs between a model and a narrower copy of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_compress.modules.isolation import isolated_random_state

_CONSTANTS = {
    "bernoulli": 1.0,
    "rand": 0.5,
    "rand_like": 0.5,
    "uniform": 0.5,
    "randn": 0.0,
    "randn_like": 0.0,
    "normal": 0.0,
    "exponential": 1.0,
    "randint": 0,
    "randint_like": 0,
    "random": 0,
}


class _Constant(TorchDispatchMode):
    """Makes random tensors constant: dropout drops nothing, noise is none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.rpartition("::")[2].rstrip("_")
        if name == "native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        out = func(*args, **kwargs)
        if func.namespace == "aten" and name in _CONSTANTS:
            out.fill_(_CONSTANTS[name])
        return out


_WIDE = {torch.float16: torch.float64, torch.bfloat16: torch.float64, torch.float32: torch.float64,
         torch.complex64: torch.complex128}  # fmt: skip


def _widened(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.to(_WIDE[leaf.dtype]) if leaf.dtype in _WIDE else leaf
    return _WIDE.get(leaf, leaf) if isinstance(leaf, torch.dtype) else leaf


class _Wide(TorchDispatchMode):
    """Computes everything in float64, also where code asks for less."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        places = func._schema.arguments
        if func._schema.is_mutable:
            written = next(compress(args, (place.alias_info and place.alias_info.is_write for place in places)), None)
            kind, wide = written.dtype if isinstance(written, Tensor) else None, _WIDE.values()
            if kind in wide:
                args, kwargs = pytree.tree_map(_widened, (args, kwargs))
            elif kind in _WIDE:  # what was there before stays as it is
                args = pytree.tree_map_only(Tensor, lambda leaf: leaf.to(kind) if leaf.dtype in wide else leaf, args)
            return func(*args, **kwargs)
        if any(place.alias_info is not None for place in places):
            return func(*args, **kwargs)  # a view
        args, kwargs = pytree.tree_map(_widened, (args, kwargs))
        return pytree.tree_map(_widened, func(*args, **kwargs))


def widen_(model: nn.Module) -> None:
    """Make a copy of a model one of float64 that takes inputs of any precision, for ``deterministic(wide=True)``.

    Raises:
        Exception: its device has no float64.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = _widened(tensor.data)
    for module in model.modules():
        module.register_forward_pre_hook(
            lambda _, args, kwargs: pytree.tree_map_only(Tensor, _widened, (args, kwargs)), with_kwargs=True
        )


@contextmanager
def deterministic(*, wide: bool = False) -> Iterator[None]:
    """No gradients, the same draws each time, all in float64 if ``wide``; the global random states stay."""
    with isolated_random_state(seed=0), torch.no_grad(), _Constant(), _Wide() if wide else nullcontext():  # type: ignore[no-untyped-call]
        yield
