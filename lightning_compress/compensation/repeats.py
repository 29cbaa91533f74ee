"""Layers that a run calls several times: does what they are given again depend on what they put out before?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.modules.copying import copy_tensors
from lightning_compress.modules.isolation import isolated_evaluation


def calls_are_apart(model: nn.Module, run: Callable[[nn.Module, Any], Any], batch: Any) -> bool:
    """Whether the last calls of layers stay what they are when their earlier ones put out something else.

    So it is where a step runs two views of a sample through one network, and not where a layer is one of a loop.

    Example:
        >>> layer, x = nn.Linear(2, 2), torch.ones(1, 2)
        >>> calls_are_apart(layer, lambda layer, x: (layer(x), layer(-x)), x)
        True
        >>> calls_are_apart(layer, lambda layer, x: layer(layer(x)), x)
        False
    """
    layers = [layer for layer in model.modules() if next(layer.parameters(recurse=False), None) is not None]
    times, before = _last_calls(model, run, batch, layers, {})
    try:
        _, after = _last_calls(model, run, batch, layers, times)
    except Exception:  # code of the user's that such values are nothing for
        return False
    if before.keys() != after.keys():
        return False
    pairs = (zip(*map(pytree.tree_leaves, (before[layer], after[layer])), strict=False) for layer in before)
    return all(torch.equal(*pair) for found in pairs for pair in found if isinstance(pair[0], Tensor))


def _last_calls(
    model: nn.Module,
    run: Callable[[nn.Module, Any], Any],
    batch: Any,
    layers: Sequence[nn.Module],
    times: Mapping[nn.Module, int],
) -> tuple[Counter[nn.Module], dict[nn.Module, Any]]:
    """Return how often layers are called, and what they are given in their last call if it isn't the first.

    Their outputs are changed in all calls before those that ``times`` counts to.
    """
    calls, given = Counter[nn.Module](), dict[nn.Module, Any]()

    def enter(layer: nn.Module, args: Any, kwargs: Any) -> None:
        calls[layer] += 1
        if calls[layer] > 1:
            given[layer] = copy_tensors((args, kwargs))

    def leave(layer: nn.Module, args: Any, out: Any) -> Any:
        return pytree.tree_map(_changed, out) if calls[layer] < times.get(layer, 0) else None

    with ExitStack() as hooks, isolated_evaluation(model), torch.compiler.set_stance("force_eager"):
        for layer in layers:
            hooks.enter_context(layer.register_forward_pre_hook(enter, with_kwargs=True))
            hooks.enter_context(layer.register_forward_hook(leave))
        run(model, copy_tensors(batch))
    return calls, given


def _changed(leaf: Any) -> Any:
    return leaf * 1.5 + 0.5 if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
