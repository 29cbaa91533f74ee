"""Losses between the logits of student and teacher, of any shape with the classes along one dimension.

A *position* is what is left of the shape without the classes: a sample, a token, a pixel. Classes that the student
masks (-inf) leave the teacher's distribution, which is normalised over the rest (the divergence would be infinite); a
position where nothing is left to compare doesn't count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compress.distillation.functional.precision import check_shapes, exact, full, mean, unit
from lightning_compress.errors import invalid

_STEADY = 1e-8
"""Added to a variance, so that equal logits have a gradient; a ten-thousandth of their scale."""


def soft_target(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    class_dim: int = -1,
    valid: Tensor | None = None,
    standardize: bool = False,
) -> Tensor:
    """Kullback-Leibler divergence from the teacher's softened distribution to the student's.

    ``T² · mean over valid positions of Σ_c p_c (log p_c - log q_c)`` with ``p = softmax(teacher / T)`` and
    ``q = softmax(student / T)``. For logits of shape ``(B, C)`` that is ``F.kl_div(..., reduction="batchmean") · T²``.

    Args:
        student: Logits, any shape with the classes along ``class_dim``.
        teacher: Logits of the same shape.
        temperature: T > 0.
        class_dim: Where the classes stand: -1 for (B, C) and (B, T, C), 1 for (B, C, H, W).
        valid: Optional, which positions count: a boolean tensor of the logits' shape without ``class_dim``.
        standardize: Compare :func:`standardize_logits` of both.

    Returns:
        A scalar in float32 (float64 for float64 logits).

    Raises:
        CompressionError: If the shapes differ, or there is only one class.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> f"{soft_target(logits, logits, temperature=2.0):.4f}"
        '0.0000'
        >>> f"{soft_target(logits, logits.flip(1), temperature=2.0):.4f}"
        '1.1692'

    References:
        Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015).
    """
    pair = _compare(student, teacher, class_dim, valid, standardize)
    with exact(student):
        if pair.whole:
            log_q, log_p = (F.log_softmax(logits / temperature, dim=-1) for logits in (pair.student, pair.teacher))
            return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean() * temperature**2
        return mean(_divergence(pair.student / temperature, pair.teacher / temperature), pair.counts) * temperature**2


def hard_target(student: Tensor, teacher: Tensor, class_dim: int = -1, valid: Tensor | None = None) -> Tensor:
    """Cross-entropy of the student against the class that the teacher would choose.

    ``mean over valid positions of -log softmax(student)[argmax teacher]``.

    Args:
        student: Logits, any shape with the classes along ``class_dim``.
        teacher: Logits of the same shape.
        class_dim: Where the classes stand.
        valid: Optional, which positions count: a boolean tensor of the logits' shape without ``class_dim``.

    Returns:
        A scalar in float32 (float64 for float64 logits).

    Raises:
        CompressionError: If the shapes differ, or there is only one class.

    Example:
        >>> f"{hard_target(torch.tensor([[0.0, 0.0]]), torch.tensor([[5.0, 1.0]])):.4f}"
        '0.6931'

    References:
        Touvron et al., "Training data-efficient image transformers & distillation through attention" (2021), eq. 3.
    """
    pair = _compare(student, teacher, class_dim, valid)
    with exact(student):
        chosen = F.log_softmax(pair.student, dim=-1).gather(-1, pair.teacher.argmax(-1, keepdim=True)).squeeze(-1)
        return mean(-chosen, pair.counts)


def logit_mse(
    student: Tensor, teacher: Tensor, class_dim: int = -1, valid: Tensor | None = None, standardize: bool = False
) -> Tensor:
    """Mean squared error of the logits themselves: ``mean over valid positions and classes of (s - t)²``.

    It also serves outputs that are no logits: the predictions of a regression, (B,) or (B, targets).

    Args:
        student: Logits, any shape with the classes along ``class_dim``.
        teacher: Logits of the same shape.
        class_dim: Where the classes stand.
        valid: Optional, which positions count: a boolean tensor of the logits' shape without ``class_dim``.
        standardize: Compare :func:`standardize_logits` of both.

    Returns:
        A scalar in float32 (float64 for float64 logits).

    Raises:
        CompressionError: If the shapes differ.

    Example:
        >>> f"{logit_mse(torch.tensor([[1.0, 5.0]]), torch.tensor([[3.0, 5.0]])):.1f}"
        '2.0'

    References:
        Ba and Caruana, "Do Deep Nets Really Need to be Deep?" (2014), eq. 1; the mean over classes, not half the sum.
    """
    if student.dim() == 1 and student.shape == teacher.shape:  # one number a sample: every sample is a position
        student, teacher, class_dim = student.unsqueeze(-1), teacher.unsqueeze(-1), -1
    pair = _compare(student, teacher, class_dim, valid, standardize, least_classes=1)
    with exact(student):
        squared = (pair.student.where(pair.kept, 0.0) - pair.teacher.where(pair.kept, 0.0)).square()
        return mean(squared, pair.kept & pair.counts.unsqueeze(-1))


def dkd(
    student: Tensor,
    teacher: Tensor,
    targets: Tensor,
    temperature: float,
    alpha: float = 1.0,
    beta: float = 8.0,
    class_dim: int = -1,
    valid: Tensor | None = None,
    standardize: bool = False,
) -> Tensor:
    """Decoupled knowledge distillation: the divergence on the target class apart from that on all others.

    ``T² · mean over valid positions of (α · TCKD + β · NCKD)``. TCKD is the divergence of the two binary distributions
    (p_t, 1 - p_t) and (q_t, 1 - q_t), NCKD that of the distributions over the other classes, each normalised by
    itself. With ``β = 1 - p_t`` this would be :func:`soft_target`. With two classes NCKD is 0, and ``α = 1`` gives
    :func:`soft_target`.

    Args:
        student: Logits, any shape with the classes along ``class_dim``.
        teacher: Logits of the same shape.
        targets: The true classes, integers of the logits' shape without ``class_dim``. A position whose target is no
            class (such as -100), or one that is masked, doesn't count.
        temperature: T > 0.
        alpha: Weight of TCKD.
        beta: Weight of NCKD.
        class_dim: Where the classes stand.
        valid: Optional, which positions count: a boolean tensor of the targets' shape.
        standardize: Compare :func:`standardize_logits` of both.

    Returns:
        A scalar in float32 (float64 for float64 logits).

    Raises:
        CompressionError: If the shapes differ, there is only one class, or the targets are no classes.

    Example:
        >>> student, teacher = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        >>> f"{dkd(student, teacher, torch.tensor([0]), 1.0):.4f} {soft_target(student, teacher, 1.0):.4f}"
        '1.5232 1.5232'

    References:
        Zhao et al., "Decoupled Knowledge Distillation" (2022), eq. 7.
    """
    pair = _compare(student, teacher, class_dim, valid, standardize)
    _check_targets(targets, pair.counts.shape)
    with exact(student):
        classes = pair.student.shape[-1]
        target = targets.long().clamp(0, classes - 1).unsqueeze(-1)
        counts = pair.counts & (targets >= 0) & (targets < classes) & pair.kept.gather(-1, target).squeeze(-1)
        counts = counts & pair.kept.scatter(-1, target, False).any(-1)
        # Filled, as in `_compare`: with the target or all others masked, a difference of two -inf would arise.
        logits = [each.where(counts.unsqueeze(-1), 0.0) / temperature for each in (pair.student, pair.teacher)]
        others = [each.scatter(-1, target, -math.inf) for each in logits]
        log_q, log_p = (_binary(each, target) for each in logits)
        tckd, nckd = (log_p.exp() * (log_p - log_q)).sum(-1), _divergence(*others)
        return mean(alpha * tckd + beta * nckd, counts) * temperature**2


def dist(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
    class_dim: int = -1,
    valid: Tensor | None = None,
    standardize: bool = False,
) -> Tensor:
    """Distance of correlations: only the relations within the teacher's predictions are imitated, not their scale.

    ``T² · (β · mean over positions of (1 - ρ(q_i, p_i)) + γ · mean over classes of (1 - ρ(q^c, p^c)))``: Pearson's
    correlation ρ of the softened distributions, over the classes of one position (inter-class), and over the
    positions for one class (intra-class). The second needs two positions or more. Where either side is constant, its
    correlation counts as 0.

    Args:
        student: Logits, any shape with the classes along ``class_dim``.
        teacher: Logits of the same shape.
        temperature: T > 0.
        beta: Weight of the inter-class term.
        gamma: Weight of the intra-class term.
        class_dim: Where the classes stand.
        valid: Optional, which positions count: a boolean tensor of the logits' shape without ``class_dim``.
        standardize: Compare :func:`standardize_logits` of both.

    Returns:
        A scalar in float32 (float64 for float64 logits).

    Raises:
        CompressionError: If the shapes differ, or there is only one class.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 3.0]])
        >>> abs(float(dist(logits, logits))) < 1e-6
        True

    References:
        Huang et al., "Knowledge Distillation from A Stronger Teacher" (2022), eqs. 8 to 10.
    """
    pair = _compare(student, teacher, class_dim, valid, standardize)
    with exact(student):
        kept = (pair.kept & pair.counts.unsqueeze(-1)).reshape(-1, pair.kept.shape[-1])
        q, p = (
            (logits / temperature).softmax(-1).reshape(kept.shape).where(kept, 0.0)
            for logits in (pair.student, pair.teacher)
        )
        inter = mean(1 - _correlation(q, p, kept, -1), pair.counts.flatten())
        intra = mean(1 - _correlation(q, p, kept, 0), kept.sum(0) > 1)
        return (beta * inter + gamma * intra) * temperature**2


def standardize_logits(logits: Tensor, kept: Tensor | None = None) -> Tensor:
    """Logits with mean 0 and standard deviation 1 over the last dimension.

    ``(z - mean(z)) / sqrt(var(z) + 1e-8)``: the student needs to match the teacher's shape, not its scale. The
    variance is that of the whole, as in the paper (its code divides by C - 1).

    Args:
        logits: Any shape with the classes last.
        kept: Optional, which classes count, a boolean tensor of that shape; the others become -inf.

    Returns:
        Logits of the same shape.

    Example:
        >>> standardize_logits(torch.tensor([[1.0, 3.0]]))
        tensor([[-1.,  1.]])

    References:
        Sun et al., "Logit Standardization in Knowledge Distillation" (2024), algorithm 1.
    """
    kept = torch.ones_like(logits, dtype=torch.bool) if kept is None else kept
    centred = _centred(logits.where(kept, 0.0), kept, -1)
    variance = centred.square().sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp(min=1)
    return (centred / (variance + _STEADY).sqrt()).where(kept, -math.inf)


@dataclass(frozen=True)
class _Pair:
    """Both logits in full precision, classes last, over the same classes.

    Attributes:
        student: (..., C); where a position doesn't count, zeros.
        teacher: (..., C); where a position doesn't count, zeros.
        kept: (..., C), which classes are masked on neither side.
        counts: (...), which positions count.
        whole: Whether everything is known to count.
    """

    student: Tensor
    teacher: Tensor
    kept: Tensor
    counts: Tensor
    whole: bool = False


def _compare(
    student: Tensor,
    teacher: Tensor,
    class_dim: int,
    valid: Tensor | None,
    standardize: bool = False,
    least_classes: int = 2,
) -> _Pair:
    check_shapes(student, teacher)
    rank = student.dim()
    if not -rank <= class_dim < rank or (rank > 1 and class_dim % rank == 0):
        remedy = "Usual: -1, or 1 for (B, C, H, W)."
        raise invalid(
            "class_dim", f"be a dimension of the logits {tuple(student.shape)}, not the batch", class_dim, remedy
        )
    if student.shape[class_dim] < least_classes:
        raise invalid(
            "class_dim",
            "be a dimension of two classes or more",
            class_dim,
            f"The logits have shape {tuple(student.shape)}. Override `logits` to give a single logit z of a binary "
            "task as [0, z]; for a regression use LogitMSE.",
        )
    student, teacher = full(student).movedim(class_dim, -1), full(teacher).movedim(class_dim, -1)
    # Only where a look doesn't wait for a device.
    look = valid is None and student.device.type == "cpu" and student.numel() > 0
    if look and min(student.min().item(), teacher.min().item()) > -math.inf:
        kept = torch.ones((), dtype=torch.bool).expand(student.shape)
        if standardize:
            student, teacher = standardize_logits(student), standardize_logits(teacher)
        return _Pair(student, teacher, kept, kept[..., 0], whole=True)
    teacher = teacher.masked_fill(student == -math.inf, -math.inf)
    kept = teacher != -math.inf
    counts = kept.any(-1)
    if valid is not None:
        if valid.shape != counts.shape:
            raise invalid("valid", f"have the positions' shape {tuple(counts.shape)}", tuple(valid.shape))
        counts = counts & valid.bool()
    # Positions that don't count are filled before anything is computed: a NaN times a mask of 0 would still be NaN.
    left_out = ~counts.unsqueeze(-1)
    student, teacher, kept = student.masked_fill(left_out, 0.0), teacher.masked_fill(left_out, 0.0), kept | left_out
    if standardize:
        # A class that the teacher alone masks still has the student's probability, and isn't standardized with.
        shown = student != -math.inf
        student, teacher = standardize_logits(student, shown), standardize_logits(teacher, kept)
    return _Pair(student, teacher, kept, counts)


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """``Σ_c p_c (log p_c - log q_c)`` over the last dimension; the teacher masks what the student masks."""
    log_q, log_p = F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1)
    # A masked class has p = 0 and adds nothing; left in, it would be 0 · inf in the value or in the gradient.
    kept = log_p != -math.inf
    log_q, log_p = log_q.where(kept, 0.0), log_p.where(kept, 0.0)
    return (log_p.exp() * kept * (log_p - log_q)).sum(-1)


def _binary(logits: Tensor, target: Tensor) -> Tensor:
    """``(log p_t, log (1 - p_t))``, the latter as a sum over the other classes: 1 - p_t would round to 0."""
    logs = F.log_softmax(logits, dim=-1)
    rest = logs.scatter(-1, target, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logs.gather(-1, target), rest], -1)


def _correlation(x: Tensor, y: Tensor, kept: Tensor, dim: int) -> Tensor:
    return (unit(_centred(x, kept, dim), dim) * unit(_centred(y, kept, dim), dim)).sum(dim)


def _centred(x: Tensor, kept: Tensor, dim: int) -> Tensor:
    """``x``, which is 0 where it isn't kept, minus its mean over what is kept; 0 elsewhere, and where all is equal."""
    centred = (x - x.sum(dim, keepdim=True) / kept.sum(dim, keepdim=True).clamp(min=1)).where(kept, 0.0)
    # Of equal values the rounding of their mean would be left, and be taken for a direction.
    rounding = 8 * torch.finfo(x.dtype).eps * x.detach().abs().amax(dim, keepdim=True)
    return centred.where(centred.detach().abs().amax(dim, keepdim=True) > rounding, 0.0)


def _check_targets(targets: Tensor, shape: torch.Size) -> None:
    if targets.is_floating_point() or targets.dtype == torch.bool or targets.shape != shape:
        raise invalid(
            "targets",
            f"be classes, integers of the positions' shape {tuple(shape)}",
            (str(targets.dtype), tuple(targets.shape)),
            "DKD takes the true class apart from the others; with mixed or soft labels use SoftTarget.",
        )
