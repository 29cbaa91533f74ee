"""Lets a module pass on what it gets, or zeros, in place of what it computes: a residual block that has left.

The module becomes one of a class that differs in nothing but its forward. What that does is plain data on the module,
so that a checkpoint can hold it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lightning_compress.channels.cutting.narrow_attention import NarrowAttention
from lightning_compress.channels.cutting.written import WRITTEN, set_written_, with_forward

SKIPPED = "_skipped_block"
"""Where a module keeps how it is skipped."""

Skip = Sequence[Any]
"""``[kind, name, place, container, length, where]``: whether it is replaced by its input ("identity") or by zeros
("zero"); which argument that input is, by name and by place; and where in what container it is given back: "tuple" or
"list", of so many items of which the others are None, "" without any."""


def set_skipped_(module: nn.Module, skip: Skip | None) -> None:
    """Let a module compute nothing from now on; with None it computes again.

    Example:
        >>> block = nn.Linear(2, 2)
        >>> set_skipped_(block, ["zero", "input", 0, "", 0, 0])
        >>> block(torch.ones(1, 2)), type(block).__name__
        (tensor([[0., 0.]]), 'Linear')
    """
    if skip:
        _become_(module, list(skip))
    elif module.__dict__.pop(SKIPPED, None):
        set_written_(module, module.__dict__.get(WRITTEN))
    for inner in module.modules():
        if isinstance(inner, nn.MultiheadAttention) and not isinstance(inner, NarrowAttention):
            # Torch's fused encoder layer would read its weights, and not call it.
            inner._qkv_same_embed_dim = not (skip or SKIPPED in vars(inner) or inner.in_proj_weight is None)


def _become_(module: nn.Module, skip: Skip) -> None:
    module.__dict__[SKIPPED] = skip
    module.__class__ = _skipping(getattr(type(module), "_plain_class", type(module)))


def _skipping(plain: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass whose forward computes nothing."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        kind, name, place, container, length, where = self.__dict__[SKIPPED]
        x = kwargs[name] if name in kwargs else args[place]
        if kind == "zero":
            x = torch.zeros_like(x)
        if not container:
            return x
        items = [x if item == where else None for item in range(length)]
        return tuple(items) if container == "tuple" else items

    return with_forward(plain, forward, SKIPPED, _become_)


def pass_over_(model: nn.Module) -> None:
    """Let DDP pass over what lies in skipped modules, as it gets no gradients: it reads this from the module."""
    names = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if SKIPPED in vars(module)
        for name, _ in (*module.named_parameters(), *module.named_buffers())
    }
    before = set(vars(model).get(_OURS, ()))
    if names or before:
        ignored = set(getattr(model, _IGNORED, ())) - before | names
        model.__dict__[_OURS], model.__dict__[_IGNORED] = sorted(names), sorted(ignored)


_IGNORED, _OURS = "_ddp_params_and_buffers_to_ignore", "_skipped_parameters"
