"""Example inputs: what a model is called with when it is measured, at any batch size.

A tensor is one positional argument, a tuple or list the positional arguments, a dict the keyword arguments. How a batch
becomes such inputs is the business of `lightning_compress.inputs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_compress.errors import invalid


def call(model: nn.Module, inputs: Any) -> Any:
    """Call ``model`` with example inputs as Lightning calls it with its ``example_input_array``.

    Example:
        >>> call(nn.Linear(3, 2), {"input": torch.ones(4, 3)}).shape
        torch.Size([4, 2])
    """
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def batch_size_of(inputs: Any) -> int:
    """Return the length of dimension 0 of the first tensor that has one.

    Raises:
        CompressionError: no tensor with a batch dimension is among the inputs.

    Example:
        >>> batch_size_of({"scale": torch.tensor(2.0), "x": torch.ones(4, 3)})
        4
    """
    for leaf in tree_leaves(inputs):
        if isinstance(leaf, Tensor) and leaf.ndim:
            if leaf.shape[0] == 0:
                raise invalid("example_inputs", "hold at least one sample", tuple(leaf.shape))
            return int(leaf.shape[0])
    raise invalid(
        "example_inputs",
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
