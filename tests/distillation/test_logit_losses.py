"""The logit losses against their papers' formulas as plain loops in float64, the laws they obey, and extremes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_compress.distillation import (
    DIST,
    DKD,
    DistillationLoss,
    HardTarget,
    LogitLoss,
    LogitMSE,
    SoftTarget,
    dist,
    dkd,
    functional,
    hard_target,
    logit_mse,
    losses,
    soft_target,
)
from lightning_compress.distillation.functional import standardize_logits
from lightning_compress.errors import CompressionError

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
    kept = t > -INF
    inter = average(1 - pearson(q[i][kept[i]], p[i][kept[i]]) for i in range(len(q)))
    columns = [c for c in range(q.shape[1]) if kept[:, c].sum() > 1]
    intra = average(1 - pearson(q[kept[:, c], c], p[kept[:, c], c]) for c in columns)
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
        s, t = (np.array([z_score(row) for row in each]).reshape(each.shape) for each in (s, t))
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


# Against the formulas


def test_every_logit_loss_has_rows_here() -> None:
    public = {getattr(losses, name) for name in losses.__all__} - {LogitLoss}
    concrete = {each for each in public if issubclass(each, LogitLoss)}
    assert concrete == set(FORMULAS) == {type(loss) for loss in LOSSES.values()}
    for each in concrete:
        rows_of_it = [loss for loss in LOSSES.values() if type(loss) is each]
        fields = {field.name for field in dataclasses.fields(each)}
        assert {getattr(loss, "standardize", False) for loss in rows_of_it} == (
            {True, False} if "standardize" in fields else {False}
        )


@every_loss
@pytest.mark.parametrize(("shape", "dim"), SHAPES)
def test_the_value_is_the_papers_formula(loss: Any, shape: tuple[int, ...], dim: int) -> None:
    loss = dataclasses.replace(loss, class_dim=dim)
    student, teacher, targets = inputs(shape, dim, dtype=torch.float32)
    value = loss(student, teacher, None, targets)
    assert value.shape == () and value.dtype == torch.float32
    assert value.item() == pytest.approx(by_hand(loss, student, teacher, targets), rel=3e-5, abs=1e-6)
    exact = loss(student.double(), teacher.double(), None, targets)
    assert exact.dtype == torch.float64
    # The variance carries 1e-8, which the paper's does not.
    assert exact.item() == pytest.approx(by_hand(loss, student, teacher, targets), rel=1e-6)


@every_loss
@pytest.mark.parametrize(("shape", "dim"), [((3, 4), -1), ((2, 3, 2, 1), 1)])
def test_the_gradient_is_that_of_the_papers_formula(loss: Any, shape: tuple[int, ...], dim: int) -> None:
    loss = dataclasses.replace(loss, class_dim=dim)
    student, teacher, targets = inputs(shape, dim)
    _, gradient = value_and_gradient(loss, student, teacher, None, targets)
    expected = gradient_by_hand(lambda x: by_hand(loss, x, teacher, targets), student, 1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)
    assert gradient.any()


@pytest.mark.parametrize(("shape", "dim"), [((6, 5), -1), ((2, 5, 3, 2), 1)])
def test_against_torchs_own_losses(shape: tuple[int, ...], dim: int) -> None:
    student, teacher, _ = inputs(shape, dim, dtype=torch.float32)
    torch.testing.assert_close(hard_target(student, teacher, dim), F.cross_entropy(student, teacher.argmax(dim)))
    torch.testing.assert_close(logit_mse(student, teacher, dim), F.mse_loss(student, teacher))
    log_q, log_p = ((x / 3).log_softmax(dim).movedim(dim, -1).flatten(0, -2) for x in (student, teacher))
    expected = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean") * 9
    torch.testing.assert_close(soft_target(student, teacher, 3.0, dim), expected)


@given(seeds, st.integers(2, 6), st.floats(0.5, 8))
@laws
def test_dkd_decouples_the_divergence(seed: int, classes: int, temperature: float) -> None:
    student, teacher, targets = inputs((1, classes), seed=seed)
    p_t = (teacher / temperature).softmax(1)[0, targets[0]].item()
    value = dkd(student, teacher, targets, temperature, alpha=1.0, beta=1 - p_t)
    torch.testing.assert_close(value, soft_target(student, teacher, temperature))


@given(seeds, st.floats(0.5, 8), st.floats(0, 10))
@laws
def test_dkd_of_two_classes_is_the_soft_target(seed: int, temperature: float, beta: float) -> None:
    # mdistiller#60: infinite or zero for binary tasks.
    student, teacher, targets = inputs((4, 2), seed=seed)
    value = dkd(student, teacher, targets, temperature, alpha=1.0, beta=beta)
    torch.testing.assert_close(value, soft_target(student, teacher, temperature))


@given(seeds, st.integers(1, 4), st.integers(2, 6), st.booleans())
@laws
def test_standardized_logits_have_mean_0_and_deviation_1(seed: int, b: int, classes: int, masked: bool) -> None:
    logits, _, targets = inputs((b, classes), seed=seed)
    kept = torch.ones_like(logits, dtype=torch.bool)
    if masked:
        kept[range(b), targets] = False
    out = standardize_logits(logits, kept if masked else None)
    expected = np.array([z_score(row) for row in logits.masked_fill(~kept, -INF).numpy()])
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-4, atol=1e-4)  # a pair of logits may be nearly equal
    assert (out[~kept] == -INF).all() and out[kept].isfinite().all()


def test_standardized_mse_is_twice_one_minus_the_correlation() -> None:
    student, teacher, _ = inputs((5, 9))
    correlations = [np.corrcoef(s, t)[0, 1] for s, t in zip(student.numpy(), teacher.numpy(), strict=True)]
    assert logit_mse(student, teacher, standardize=True).item() == pytest.approx(2 * (1 - np.mean(correlations)))


def test_the_outputs_of_a_regression_may_have_no_dimension_of_classes() -> None:
    student, teacher = torch.randn(5), torch.randn(5)
    torch.testing.assert_close(LogitMSE()(student, teacher), F.mse_loss(student, teacher))
    torch.testing.assert_close(LogitMSE()(student[:, None], teacher[:, None]), F.mse_loss(student, teacher))
    valid = torch.tensor([True, False, True, True, False])
    expected = F.mse_loss(student[valid], teacher[valid])
    torch.testing.assert_close(LogitMSE(class_dim=1)(student, teacher, valid), expected)


# Laws


@every_loss
@given(seeds, st.integers(1, 5), st.integers(2, 6))
@laws
def test_the_order_of_classes_and_positions_does_not_matter(loss: Any, seed: int, b: int, c: int) -> None:
    student, teacher, targets = inputs((b, c), seed=seed)
    value = loss(student, teacher, None, targets)
    order, places = torch.randperm(c), torch.randperm(b)
    renamed = order.argsort()[targets]
    torch.testing.assert_close(loss(student[:, order], teacher[:, order], None, renamed), value)
    torch.testing.assert_close(loss(student[places], teacher[places], None, targets[places]), value)
    # Means, not sums: the same positions twice change nothing, nor does another arrangement of them.
    if b > 1:  # one position has no correlation over the batch
        torch.testing.assert_close(loss(student.repeat(2, 1), teacher.repeat(2, 1), None, targets.repeat(2)), value)
        pixels = dataclasses.replace(loss, class_dim=1)
        arranged = (x.T.unsqueeze(0) for x in (student, teacher))
        torch.testing.assert_close(pixels(*arranged, None, targets.unsqueeze(0)), value)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "logit_mse"])
@given(seeds, st.floats(-50, 50))
@laws
def test_a_constant_added_to_a_positions_logits_does_not_matter(name: str, seed: int, shift: float) -> None:
    loss = LOSSES[name]
    student, teacher, targets = inputs(seed=seed)
    shifts = shift * torch.arange(5.0).unsqueeze(1)
    value = loss(student, teacher, None, targets)
    torch.testing.assert_close(loss(student + shifts, teacher - shifts, None, targets), value)


@pytest.mark.parametrize("name", [name for name in LOSSES if "standardized" in name])
@given(seeds, st.floats(0.1, 100))
@laws
def test_the_scale_of_standardized_logits_does_not_matter(name: str, seed: int, scale: float) -> None:
    loss = LOSSES[name]
    student, teacher, targets = inputs(seed=seed)
    value = loss(student, teacher, None, targets)
    scaled = loss(student * scale, teacher / scale, None, targets)
    torch.testing.assert_close(scaled, value, rtol=1e-3, atol=1e-5)


@given(seeds, st.floats(0.1, 1), st.floats(0.1, 1))
@laws
def test_dist_ignores_scale_and_shift_of_either_prediction(seed: int, a: float, b: float) -> None:
    # Huang et al., section 4.1: the invariance that the paper is about, of predictions rather than logits.
    def flatter(logits: Tensor, share: float) -> Tensor:
        return (share * logits.softmax(1) + (1 - share) / logits.shape[1]).log()

    student, teacher, _ = inputs(seed=seed)
    torch.testing.assert_close(dist(flatter(student, a), flatter(teacher, b)), dist(student, teacher))


@every_loss
@given(seeds, st.integers(1, 5), st.integers(2, 6))
@laws
def test_never_negative_and_0_for_the_teacher_itself(loss: Any, seed: int, b: int, c: int) -> None:
    student, teacher, targets = inputs((b, c), seed=seed)
    assert loss(student, teacher, None, targets) >= -1e-12
    if not isinstance(loss, HardTarget):
        value, gradient = value_and_gradient(loss, teacher, teacher, None, targets)
        assert value.abs() < 1e-9 and gradient.abs().max() < 1e-6


@every_loss
@given(seeds, st.sampled_from([math.nan, INF, -INF]))
@laws
def test_positions_that_are_not_valid_do_not_matter_at_all(loss: Any, seed: int, padding: float) -> None:
    student, teacher, targets = inputs((3, 4, 5), seed=seed)
    valid = torch.rand(3, 4, generator=torch.Generator().manual_seed(seed)) < 0.6
    valid[0, :2] = True
    student[~valid], teacher[~valid], targets[~valid] = padding, padding, -100
    value, gradient = value_and_gradient(loss, student, teacher, valid, targets)
    alone, its_gradient = value_and_gradient(loss, student[valid], teacher[valid], None, targets[valid])
    torch.testing.assert_close(value, alone)
    torch.testing.assert_close(gradient[valid], its_gradient)
    assert not gradient[~valid].any()


@every_loss
def test_valid_everywhere_is_no_mask_and_valid_nowhere_is_0_with_a_graph(loss: Any) -> None:
    student, teacher, targets = inputs((3, 4, 5), dtype=torch.float32)
    valid = torch.ones(3, 4, dtype=torch.bool)
    assert torch.equal(loss(student, teacher, valid, targets), loss(student, teacher, None, targets))
    assert torch.equal(loss(student, teacher, valid.long(), targets), loss(student, teacher, None, targets))
    value, gradient = value_and_gradient(loss, torch.full_like(student, math.nan), teacher, ~valid, targets)
    assert value == 0 and not gradient.any()


@every_loss
@given(seeds)
@laws
def test_a_class_that_both_mask_might_as_well_not_exist(loss: Any, seed: int) -> None:
    student, teacher, targets = inputs(seed=seed)
    column = torch.full((5, 1), -INF, dtype=student.dtype)
    value, gradient = value_and_gradient(loss, student, teacher, None, targets)
    wider = value_and_gradient(loss, torch.cat([student, column], 1), torch.cat([teacher, column], 1), None, targets)
    torch.testing.assert_close(wider[0], value)
    torch.testing.assert_close(wider[1], F.pad(gradient, (0, 1)))


def test_dkd_leaves_out_positions_without_a_class() -> None:
    student, teacher, targets = inputs((6, 4))
    targets[[1, 4, 5]] = torch.tensor([-100, -1, 4])
    counts = torch.tensor([True, False, True, True, False, False])
    value, gradient = value_and_gradient(DKD(), student, teacher, None, targets)
    torch.testing.assert_close(value, DKD()(student[counts], teacher[counts], None, targets[counts]))
    assert not gradient[~counts].any() and gradient[counts].any()
    assert DKD()(student, teacher, None, torch.full((6,), -100)) == 0


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32])
def test_dkd_takes_targets_of_any_integer_type(dtype: torch.dtype) -> None:
    student, teacher, targets = inputs()
    assert torch.equal(DKD()(student, teacher, None, targets.to(dtype)), DKD()(student, teacher, None, targets))


@every_loss
def test_inputs_may_be_views_and_stay_as_they_were(loss: Any) -> None:
    student, teacher, targets = inputs((4, 4), dtype=torch.float32)
    student[0, 0] = teacher[1, 1] = -INF
    student[2], teacher[3] = math.nan, INF
    valid = torch.tensor([True, True, False, False])
    value = loss(student, teacher, valid, targets)
    views = [x.T.contiguous().T for x in (student, teacher)] + [
        torch.stack([x, x], -1)[..., 0] for x in (valid, targets)
    ]
    copies = [x.clone() for x in views]
    assert not any(x.is_contiguous() for x in views)
    torch.testing.assert_close(loss(*views), value)
    for view, copy in zip(views, copies, strict=True):
        assert view._version == 0
        torch.testing.assert_close(view, copy, rtol=0, atol=0, equal_nan=True)


# Extremes


BIG = 1e4
TARGETS = torch.tensor([1, 0, 3, 2])


def extreme(name: str) -> tuple[Tensor, Tensor]:
    s = BIG * torch.tensor([[1, -1, 0, 0.5], [-1, 1, 0.5, 0], [0, 1, -1, 0.75], [0.5, 0, 1, -1]])
    t, each = s.flip(1), torch.arange(4)
    match name:
        case "agree":
            t = s.clone()
        case "moderate student":
            s = s / BIG
        case "student masks":
            s[0, 1] = s[1, 2] = s[1, 3] = -INF
        case "teacher masks":
            t[0, 1] = t[1, 2] = t[1, 3] = -INF
        case "both mask":
            s[:, 2] = t[:, 2] = s[0, 0] = t[0, 0] = -INF
        case "each masks another":
            s[:, 2] = t[:, 0] = -INF
        case "student masks the target":
            s[each[:3], TARGETS[:3]] = -INF
        case "teacher masks the target":
            t[each[:3], TARGETS[:3]] = -INF
        case "both mask all targets":
            s[each, TARGETS] = t[each, TARGETS] = -INF
        case "one class left":
            s[0, :3] = t[0, :3] = s[1, 1:] = t[2, :3] = -INF
        case "nothing in common":
            s[0, :2] = t[0, 2:] = -INF
        case "positions all masked":
            s[0] = t[1] = s[2] = t[2] = -INF
        case "all masked":
            s[:] = t[:] = -INF
        case "equal":
            s[:], t[:] = BIG, -BIG
    return s, t


EXTREMES = ["disagree", "agree", "moderate student", "student masks", "teacher masks", "both mask"]
EXTREMES += ["each masks another", "student masks the target", "teacher masks the target", "both mask all targets"]
EXTREMES += ["one class left", "nothing in common", "positions all masked", "all masked", "equal"]


@every_loss
def test_extreme_logits_have_the_formulas_value_and_a_finite_gradient(loss: Any) -> None:
    hot = [dataclasses.replace(loss, temperature=T) for T in (0.05, 4.0)] if hasattr(loss, "temperature") else [loss]
    for name, dtype, case in product(EXTREMES, (torch.float16, torch.bfloat16, torch.float32), hot):
        student, teacher = (x.to(dtype) for x in extreme(name))
        value, gradient = value_and_gradient(case, student, teacher, None, TARGETS)
        expected = by_hand(case, student, teacher, TARGETS)
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(expected, rel=1e-4, abs=1e-5), (name, dtype, case)
        assert gradient.isfinite().all(), (name, dtype, case)
        assert not gradient[student == -INF].any(), (name, dtype, case)


@every_loss
def test_extreme_logits_have_the_formulas_gradient(loss: Any) -> None:
    for name in EXTREMES[:11]:
        student, teacher = (x.double() for x in extreme(name))
        _, gradient = value_and_gradient(loss, student, teacher, None, TARGETS)
        expected = gradient_by_hand(
            partial(by_hand, loss, teacher=teacher, targets=TARGETS),
            student,
            1e-3 if name == "moderate student" else 0.1,
        )
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("loss", [SoftTarget(temperature=0.05), HardTarget(), LogitMSE(), DKD(temperature=0.05)])
def test_a_student_that_is_far_off_is_told_so(loss: Any) -> None:
    # Finite gradients are no use if they are finite because they vanished.
    _, gradient = value_and_gradient(loss, *(x.half() for x in extreme("disagree")), None, TARGETS)
    assert gradient.any(1).all()


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_are_computed_in_full_precision_with_autocast_or_without(loss: Any, dtype: torch.dtype) -> None:
    student, teacher, targets = inputs((6, 10), dtype=dtype)
    student[0, 3] = teacher[1, 2] = -INF
    value, gradient = value_and_gradient(loss, student.float(), teacher.float(), None, targets)
    assert value.dtype == torch.float32
    for other in (teacher, teacher.float()):
        plain = value_and_gradient(loss, student, other, None, targets)
        with torch.autocast("cpu", dtype=dtype):
            cast = value_and_gradient(loss, student, other, None, targets)
            full = value_and_gradient(loss, student.float(), teacher.float(), None, targets)
        assert torch.equal(plain[0], value) and torch.equal(cast[0], value) and torch.equal(full[0], value)
        assert torch.equal(plain[1], gradient.to(dtype)) and torch.equal(cast[1], gradient.to(dtype))


@pytest.mark.parametrize("temperature", [0.05, 0.5, 1.0, 20.0, 500.0])
def test_temperatures_from_cold_to_hot(temperature: float) -> None:
    student, teacher, targets = inputs(dtype=torch.float32)
    for name, loss in LOSSES.items():
        if hasattr(loss, "temperature"):
            case: Any = dataclasses.replace(loss, temperature=temperature)  # type: ignore[call-arg]
            expected = by_hand(case, student.double(), teacher.double(), targets)
            exact = case(student.double(), teacher.double(), None, targets)
            assert exact.item() == pytest.approx(expected, rel=1e-5), name
            value, gradient = value_and_gradient(case, student, teacher, None, targets)
            # T² magnifies what float32 rounds off.
            assert value.item() == pytest.approx(expected, rel=1e-3, abs=1e-6 * temperature**2), name
            assert gradient.isfinite().all(), name


# Known to be wrong


@pytest.mark.parametrize("gap", [422.5, 427.5])
def test_dist_has_a_finite_gradient_where_a_class_is_all_but_ruled_out(gap: float) -> None:
    student = torch.tensor([[0.0, -gap, -gap - 10], [0.0, -gap - 10, -gap]])
    teacher = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 0.5]])
    _, gradient = value_and_gradient(DIST(temperature=10.0), student, teacher)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(("b", "c"), [(7, 10), (10, 10), (10, 7), (5, 10)])
def test_dist_counts_the_correlation_of_equal_predictions_as_0(b: int, c: int) -> None:
    # A head that starts at zero. In float16 the gradient of 1e6 is infinite.
    _, teacher, _ = inputs((b, c), dtype=torch.float16)
    value, gradient = value_and_gradient(DIST(), torch.zeros_like(teacher), teacher)
    assert value.item() == pytest.approx(2.0, abs=1e-5) and gradient.isfinite().all()
    assert dist(torch.zeros(b, c), torch.zeros(b, c)).item() == pytest.approx(2.0, abs=1e-5)


def test_standardized_equal_logits_are_0() -> None:
    logits = (torch.arange(1.0, 300.0) * 33.3).unsqueeze(1).repeat(1, 7)
    assert not standardize_logits(logits).any()
    assert logit_mse(logits, torch.zeros_like(logits), standardize=True) == 0


def test_dist_takes_logits_of_any_shape() -> None:
    # One position, (C,), as the other losses do.
    student, teacher, _ = inputs((1, 4))
    torch.testing.assert_close(dist(student[0], teacher[0]), dist(student, teacher))


@pytest.mark.parametrize("dim", [2, -3, -2])  # beyond the shape; the batch, counted from the end
def test_classes_along_a_dimension_that_is_not_theirs_are_refused(dim: int) -> None:
    student, teacher, _ = inputs((3, 4))
    refuses(lambda: SoftTarget(class_dim=dim)(student, teacher), f"Received: class_dim={dim}.")


# Refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SoftTarget(temperature=0.0),
            "`temperature` must be a finite number above 0. Received: temperature=0.0. Usual values: 1 to 10.",
        ),
        (lambda: SoftTarget(temperature=-1), "Received: temperature=-1."),
        (lambda: DKD(temperature=INF), "`temperature` must be a finite number above 0. Received: temperature=inf."),
        (lambda: DIST(temperature=True), "`temperature` must be a finite number above 0. Received: temperature=True."),
        (lambda: DIST(temperature="4"), "`temperature` must be a finite number above 0. Received: temperature='4'."),
        (lambda: DKD(alpha=-1.0), "`alpha` must be a finite number, at least 0. Received: alpha=-1.0."),
        (lambda: DKD(beta=math.nan), "`beta` must be a finite number, at least 0. Received: beta=nan."),
        (lambda: DIST(beta=-1), "`beta` must be a finite number, at least 0. Received: beta=-1."),
        (lambda: DIST(gamma=None), "`gamma` must be a finite number, at least 0. Received: gamma=None."),
    ],
)
def test_a_bad_parameter_is_refused(make: Callable[[], object], message: str) -> None:
    refuses(make, message)


@every_loss
def test_what_every_logit_loss_refuses(loss: Any) -> None:
    make = type(loss)
    for weight in (-0.1, math.nan, INF, True, "1", None):
        message = f"`weight` must be a finite number, at least 0. Received: weight={weight!r}."
        refuses(lambda weight=weight: make(weight=weight), message)
    assert make(weight=0).weight == 0
    for dim in (0, True, 1.0, None):
        message = f"`class_dim` must be a dimension other than 0, which is the batch. Received: class_dim={dim!r}."
        refuses(lambda dim=dim: make(class_dim=dim), message)
    student, teacher, targets = inputs((3, 4, 5))
    message = "`teacher` must give a tensor of the student's shape (3, 4, 5). Received: teacher=(3, 4, 6)."
    refuses(lambda: loss(student, torch.zeros(3, 4, 6), None, targets), message)
    for shape in ((3,), (4, 3), (3, 4, 5), (3, 4, 1), (12,), ()):
        message = f"`valid` must have the positions' shape (3, 4). Received: valid={shape}."
        refuses(lambda shape=shape: loss(student, teacher, torch.ones(shape, dtype=torch.bool), targets), message)
    if make is not LogitMSE:
        message = "`class_dim` must be a dimension of two classes or more. Received: class_dim=-1."
        refuses(lambda: loss(student[..., :1], teacher[..., :1], None, targets), message)
    with pytest.raises(dataclasses.FrozenInstanceError):
        loss.weight = 1.0
    assert isinstance(hash(loss), int) and loss == dataclasses.replace(loss) != dataclasses.replace(loss, weight=77)


def test_dkd_refuses_targets_that_are_no_classes() -> None:
    student, teacher, targets = inputs((3, 4, 5))
    for bad in (None, [0, 1, 2], 1):
        message = f"`targets` must be a tensor of classes for DKD. Received: targets={type(bad).__name__!r}."
        refuses(lambda bad=bad: DKD()(student, teacher, None, bad), message)
    must = "`targets` must be classes, integers of the positions' shape (3, 4). Received: targets="
    for bad in (targets.double(), targets.bool(), targets[0], targets.T, torch.zeros(3, 4, 5), targets.unsqueeze(-1)):
        refuses(
            lambda bad=bad: DKD()(student, teacher, None, bad), must + repr((str(bad.dtype), tuple(bad.shape))) + "."
        )


def refuses(make: Callable[[], object], message: str) -> None:
    with pytest.raises(CompressionError) as error:
        make()
    assert message in str(error.value)


def test_names_in_the_log() -> None:
    names = {type(loss): loss.name for loss in LOSSES.values()}
    assert names == {
        SoftTarget: "soft_target",
        HardTarget: "hard_target",
        LogitMSE: "logit_mse",
        DKD: "dkd",
        DIST: "dist",
    }
    assert all(hasattr(functional, name) for name in names.values())
    assert all(isinstance(loss, DistillationLoss) for loss in LOSSES.values())
