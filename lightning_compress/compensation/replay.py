"""Runs a model again and again while its first layers stay as they are, and computes what these put out only once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lightning_compress.compensation.layer_rows import LINEAR, has_memory, has_own_forward
from lightning_compress.modules.copying import copy_tensors

MOST_BYTES = 2**27
"""So much memory may hold what layers have put out; what comes later in a run is computed each time."""
_REPLAYED = (*LINEAR, nn.RNNBase)
_Outputs = dict[tuple[nn.Module, int], Any]


class Replay:
    """Holds what layers of a model have put out for some batches, up to where something has changed since.

    A run is followed function by function: all that it computes before the first use of a changed tensor is what it
    was, and so are the outputs of layers there. Layers of a class with a forward of its own are always computed.

    Args:
        model: nobody else runs it.
        run: runs a batch through it.
    """

    def __init__(self, model: nn.Module, run: Callable[[nn.Module, Any], Any]) -> None:
        self._run, self._outputs = run, list[_Outputs]()
        self._changed, self._is_same, self._room = set[int](), False, 0
        self._known, self._met, self._calls = _Outputs(), _Outputs(), Counter[nn.Module]()
        for layer in model.modules():
            if isinstance(layer, _REPLAYED) and not has_own_forward(layer):
                self._watch_(layer, layer.forward)

    @contextmanager
    def since(self, changed: Iterable[Tensor] | None) -> Iterator[Callable[[nn.Module, Any], Any]]:
        """Yield what runs the batches, the same ones in each block.

        Args:
            changed: all that has other values than in the block before, but for what was given there already; None if
                anything may have.
        """
        self._changed, self._room = {_memory(tensor) for tensor in changed or ()}, MOST_BYTES
        before = iter([] if changed is None else self._outputs)
        self._outputs = []

        def run(model: nn.Module, batch: Any) -> Any:
            self._known, self._met, self._calls = next(before, {}), {}, Counter()
            self._outputs.append(self._met)
            self._is_same = changed is not None
            with torch.compiler.set_stance("force_eager"):
                try:
                    with _Follow(self):
                        return self._run(model, batch)
                finally:
                    self._is_same = False

        yield run

    def uses(self, tensors: Iterable[Any]) -> None:
        """Notice that a run uses tensors: what follows a changed one is to be computed, and what has gradients."""
        if self._is_same and (torch.is_grad_enabled() or any(map(self._may_be_changed, tensors))):
            self._is_same = False

    def _may_be_changed(self, leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and (not has_memory(leaf) or _memory(leaf) in self._changed)

    def _watch_(self, layer: nn.Module, forward: Callable[..., Any]) -> None:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.uses([*layer.parameters(), *layer.buffers()])
            if not self._is_same:
                return forward(*args, **kwargs)
            self._calls[layer] += 1
            key = layer, self._calls[layer]
            out = self._known[key] if key in self._known else forward(*args, **kwargs)
            size = sum(leaf.nbytes for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor))
            if size > self._room:
                return out
            self._room -= size
            self._met[key] = out
            return copy_tensors(out)  # what follows may change it in place

        layer.__dict__["forward"] = call


class _Follow(TorchFunctionMode):
    def __init__(self, replay: Replay) -> None:
        super().__init__()
        self._replay = replay

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._replay.uses(pytree.tree_leaves((args, kwargs)))
        return func(*args, **(kwargs or {}))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
