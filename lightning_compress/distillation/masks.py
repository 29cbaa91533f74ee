"""Masks of valid positions: which terms one fits, and what the others take of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_compress.distillation.losses.base import DistillationLoss, LogitLoss


def positions_of(logits: Tensor, class_dim: int) -> torch.Size:
    """The shape of the positions of logits."""
    return logits.movedim(class_dim, -1).shape[:-1]


def mask_of(valid: Tensor | None, positions: torch.Size) -> Tensor | None:
    """What a mask says of logits at ``positions``: itself, or whole samples; None: all count.

    A mask of samples (B,) holds for all their positions. Of one that counts other positions, such as the tokens before
    a pooling, stay the samples in which any counts.

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
    """The mask for each term, and a sentence for each that doesn't take it as it is.

    Where it fits no term at all, all get it, and those of logits say what is wrong.
    """
    masks: dict[str, Tensor | None] = dict.fromkeys(pairs, valid)
    notes: dict[str, str] = {}
    if valid is None:
        return masks, notes
    fitting = {name: _fits(valid, losses[name], student) for name, (student, _) in pairs.items()}
    for name, (student, _) in pairs.items():
        loss = losses[name]
        if fitting[name]:
            continue
        if isinstance(loss, LogitLoss):
            if not any(fitting.values()):
                continue
            masks[name] = mask_of(valid, positions_of(student, loss.class_dim))
            taken = "all count" if masks[name] is None else "those of samples that have a valid one count"
        elif type(loss).__module__.startswith("lightning_compress."):  # a loss of the user's own may know what to do
            taken = "all count"
        else:
            continue
        notes[name] = (
            f"`valid_positions` {tuple(valid.shape)} are no positions of {name} {tuple(student.shape)}, where {taken}."
        )
    return masks, notes


def _fits(valid: Tensor, loss: DistillationLoss, student: Tensor) -> bool:
    if isinstance(loss, LogitLoss):
        return valid.shape == positions_of(student, loss.class_dim)
    return valid.shape == student.shape[: valid.dim()] and (valid.dim() == 1 or (valid.dim(), student.dim()) == (2, 3))
