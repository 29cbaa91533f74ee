"""The losses against textbook formulas in numpy, and their behaviour at the edges of floating point."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_compress.distillation import (
    DistillationLoss,
    FeatureCosine,
    FeatureMSE,
    HardTarget,
    SoftTarget,
    feature_cosine,
    feature_mse,
    hard_target,
    soft_target,
)
from lightning_compress.errors import CompressionError

SHAPES = [((5, 7), -1), ((3, 6, 7), -1), ((2, 5, 4, 3), 1), ((2, 5), 1)]


def softmax(x: np.ndarray, axis: int) -> np.ndarray:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def textbook_kl(student: Tensor, teacher: Tensor, temperature: float, axis: int) -> float:
    p = softmax(teacher.double().numpy() / temperature, axis)
    q = softmax(student.double().numpy() / temperature, axis)
    return float((p * (np.log(p) - np.log(q))).sum(axis).mean() * temperature**2)


@pytest.mark.parametrize(("shape", "dim"), SHAPES)
@pytest.mark.parametrize("temperature", [0.5, 2.0, 10.0])
def test_soft_target_is_the_textbook_formula(shape: tuple[int, ...], dim: int, temperature: float) -> None:
    student, teacher = torch.randn(shape), torch.randn(shape)
    expected = textbook_kl(student, teacher, temperature, dim)
    assert soft_target(student, teacher, temperature, dim).item() == pytest.approx(expected, rel=1e-5)


def test_soft_target_of_two_dimensions_is_batchmean() -> None:
    student, teacher = torch.randn(6, 5), torch.randn(6, 5)
    log_q, log_p = (student / 3).log_softmax(1), (teacher / 3).log_softmax(1)
    expected = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean") * 9
    torch.testing.assert_close(soft_target(student, teacher, 3.0), expected)


@pytest.mark.parametrize(("shape", "dim"), SHAPES)
def test_hard_target_is_cross_entropy_with_the_teachers_choice(shape: tuple[int, ...], dim: int) -> None:
    student, teacher = torch.randn(shape), torch.randn(shape)
    q, label = softmax(student.double().numpy(), dim), teacher.numpy().argmax(dim)
    expected = -np.log(np.take_along_axis(q, np.expand_dims(label, dim), dim)).mean()
    assert hard_target(student, teacher, dim).item() == pytest.approx(expected, rel=1e-5)


def test_feature_losses_are_the_textbook_formulas() -> None:
    student, teacher = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    s, t = student.double().numpy().reshape(3, -1), teacher.double().numpy().reshape(3, -1)
    cosine = 1 - (s * t).sum(1) / np.sqrt((s**2).sum(1) * (t**2).sum(1))
    assert feature_cosine(student, teacher).item() == pytest.approx(cosine.mean(), rel=1e-5)
    assert feature_mse(student, teacher).item() == pytest.approx(((s - t) ** 2).mean(), rel=1e-5)


@given(st.floats(0.1, 20), st.integers(2, 9), st.integers(1, 5), st.floats(-50, 50))
@settings(max_examples=60)
def test_soft_target_ignores_a_shift_and_the_order_of_classes(t: float, c: int, b: int, shift: float) -> None:
    generator = torch.Generator().manual_seed(c * 10 + b)
    student, teacher = (torch.randn(b, c, generator=generator, dtype=torch.float64) for _ in range(2))
    order = torch.randperm(c, generator=generator)
    value = soft_target(student, teacher, t)
    torch.testing.assert_close(soft_target(student + shift, teacher - shift, t), value)
    torch.testing.assert_close(soft_target(student[:, order], teacher[:, order], t), value)
    assert value > -1e-9 and soft_target(teacher, teacher, t).abs() < 1e-9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("loss", [SoftTarget(temperature=0.05), SoftTarget(temperature=4.0), HardTarget()])
@pytest.mark.parametrize("masked", [False, True])
def test_extreme_and_masked_logits_have_finite_values_and_gradients(
    dtype: torch.dtype, loss: DistillationLoss, masked: bool
) -> None:
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1.0]], dtype=dtype)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [1e4, 0.0, -1e4]], dtype=dtype)
    if masked:  # one class masked in both, in the student alone, and in the teacher alone
        student[0, 1] = student[1, 0] = teacher[0, 1] = teacher[1, 2] = -math.inf
    student.requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert value.dtype == torch.float32 and value.isfinite() and value > 0
    assert student.grad is not None and student.grad.isfinite().all()


def test_a_class_masked_in_both_counts_for_nothing() -> None:
    student, teacher = torch.randn(4, 5), torch.randn(4, 5)
    expected = textbook_kl(student, teacher, 2.0, 1)
    column = torch.full((4, 1), -math.inf)
    with_mask = soft_target(torch.cat([student, column], 1), torch.cat([teacher, column], 1), 2.0)
    assert with_mask.item() == pytest.approx(expected, rel=1e-5)


def test_only_valid_positions_count() -> None:
    student, teacher = torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    valid = torch.tensor([[True, True, False, False], [True, False, False, False]])
    student[1, 3] = math.nan  # padding may hold anything
    student.requires_grad_()
    value = soft_target(student, teacher, 2.0, valid=valid)
    assert value.item() == pytest.approx(textbook_kl(student.detach()[valid], teacher[valid], 2.0, 1), rel=1e-5)
    value.backward()
    assert student.grad is not None and student.grad.isfinite().all() and not student.grad[~valid].any()
    assert soft_target(student, teacher, 2.0, valid=torch.zeros_like(valid)).item() == 0


def test_autocast_is_off_and_the_precision_full() -> None:
    student, teacher = torch.randn(8, 10).bfloat16(), torch.randn(8, 10).bfloat16()
    for loss in (SoftTarget(), HardTarget(), FeatureCosine("a", "a"), FeatureMSE("a", "a")):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(student, teacher)
        assert value.dtype == torch.float32 and torch.equal(value, loss(student.float(), teacher.float()))


def test_half_precision_features_do_not_overflow() -> None:
    student, teacher = torch.full((2, 3), 300.0).half(), torch.full((2, 3), -300.0).half()
    assert feature_mse(student, teacher).item() == 360_000
    assert feature_cosine(student, teacher).item() == pytest.approx(2)
    zero = torch.zeros(1, 3, requires_grad=True)
    feature_cosine(zero, torch.ones(1, 3)).backward()
    assert zero.grad is not None and zero.grad.isfinite().all()


def test_gradients_are_those_of_the_value() -> None:
    student = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: soft_target(s, teacher, 2.0), student)
    assert torch.autograd.gradcheck(lambda s: feature_cosine(s, teacher), student)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SoftTarget(temperature=0.0),
            "`temperature` must be a finite number above 0. Received: temperature=0.0.",
        ),
        (lambda: SoftTarget(temperature=-1), "Received: temperature=-1."),
        (lambda: SoftTarget(temperature=math.inf), "Received: temperature=inf."),
        (lambda: SoftTarget(weight=-0.1), "`weight` must be a finite number, at least 0. Received: weight=-0.1."),
        (lambda: HardTarget(weight=math.nan), "Received: weight=nan."),
        (lambda: FeatureCosine("a", "b", weight=-1), "Received: weight=-1."),
        (lambda: FeatureMSE("a", "b", weight=True), "Received: weight=True."),
        (lambda: SoftTarget(class_dim=0), "Received: class_dim=0."),
        (lambda: soft_target(torch.zeros(2, 3), torch.zeros(2, 4), 1.0), r"shape \(2, 3\). Received: teacher=\(2, 4\)"),
        (lambda: feature_mse(torch.zeros(2, 3), torch.zeros(2, 1)), r"Received: teacher=\(2, 1\)"),
        (
            lambda: soft_target(torch.zeros(2, 3), torch.zeros(2, 3), 1.0, valid=torch.ones(3)),
            r"Received: valid=\(3,\)",
        ),
    ],
)
def test_bad_values_are_refused_in_the_grammar(make: object, message: str) -> None:
    with pytest.raises(CompressionError, match=message):
        make()  # type: ignore[operator]
