"""How is a module copied, or a nest of tensors?"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.errors import CompressionError

Module = TypeVar("Module", bound=nn.Module)


def copy_tensors(tree: Any) -> Any:
    """Copy a nest, every tensor in it detached and cloned."""
    return pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, tree)


def copy_batch(batch: Any) -> Any:
    """Copy a batch, so that a step may change or empty it."""
    try:
        return copy.deepcopy(batch)
    except Exception:  # a batch of the user's own that can't be copied as a whole
        return copy_tensors(batch)


def copy_module(module: Module, shared: Collection[nn.Parameter] | Mapping[int, Any] = ()) -> Module:
    """Make a deep copy to try things on; computed tensors that a module keeps as attributes are detached in it.

    Args:
        module: the original.
        shared: parameters that the copy has too, to save their memory; or, by the `id` of what the original has, what
            the copy has in its place.

    Raises:
        CompressionError: the module can't be copied.
    """
    leaves = (leaf for inner in module.modules() for leaf in pytree.tree_leaves(vars(inner)))
    tensors = (leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.grad_fn is not None)
    memo: dict[int, Any] = {id(tensor): tensor.detach().clone() for tensor in tensors}
    memo |= shared if isinstance(shared, Mapping) else {id(parameter): parameter for parameter in shared}
    try:
        twin = copy.deepcopy(module, memo)
    except (RuntimeError, TypeError, ValueError) as error:
        raise CompressionError(
            f"`{type(module).__name__}` must be a module that can be deep-copied. Received: {error}. Keep on it "
            "what can be copied; after torch.nn.utils.prune call prune.remove, and run lazy layers once."
        ) from error
    if getattr(twin, "_compiler_ctx", None) is not None:
        # Of a LightningModule that went through `torch.compile` as a whole: they are bound to the original.
        for name in ("forward", "training_step", "validation_step", "test_step", "predict_step"):
            twin.__dict__.pop(name, None)
    return twin
