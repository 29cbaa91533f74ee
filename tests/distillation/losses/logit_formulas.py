"""The papers' formulas of losses of logits as plain loops in float64, and the losses that are held against them."""

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

from lightning_compress import DIST, DKD, HardTarget, LogitLoss, LogitMSE, SoftTarget

INF = math.inf
Rows = np.ndarray[Any, Any]

# Every field off its default, so that one that is not handed on is noticed.
LOSSES: dict[str, LogitLoss] = {
    "soft_target": SoftTarget(temperature=3.0),
    "soft_target, standardized": SoftTarget(temperature=1.5, standardize=True),
    "hard_target": HardTarget(),
    "logit_mse": LogitMSE(),
    "logit_mse, standardized": LogitMSE(standardize=True),
    "dkd": DKD(temperature=2.5, alpha=0.7, beta=3.0),
    "dkd, standardized": DKD(temperature=1.5, alpha=0.7, beta=3.0, standardize=True),
    "dist": DIST(temperature=1.5, beta=0.7, gamma=1.3),
    "dist, standardized": DIST(temperature=1.5, beta=0.7, gamma=1.3, standardize=True),
}
SHAPES = [
    ((5, 7), -1),
    ((1, 7), -1),  # a batch of one
    ((2, 4), 1),  # a batch of two
    ((6, 2), -1),  # two classes
    ((3, 4, 6), 2),  # tokens
    ((2, 5, 3, 2), 1),  # pixels
    ((2, 5, 3, 2), -3),
    ((2, 3, 1, 1), 1),
]
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
laws = settings(max_examples=12)
seeds = st.integers(0, 10_000)


# The formulas. A row holds the logits of one position, (N, C) in all; -inf masks a class.


def log_probs(z: Any, temperature: float = 1.0) -> list[float]:
    scaled = [float(v) / temperature for v in z]
    top = max(scaled)
    total = top + math.log(sum(math.exp(v - top) for v in scaled))
    return [v - total for v in scaled]


def log_sum(logs: list[float]) -> float:
    top = max(logs)
    return top if top == -INF else top + math.log(sum(math.exp(v - top) for v in logs))


def divergence(log_p: list[float], log_q: list[float]) -> float:
    return sum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True) if a > -INF)


def z_score(row: Rows) -> Rows:
    shown = row[row > -INF]
    deviation = math.sqrt(sum((v - shown.mean()) ** 2 for v in shown) / len(shown))
    return np.where(row > -INF, (row - shown.mean()) / deviation if deviation else 0.0, -INF)


def pearson(x: Rows, y: Rows) -> float:
    if len(x) < 2 or min(np.ptp(x), np.ptp(y)) < 1e-50:  # in any floating point the squares vanish
        return 0.0
    a, b = x - x.mean(), y - y.mean()
    return float((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum()))


def average(values: Any) -> float:
    values = list(values)
    return float(sum(values)) / len(values) if values else 0.0


def hinton(s: Rows, t: Rows, y: Rows, loss: Any) -> float:
    T = loss.temperature
    return T**2 * average(divergence(log_probs(b, T), log_probs(a, T)) for a, b in zip(s, t, strict=True))


def touvron(s: Rows, t: Rows, y: Rows, loss: Any) -> float:
    return average(-log_probs(a)[int(np.argmax(b))] for a, b in zip(s, t, strict=True))


def ba_caruana(s: Rows, t: Rows, y: Rows, loss: Any) -> float:
    return average((a - b) ** 2 for a, b in zip(s.flat, t.flat, strict=True) if b > -INF)


def zhao(s: Rows, t: Rows, y: Rows, loss: Any) -> float:
    T, terms = loss.temperature, []
    for a, b, label in zip(s, t, y, strict=True):
        rest = [c for c in range(len(a)) if c != label]
        if not 0 <= label < len(a) or b[label] == -INF or max(b[rest]) == -INF:
            continue
        log_q, log_p = log_probs(a, T), log_probs(b, T)
        binary = [[logs[label], log_sum([logs[c] for c in rest])] for logs in (log_p, log_q)]
        terms.append(
            loss.alpha * divergence(*binary) + loss.beta * divergence(log_probs(b[rest], T), log_probs(a[rest], T))
        )
    return T**2 * average(terms)


def huang(s: Rows, t: Rows, y: Rows, loss: Any) -> float:
    if not len(s):
        return 0.0
    T = loss.temperature
    q, p = (np.exp([log_probs(row, T) for row in rows]) for rows in (s, t))
    unmasked = t > -INF
    inter = average(1 - pearson(q[i][unmasked[i]], p[i][unmasked[i]]) for i in range(len(q)))
    columns = [c for c in range(q.shape[1]) if unmasked[:, c].sum() > 1]
    intra = average(1 - pearson(q[unmasked[:, c], c], p[unmasked[:, c], c]) for c in columns)
    return T**2 * (loss.beta * inter + loss.gamma * intra)


FORMULAS: dict[type, Callable[[Rows, Rows, Rows, Any], float]] = {
    SoftTarget: hinton,
    HardTarget: touvron,
    LogitMSE: ba_caruana,
    DKD: zhao,
    DIST: huang,
}


def rows(x: Tensor, dim: int) -> Rows:
    return np.moveaxis(x.detach().double().numpy(), dim, -1).reshape(-1, x.shape[dim])


def by_hand(loss: LogitLoss, student: Tensor, teacher: Tensor, targets: Tensor) -> float:
    s, t = rows(student, loss.class_dim), rows(teacher, loss.class_dim).copy()
    t[s == -INF] = -INF
    counts = (t > -INF).any(1)
    s, t, y = s[counts], t[counts], targets.numpy().reshape(-1)[counts]
    if getattr(loss, "standardize", False):
        s, t = (np.array([z_score(row) for row in side]).reshape(side.shape) for side in (s, t))
    return FORMULAS[type(loss)](s, t, y, loss)


def gradient_by_hand(f: Callable[[Tensor], float], x: Tensor, step: float) -> Tensor:
    """Central differences in float64; 0 where the logit is masked."""
    x, gradient = x.detach().double().clone(), torch.zeros_like(x, dtype=torch.float64)
    for i, value in enumerate(x.flatten().tolist()):
        ends = []
        for moved in (value + step, value - step):
            x.view(-1)[i] = moved
            ends.append(f(x))
        x.view(-1)[i] = value
        gradient.view(-1)[i] = (ends[0] - ends[1]) / (2 * step) if value > -INF else 0.0
    return gradient


def inputs(
    shape: tuple[int, ...] = (5, 4), dim: int = -1, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(2))
    positions = student.movedim(dim, -1).shape[:-1]
    return student.to(dtype), teacher.to(dtype), torch.randint(shape[dim], positions, generator=g)


def value_and_gradient(loss: LogitLoss, student: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    value = loss(leaf, *args, **kwargs)
    value.backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad
