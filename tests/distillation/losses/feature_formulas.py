"""The papers' formulas of losses of features as plain loops in float64, and the losses that are held against them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_compress import (
    AttentionTransfer,
    FeatureCosine,
    FeatureLoss,
    FeatureMSE,
    RelationalAngle,
    RelationalDistance,
    SimilarityPreserving,
)

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]

LOSSES: dict[str, FeatureLoss] = {
    "feature_cosine": FeatureCosine("a", "b"),
    "feature_mse": FeatureMSE("a", "b"),
    "attention_transfer": AttentionTransfer("a", "b"),
    "attention_transfer, channels last": AttentionTransfer("a", "b", channel_dim=-1),
    "similarity_preserving": SimilarityPreserving("a", "b"),
    "relational_distance": RelationalDistance("a", "b"),
    "relational_angle": RelationalAngle("a", "b"),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
laws = settings(max_examples=10)
seeds = st.integers(0, 10_000)


# The formulas


def flat(x: Array) -> list[Array]:
    return [sample.reshape(-1) for sample in x]


def length(v: Array) -> float:
    return math.sqrt(sum(float(e) ** 2 for e in v.reshape(-1)))


def direction(v: Array) -> Array:
    return v / length(v) if length(v) else v


def huber(d: float) -> float:
    return 0.5 * d * d if abs(d) <= 1 else abs(d) - 0.5


def cosine(s: Array, t: Array) -> float:
    return float(np.mean([1 - direction(a) @ direction(b) for a, b in zip(flat(s), flat(t), strict=True)]))


def romero(s: Array, t: Array) -> float:
    return sum((a - b) ** 2 for a, b in zip(s.reshape(-1), t.reshape(-1), strict=True)) / s.size


def shrunk(x: Array, size: list[int]) -> Array:
    """Averages over the bins from floor(i n / m) to ceil((i + 1) n / m), one axis after the other."""
    for axis, m in enumerate(size):
        n = x.shape[axis]
        bins = [np.take(x, range(i * n // m, -(-(i + 1) * n // m)), axis).mean(axis) for i in range(m)]
        x = np.stack(bins, axis)
    return x


def zagoruyko(s: Array, t: Array, channel_dim: int = 1) -> float:
    terms = []
    for a, b in zip(s, t, strict=True):
        channels = channel_dim % s.ndim - 1
        maps = [(side**2).sum(channels) for side in (a, b)]
        size = [min(sizes) for sizes in zip(*(side.shape for side in maps), strict=True)]
        student, teacher = (direction(shrunk(side, size).reshape(-1)) for side in maps)
        terms.append(((student - teacher) ** 2).mean())
    return float(np.mean(terms))


def zagoruyko_last(s: Array, t: Array) -> float:
    return zagoruyko(s, t, -1)


def tung(s: Array, t: Array) -> float:
    total, n = 0.0, len(s)
    for i in range(n):
        student, teacher = (direction(np.array([x[i] @ x[j] for j in range(n)])) for x in (flat(s), flat(t)))
        total += ((student - teacher) ** 2).sum()
    return total / n**2


def park_distances(s: Array, t: Array) -> float:
    n, distances = len(s), []
    for x in (flat(s), flat(t)):
        d = [[length(x[i] - x[j]) for j in range(n)] for i in range(n)]
        mu = sum(map(sum, d)) / max(n * (n - 1), 1)
        distances.append([e / mu if mu else 0.0 for row in d for e in row])
    return float(np.mean([huber(a - b) for a, b in zip(*distances, strict=True)]))


def park_angles(s: Array, t: Array) -> float:
    n, cosines = len(s), []
    for x in (flat(s), flat(t)):
        triples = [(i, j, k) for i in range(n) for j in range(n) for k in range(n)]
        cosines.append([direction(x[i] - x[j]) @ direction(x[k] - x[j]) for i, j, k in triples])
    return float(np.mean([huber(a - b) for a, b in zip(*cosines, strict=True)]))


FORMULAS: dict[str, Callable[[Array, Array], float]] = {
    "feature_cosine": cosine,
    "feature_mse": romero,
    "attention_transfer": zagoruyko,
    "attention_transfer, channels last": zagoruyko_last,
    "similarity_preserving": tung,
    "relational_distance": park_distances,
    "relational_angle": park_angles,
}
SAME: list[tuple[Shape, Shape]] = [(shape, shape) for shape in [(5, 6), (3, 4, 5), (2, 3, 4, 5), (1, 6), (2, 6)]]
OTHER: list[tuple[Shape, Shape]] = [*SAME, ((5, 6), (5, 9)), ((3, 4, 5), (3, 2, 2, 2)), ((6, 1), (6, 3))]
SHAPES: dict[str, list[tuple[Shape, Shape]]] = {
    "feature_cosine": SAME,
    "feature_mse": SAME,
    "attention_transfer": [
        ((3, 4, 5), (3, 2, 5)),
        ((1, 2, 3, 3), (1, 4, 3, 3)),
        ((2, 3, 4, 6), (2, 5, 2, 3)),  # the student's map is larger
        ((2, 3, 3, 2), (2, 3, 5, 3)),  # the teacher's is, and not by a whole factor
        ((2, 3, 2, 7), (2, 1, 5, 3)),  # each is, along one side
        ((2, 3, 4, 2, 2), (2, 5, 2, 2, 3)),
        ((2, 3, 7), (2, 3, 4)),
    ],
    "attention_transfer, channels last": [
        ((3, 5, 4), (3, 5, 2)),
        ((2, 7, 3), (2, 3, 3)),
        ((2, 4, 4, 3), (2, 2, 2, 5)),
    ],
    "similarity_preserving": OTHER,
    "relational_distance": OTHER,
    "relational_angle": OTHER,
}
CASES = [pytest.param(name, *pair, id=f"{name}-{pair[0]}-{pair[1]}") for name in SHAPES for pair in SHAPES[name]]


def inputs(
    s: Shape, t: Shape | None = None, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in (s, t or s))  # type: ignore[return-value]


def by_hand(name: str, student: Tensor, teacher: Tensor) -> float:
    return float(FORMULAS[name](student.detach().double().numpy(), teacher.detach().double().numpy()))


def value_and_gradient(loss: FeatureLoss, student: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    value = loss(leaf, *args)
    value.backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


RELATIONS = ["similarity_preserving", "relational_distance", "relational_angle"]
either = pytest.mark.parametrize("name", LOSSES)
