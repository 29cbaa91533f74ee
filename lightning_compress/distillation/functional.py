"""The losses as pure functions of two tensors.

All arithmetic is in float32 (float64 stays) with autocast off, in log space, so that values *and* gradients are
finite for extreme and for masked (-inf) logits.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compress.errors import invalid


def soft_target(
    student: Tensor, teacher: Tensor, temperature: float, class_dim: int = -1, valid: Tensor | None = None
) -> Tensor:
    """Kullback-Leibler divergence from the teacher's softened distribution to the student's.

    ``T² · mean over valid positions of Σ_c p_c (log p_c - log q_c)`` with ``p = softmax(teacher / T)`` and
    ``q = softmax(student / T)``. For logits of shape ``(B, C)`` that is ``F.kl_div(..., reduction="batchmean") · T²``.

    Classes that the student masks (-inf) leave the teacher's distribution, which is normalised over the rest (the
    divergence would be infinite); a position where nothing is left doesn't count.

    Args:
        student: Logits, any shape with the classes along ``class_dim``.
        teacher: Logits of the same shape.
        temperature: T > 0.
        class_dim: Where the classes stand: -1 for (B, C) and (B, T, C), 1 for (B, C, H, W).
        valid: Optional, which positions count: a boolean tensor of the logits' shape without ``class_dim``.

    Returns:
        A scalar in float32 (float64 for float64 logits).

    Raises:
        CompressionError: If the shapes differ.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> f"{soft_target(logits, logits, temperature=2.0):.4f}"
        '0.0000'
        >>> f"{soft_target(logits, logits.flip(1), temperature=2.0):.4f}"
        '1.1692'

    References:
        Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015).
    """
    _check_shapes(student, teacher)
    with _exact(student):
        student, teacher, counts = _comparable(student, teacher, class_dim, valid)
        log_q = F.log_softmax(student / temperature, dim=class_dim)
        log_p = F.log_softmax(teacher / temperature, dim=class_dim)
        # A masked class has p = 0 and adds nothing; left in, it would be 0 · inf in the value or in the gradient.
        kept = log_p != -math.inf
        log_q, log_p = log_q.where(kept, 0.0), log_p.where(kept, 0.0)
        divergence = (log_p.exp() * kept * (log_p - log_q)).sum(class_dim)
        return _mean(divergence, counts) * temperature**2


def hard_target(student: Tensor, teacher: Tensor, class_dim: int = -1, valid: Tensor | None = None) -> Tensor:
    """Cross-entropy of the student against the class that the teacher would choose.

    ``mean over valid positions of -log softmax(student)[argmax teacher]``. Masked classes as in :func:`soft_target`.

    Args:
        student: Logits, any shape with the classes along ``class_dim``.
        teacher: Logits of the same shape.
        class_dim: Where the classes stand.
        valid: Optional, which positions count: a boolean tensor of the logits' shape without ``class_dim``.

    Returns:
        A scalar in float32 (float64 for float64 logits).

    Raises:
        CompressionError: If the shapes differ.

    Example:
        >>> f"{hard_target(torch.tensor([[0.0, 0.0]]), torch.tensor([[5.0, 1.0]])):.4f}"
        '0.6931'

    References:
        Touvron et al., "Training data-efficient image transformers & distillation through attention" (2021), eq. 3.
    """
    _check_shapes(student, teacher)
    with _exact(student):
        student, teacher, counts = _comparable(student, teacher, class_dim, valid)
        label = teacher.argmax(class_dim, keepdim=True)
        chosen = F.log_softmax(student, dim=class_dim).gather(class_dim, label).squeeze(class_dim)
        return _mean(-chosen, counts)


def feature_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """One minus the cosine similarity of two hidden representations, averaged over the batch.

    ``mean_b (1 - <s_b, t_b> / (|s_b| |t_b|))``, each sample flattened.

    Args:
        student: Features of shape (B, ...).
        teacher: Features of the same shape.

    Returns:
        A scalar in float32 (float64 for float64 features), in [0, 2].

    Raises:
        CompressionError: If the shapes differ.

    Example:
        >>> f"{feature_cosine(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]])):.1f}"
        '1.0'
    """
    _check_shapes(student, teacher)
    with _exact(student):
        student, teacher = _full(student).flatten(1), _full(teacher).flatten(1)
        return (1 - F.cosine_similarity(student, teacher, dim=1)).mean()


def feature_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error between two feature maps: ``mean (s - t)²`` over all elements.

    Args:
        student: Features of shape (B, ...), already brought to the teacher's shape by a regressor where they differed.
        teacher: Features of the same shape.

    Returns:
        A scalar in float32 (float64 for float64 features).

    Raises:
        CompressionError: If the shapes differ.

    Example:
        >>> f"{feature_mse(torch.zeros(1, 4), torch.full((1, 4), 3.0)):.1f}"
        '9.0'

    References:
        Romero et al., "FitNets: Hints for Thin Deep Nets" (2015), eq. 3; the mean over elements instead of their sum.
    """
    _check_shapes(student, teacher)
    with _exact(student):
        return F.mse_loss(_full(student), _full(teacher))


def _comparable(
    student: Tensor, teacher: Tensor, class_dim: int, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Both logits in full precision over the same classes, and which positions count."""
    student, teacher = _full(student), _full(teacher)
    teacher = teacher.masked_fill(student == -math.inf, -math.inf)
    counts = (teacher != -math.inf).any(class_dim)
    if valid is not None:
        if valid.shape != counts.shape:
            raise invalid("valid", f"have the positions' shape {tuple(counts.shape)}", tuple(valid.shape))
        counts = counts & valid.bool()
    # Positions that don't count are filled before the softmax: a NaN times a mask of 0 would still be NaN.
    left_out = ~counts.unsqueeze(class_dim)
    return student.masked_fill(left_out, 0.0), teacher.masked_fill(left_out, 0.0), counts


def _mean(values: Tensor, counts: Tensor) -> Tensor:
    return values.where(counts, 0.0).sum() / counts.sum().clamp(min=1)


def _full(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _exact(tensor: Tensor) -> torch.autocast:
    return torch.autocast(tensor.device.type, enabled=False)


def _check_shapes(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise invalid(
            "teacher",
            f"give a tensor of the student's shape {tuple(student.shape)}",
            tuple(teacher.shape),
            "Student and teacher must agree on the classes (or features) that they are compared on.",
        )
