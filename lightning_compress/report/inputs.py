"""What is a model called with when it is measured, at any batch size?

A tensor is one positional argument, a tuple or list the positional arguments, a dict the keyword arguments. How a batch
becomes such inputs says `lightning_compress.modules.calls`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_compress.errors import invalid
from lightning_compress.modules.paths import clean_name


@contextmanager
def called_in_turn(model: nn.Module, paths: Sequence[str]) -> Iterator[None]:
    """Let ``model`` take the calls, ``(args, kwargs)``, of its modules at ``paths``, and run them one after the other.

    Example:
        >>> model = nn.ModuleDict({"encoder": nn.Linear(3, 2), "decoder": nn.Linear(2, 3)})
        >>> calls = (((torch.ones(1, 3),), {}), ((), {"input": torch.ones(1, 2)}))
        >>> with called_in_turn(model, ["encoder", "decoder"]):
        ...     [tuple(output.shape) for output in model(*calls)]
        [(1, 2), (1, 3)]
    """
    modules = {clean_name(path): module for path, module in model.named_modules()}
    before = vars(model).get("forward")
    runs = [modules[path] if path else model.forward for path in paths]

    def forward(*calls: Any) -> list[Any]:
        return [run(*args, **kwargs) for run, (args, kwargs) in zip(runs, calls, strict=True)]

    vars(model)["forward"] = forward
    try:
        yield
    finally:
        del vars(model)["forward"]
        if before is not None:
            vars(model)["forward"] = before


def batch_size_of(inputs: Any, name: str = "example_inputs") -> int:
    """Return the length of dimension 0 of the first tensor that has one.

    Args:
        inputs: of a call.
        name: of the argument that has them, for the error.

    Raises:
        CompressionError: no tensor with a batch dimension is among the inputs.

    Example:
        >>> batch_size_of({"scale": torch.tensor(2.0), "x": torch.ones(4, 3)})
        4
    """
    for leaf in tree_leaves(inputs):
        if isinstance(leaf, Tensor) and leaf.ndim:
            if leaf.shape[0] == 0:
                raise invalid(name, "hold at least one sample", tuple(leaf.shape))
            return int(leaf.shape[0])
    raise invalid(
        name,
        "be a tensor, or a tuple or dict that holds one with the batch as dimension 0",
        type(inputs).__name__,
    )


def resize_batch(inputs: Any, batch_size: int) -> Any:
    """Return the inputs with ``batch_size`` samples: the first ones, repeated from the start when there are too few.

    Tensors whose dimension 0 isn't the batch (a shared mask, a scalar) and leaves that aren't tensors stay as they are.

    Example:
        >>> resize_batch((torch.tensor([1, 2]), "mean"), 3)
        (tensor([1, 2, 1]), 'mean')
    """
    present = batch_size_of(inputs)

    def resize(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.ndim == 0 or leaf.shape[0] != present:
            return leaf
        return leaf[torch.arange(batch_size, device=leaf.device) % present]

    return tree_map(resize, inputs)


def to_device(inputs: Any, device: torch.device) -> Any:
    """Return the inputs with every tensor on ``device``."""
    return tree_map(lambda leaf: leaf.detach().to(device) if isinstance(leaf, Tensor) else leaf, inputs)
