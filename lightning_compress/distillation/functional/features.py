"""Losses between hidden representations, (B, ...): of one shape, of one resolution, or of one batch.

``valid`` says what counts where not everything does: which samples, a boolean tensor (B,); or which positions of
features (B, L, D), a boolean tensor (B, L). A mask of any other shape (that of a dense output, say) leaves features
whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compress.distillation.functional.precision import check_shapes, exact, full, mean, unit
from lightning_compress.errors import invalid

_POOLS: dict[int, Callable[..., Tensor]] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}


def feature_cosine(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """One minus the cosine similarity of two hidden representations, averaged over the batch.

    ``mean_b (1 - <s_b, t_b> / (|s_b| |t_b|))``, each sample flattened.

    Args:
        student: Features of shape (B, ...).
        teacher: Features of the same shape.
        valid: Optional, which samples (B,) or positions (B, L) count.

    Returns:
        A scalar in float32 (float64 for float64 features), in [0, 2].

    Raises:
        CompressionError: If the shapes differ.

    Example:
        >>> f"{feature_cosine(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]])):.1f}"
        '1.0'
    """
    check_shapes(student, teacher)
    with exact(student):
        (student, teacher), samples = _counted((student, teacher), valid)
        return mean(1 - (unit(student.flatten(1)) * unit(teacher.flatten(1))).sum(1), samples)


def feature_mse(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean squared error between two feature maps: ``mean (s - t)²`` over all elements.

    Args:
        student: Features of shape (B, ...), already brought to the teacher's shape by a regressor where they differed.
        teacher: Features of the same shape.
        valid: Optional, which samples (B,) or positions (B, L) count.

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
    check_shapes(student, teacher)
    with exact(student):
        shown = _shown(student, valid)
        if shown is None:
            return F.mse_loss(full(student), full(teacher)) if student.numel() else full(student).sum()
        difference = full(student).where(shown, 0.0) - full(teacher).where(shown, 0.0)
        return mean(difference.square(), shown.expand_as(difference))


def attention_transfer(student: Tensor, teacher: Tensor, channel_dim: int = 1, valid: Tensor | None = None) -> Tensor:
    """Mean squared difference of where student and teacher are active, whatever their numbers of channels.

    ``mean_{b,i} (a_s - a_t)²`` with the attention map ``a = vec(Σ_c f_c²) / |vec(Σ_c f_c²)|`` over the positions i.
    Where the resolutions differ, the larger map is pooled to the smaller.

    Args:
        student: Features of shape (B, C, ...).
        teacher: Features of shape (B, C', ...).
        channel_dim: Where the channels stand: 1 for (B, C, H, W), -1 for (B, L, D).
        valid: Optional, which samples (B,) or positions (B, L) count.

    Returns:
        A scalar in float32 (float64 for float64 features).

    Raises:
        CompressionError: If the ranks or the batches differ, or there are no positions.

    Example:
        >>> features = torch.rand(2, 3, 4, 4)
        >>> f"{attention_transfer(features, 5 * features.repeat(1, 2, 1, 1)):.4f}"
        '0.0000'

    References:
        Zagoruyko and Komodakis, "Paying More Attention to Attention" (2017), eq. 2 with p = 2; the mean of squares, as
        in the authors' code, instead of the norm, hence the usual weight of 1000.
    """
    if student.dim() != teacher.dim() or student.dim() < 3 or len(student) != len(teacher):
        raise invalid(
            "student_layer",
            f"have features (B, C, ...) of the teacher's rank and batch, {tuple(teacher.shape)}",
            tuple(student.shape),
            "Attention transfer compares positions: name layers that put out maps or sequences.",
        )
    with exact(student):
        (student, teacher), samples = _counted((student, teacher), valid)
        maps = [features.square().mean(channel_dim) for features in (student, teacher)]
        size = [min(sizes) for sizes in zip(maps[0].shape[1:], maps[1].shape[1:], strict=True)]
        ours, theirs = (unit(_pooled(each, size).flatten(1)) for each in maps)
        squared, counts = (ours - theirs).square(), samples.unsqueeze(1)
        if valid is not None and valid.shape == squared.shape == student.shape[:2] and student.dim() == 3:
            counts = counts & valid.bool()  # the positions of sequences
        return mean(squared, counts.expand_as(squared))


def similarity_preserving(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean squared difference of the similarities between the samples of a batch, whatever the features' shapes.

    ``|G_s - G_t|² / B²``, G the rows of ``F Fᵀ`` at length 1, F the batch with each sample flattened.

    Args:
        student: Features of shape (B, ...).
        teacher: Features of shape (B, ...).
        valid: Optional, which samples (B,) or positions (B, L) count.

    Returns:
        A scalar in float32 (float64 for float64 features).

    Raises:
        CompressionError: If the batches differ.

    Example:
        >>> features = torch.rand(4, 6)
        >>> f"{similarity_preserving(features, features @ torch.eye(6).flip(0)):.4f}"
        '0.0000'

    References:
        Tung and Mori, "Similarity-Preserving Knowledge Distillation" (2019), eqs. 2 to 4.
    """
    _check_batches(student, teacher)
    with exact(student):
        (student, teacher), samples = _counted((student, teacher), valid)
        ours, theirs = (unit(each.flatten(1) @ each.flatten(1).T) for each in (student, teacher))
        return (ours - theirs).square().sum() / samples.sum().clamp(min=1).square()


def relational_distance(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """Huber loss between the distances of all pairs in a batch, whatever the features' shapes.

    ``mean_{i,j} huber(d_s - d_t)`` with ``d = |f_i - f_j| / μ``, μ the mean over pairs of different samples. Memory
    grows with B².

    Args:
        student: Features of shape (B, ...), each sample flattened.
        teacher: Features of shape (B, ...).
        valid: Optional, which samples (B,) or positions (B, L) count.

    Returns:
        A scalar in float32 (float64 for float64 features); 0 for a batch of one.

    Raises:
        CompressionError: If the batches differ.

    Example:
        >>> features = torch.rand(4, 6)
        >>> f"{relational_distance(features, 3 * features + 1):.4f}"
        '0.0000'

    References:
        Park et al., "Relational Knowledge Distillation" (2019), eqs. 4 to 7.
    """
    _check_batches(student, teacher)
    with exact(student):
        (student, teacher), samples = _counted((student, teacher), valid)
        pairs = samples.unsqueeze(0) & samples.unsqueeze(1)
        ours, theirs = (_relative_distances(each.flatten(1), pairs) for each in (student, teacher))
        return mean(F.smooth_l1_loss(ours, theirs, reduction="none"), pairs)


def relational_angle(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """Huber loss between the cosines of the angles in all triples of a batch, whatever the features' shapes.

    ``mean_{i,j,k} huber(cos_s - cos_t)`` with the cosine of the angle at sample j between those to i and to k. Memory
    grows with B³ + B² · D.

    Args:
        student: Features of shape (B, ...), each sample flattened.
        teacher: Features of shape (B, ...).
        valid: Optional, which samples (B,) or positions (B, L) count.

    Returns:
        A scalar in float32 (float64 for float64 features); 0 for a batch of two.

    Raises:
        CompressionError: If the batches differ.

    Example:
        >>> features = torch.rand(4, 6)
        >>> f"{relational_angle(features, 3 * features + 1):.4f}"
        '0.0000'

    References:
        Park et al., "Relational Knowledge Distillation" (2019), eqs. 8 and 9.
    """
    _check_batches(student, teacher)
    with exact(student):
        (student, teacher), samples = _counted((student, teacher), valid)
        triples = samples.view(-1, 1, 1) & samples.view(1, -1, 1) & samples.view(1, 1, -1)
        ours, theirs = (_cosines(each.flatten(1)) for each in (student, teacher))
        return mean(F.smooth_l1_loss(ours, theirs, reduction="none"), triples)


def _relative_distances(features: Tensor, pairs: Tensor) -> Tensor:
    # Not by way of the Gram matrix, which cancels; and cdist has a gradient of 0 where the distance is 0.
    distances = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist").where(pairs, 0.0)
    others = pairs.sum() - pairs.diagonal().sum()
    mu = distances.sum() / others.clamp(min=1)
    return distances / mu.where(mu > 0, 1.0)


def _cosines(features: Tensor) -> Tensor:
    directions = unit(features.unsqueeze(0) - features.unsqueeze(1))
    return directions @ directions.mT


def _counted(pair: tuple[Tensor, Tensor], valid: Tensor | None) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Both features in full precision, zeros where they don't count; and which samples do."""
    samples = torch.ones(len(pair[0]), dtype=torch.bool, device=pair[0].device)
    counted = []
    for features in (each.unsqueeze(1) if each.dim() == 1 else each for each in pair):
        shown = _shown(features, valid)
        counted.append(full(features) if shown is None else full(features).where(shown, 0.0))
        samples = samples if shown is None else samples & shown.flatten(1).any(1)
    # A sample that doesn't count on one side counts on neither.
    ours, theirs = (each.where(samples.view(-1, *[1] * (each.dim() - 1)), 0.0) for each in counted)
    return (ours, theirs), samples


def _shown(features: Tensor, valid: Tensor | None) -> Tensor | None:
    """``valid`` as a mask that broadcasts over the features; None where it says nothing of them."""
    speaks = valid is not None and (valid.dim() == 1 or (valid.dim() == 2 and features.dim() == 3))
    if valid is None or not speaks or valid.shape != features.shape[: valid.dim()]:
        return None
    return valid.bool().reshape(*valid.shape, *[1] * (features.dim() - valid.dim()))


def _pooled(maps: Tensor, size: Sequence[int]) -> Tensor:
    if list(maps.shape[1:]) == list(size):
        return maps
    pooled = _POOLS[len(size)](maps.unsqueeze(1), tuple(size))
    return pooled.squeeze(1)


def _check_batches(student: Tensor, teacher: Tensor) -> None:
    if len(student) != len(teacher):
        raise invalid("teacher", f"put out features of the student's batch of {len(student)}", tuple(teacher.shape))
