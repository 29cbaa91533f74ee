"""Reentrant activation checkpoints of a frozen model: gradients reach what trains in them.

Torch's reentrant form gives its output a gradient only where one of its inputs has one. In a model whose embeddings are
frozen none has, and what trains inside would never learn.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils import checkpoint

_PLAIN: Any = checkpoint.CheckpointFunction


class _Rooted:
    """Replaces torch's function, which `checkpoint` looks up at each call: an input has a gradient, if none had."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        given = any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)
        if given or not torch.is_grad_enabled():
            return _PLAIN.apply(function, preserve, *args)
        return _PLAIN.apply(partial(_run, function), preserve, torch.zeros((), requires_grad=True), *args)


def _run(function: Callable[..., Any], root: Tensor, *args: Any) -> Any:
    output = function(*args)
    if not torch.is_grad_enabled():
        return output
    # In the second pass. Torch raises where no output has a gradient, as where all inside is frozen.
    return pytree.tree_map_only(Tensor, lambda leaf: leaf + root if _is_constant(leaf) else leaf, output)


def _is_constant(leaf: Tensor) -> bool:
    return leaf.is_floating_point() and not leaf.requires_grad


def let_gradients_in_() -> None:
    """Let gradients into reentrant checkpoints of this process, until `restore_`."""
    checkpoint.CheckpointFunction = _Rooted  # type: ignore[assignment, misc]


def restore_() -> None:
    """Undo `let_gradients_in_`."""
    checkpoint.CheckpointFunction = _PLAIN  # type: ignore[misc]
