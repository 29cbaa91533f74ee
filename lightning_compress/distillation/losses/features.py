"""Both sides of a loss of hidden representations, (B, ...): of one shape, of one resolution, or of one batch.

``valid`` says what counts where not everything does: which samples, a boolean tensor (B,); or which positions of
features (B, L, D), a boolean tensor (B, L). A mask of any other shape (that of a dense output, say) leaves features
whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compress.distillation.losses.arithmetic import full
from lightning_compress.errors import invalid


def mask_features(pair: tuple[Tensor, Tensor], valid: Tensor | None) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Both features in full precision, zeros where they don't count; and which samples do."""
    samples = torch.ones(len(pair[0]), dtype=torch.bool, device=pair[0].device)
    masked = []
    for features in (full(side.unsqueeze(1) if side.dim() == 1 else side) for side in pair):
        mask = broadcast_mask(features, valid)
        masked.append(features if mask is None else features.where(mask, 0.0))
        samples = samples if mask is None else samples & mask.flatten(1).any(1)
    # A sample that doesn't count on one side counts on neither.
    student, teacher = (side.where(samples.view(-1, *[1] * (side.dim() - 1)), 0.0) for side in masked)
    return (student, teacher), samples


def broadcast_mask(features: Tensor, valid: Tensor | None) -> Tensor | None:
    """``valid`` as a mask that broadcasts over the features; None where it says nothing of them."""
    if valid is None or not (valid.dim() == 1 or (valid.dim() == 2 and features.dim() == 3)):
        return None
    if valid.shape != features.shape[: valid.dim()]:
        return None
    return valid.bool().reshape(*valid.shape, *[1] * (features.dim() - valid.dim()))


def check_batches(student: Tensor, teacher: Tensor) -> None:
    """Raise if student and teacher don't have one batch."""
    if len(student) != len(teacher):
        raise invalid("teacher", f"put out features of the student's batch of {len(student)}", tuple(teacher.shape))
