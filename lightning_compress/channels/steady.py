"""Runs that can be compared: nothing that is drawn at random differs between a model and a narrower copy of it."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_compress.random_state import random_state_kept

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
    """Random tensors are constants: dropout drops nothing, noise is none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.rpartition("::")[2].rstrip("_")
        if name == "native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        out = func(*args, **kwargs)
        if func.namespace == "aten" and name in _CONSTANTS:
            out.fill_(_CONSTANTS[name])
        return out


@contextmanager
def steady() -> Iterator[None]:
    """No gradients, the same draws each time, and the global random states as they were afterwards."""
    with random_state_kept(), torch.no_grad():
        torch.manual_seed(0)
        random.seed(0)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(0)
        with _Constant():  # type: ignore[no-untyped-call]
            yield
