"""What models put out: tensors, tuples, dicts and objects of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_compress.errors import invalid


def find_logits(outputs: Any) -> Tensor:
    """The logits within outputs: the tensor itself, ``logits`` by key or attribute, or a tuple's first tensor.

    A scalar in a tuple, a loss that comes first, is none.

    Raises:
        CompressionError: If there are none.

    Example:
        >>> import torch
        >>> find_logits({"logits": torch.zeros(2, 3), "hidden": torch.zeros(2, 8)}).shape
        torch.Size([2, 3])
    """
    found = outputs
    if isinstance(outputs, Mapping):
        found = outputs.get("logits")
    elif not isinstance(outputs, Tensor):
        found = getattr(outputs, "logits", None)
        if found is None and isinstance(outputs, tuple | list):
            found = next((item for item in outputs if isinstance(item, Tensor) and item.dim()), None)
    if not isinstance(found, Tensor):
        received = list(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
        raise invalid("outputs", "contain `logits`", received, "Override `logits(outputs)` on the module.")
    return found


def find_tensors(outputs: Any) -> list[Tensor]:
    """All tensors in nested outputs, and in the attributes of objects in them.

    Example:
        >>> import torch
        >>> len(find_tensors({"logits": torch.zeros(1), "hidden": (torch.zeros(1), torch.zeros(1))}))
        3
    """
    leaves = pytree.tree_leaves(outputs)
    objects = [leaf for leaf in leaves if hasattr(leaf, "__dict__") and not isinstance(leaf, Tensor)]
    leaves += [part for each in objects for part in vars(each).values()]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
