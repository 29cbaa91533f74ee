"""How student and teacher are called, and what they put out: logits, and the positions that count."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_compress.distillation.losses.base import DistillationLoss, LogitLoss
from lightning_compress.errors import invalid


@dataclass(frozen=True)
class Arguments:
    """Positional and keyword arguments together."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def call(model: Callable[..., Any], inputs: Any) -> Any:
    """Call ``model``: a tuple or list gives positional, a dict keyword arguments, anything else is the only argument.

    Example:
        >>> call(torch.nn.Bilinear(2, 3, 4), (torch.ones(1, 2), torch.ones(1, 3))).shape
        torch.Size([1, 4])
    """
    if isinstance(inputs, Arguments):
        return model(*inputs.args, **inputs.kwargs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def cast(inputs: Any, dtype: torch.dtype) -> Any:
    """Nested ``inputs`` with floating tensors in ``dtype``."""
    if isinstance(inputs, Arguments):
        return Arguments(cast(inputs.args, dtype), cast(inputs.kwargs, dtype))
    return pytree.tree_map(
        lambda leaf: leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, inputs
    )


def find_logits(outputs: Any) -> Tensor:
    """The logits within outputs: the tensor itself, ``logits`` by key or attribute, or a tuple's first tensor.

    A scalar in a tuple counts as a loss that comes first, not as logits.

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


def positions_of(logits: Tensor, class_dim: int) -> torch.Size:
    """The shape of the logits without their classes: that of their positions."""
    return logits.movedim(class_dim, -1).shape[:-1]


def mask_of(valid: Tensor | None, positions: torch.Size) -> Tensor | None:
    """Fit a mask to logits at ``positions``; None means that all of them count.

    A mask of samples (B,) holds for all their positions. A mask of other positions, such as the tokens before a
    pooling, becomes one of the samples in which any position counts.

    Example:
        >>> mask_of(torch.tensor([[True, False], [False, False]]), torch.Size([2]))
        tensor([ True, False])
    """
    if valid is None or valid.shape == positions:
        return valid
    if not valid.dim() or not positions or len(valid) != positions[0]:
        return None
    samples = valid.bool().flatten(1).any(1) if valid.dim() > 1 else valid.bool()
    return samples.view(-1, *[1] * (len(positions) - 1)).expand(positions)


def fit_masks(
    losses: Mapping[str, DistillationLoss], pairs: Mapping[str, tuple[Tensor, Tensor]], valid: Tensor | None
) -> tuple[dict[str, Tensor | None], dict[str, str]]:
    """Find the mask of each term, and a sentence for each term that doesn't take ``valid`` as it is.

    Where ``valid`` fits no term at all, each term gets it as it is, and a loss of logits raises an error that says why.
    """
    masks: dict[str, Tensor | None] = dict.fromkeys(pairs, valid)
    notes: dict[str, str] = {}
    if valid is None:
        return masks, notes
    misfits = {name: student for name, (student, _) in pairs.items() if not _fits(valid, losses[name], student)}
    for name, student in misfits.items():
        loss, taken = losses[name], "all count"
        if isinstance(loss, LogitLoss):
            if len(misfits) == len(pairs):
                continue
            masks[name] = mask_of(valid, positions_of(student, loss.class_dim))
            taken = taken if masks[name] is None else "those of samples that have a valid one count"
        elif not type(loss).__module__.startswith("lightning_compress."):  # the user's own may know what to do
            continue
        notes[name] = (
            f"`valid_positions` {tuple(valid.shape)} are no positions of {name} {tuple(student.shape)}, where {taken}."
        )
    return masks, notes


def _fits(valid: Tensor, loss: DistillationLoss, student: Tensor) -> bool:
    if isinstance(loss, LogitLoss):
        return valid.shape == positions_of(student, loss.class_dim)
    return valid.shape == student.shape[: valid.dim()] and (valid.dim() == 1 or (valid.dim(), student.dim()) == (2, 3))
