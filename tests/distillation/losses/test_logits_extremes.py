"""The logit losses at extremes, what is known to be wrong with them, and what they refuse."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_compress import DIST, DKD, HardTarget, LogitMSE, SoftTarget
from lightning_compress.distillation.losses.base import DistillationLoss
from lightning_compress.distillation.losses.dist import dist
from lightning_compress.distillation.losses.logits import logit_mse, standardize_logits
from lightning_compress.errors import CompressionError
from tests.distillation.losses.logit_formulas import (
    INF,
    LOSSES,
    by_hand,
    every_loss,
    gradient_by_hand,
    inputs,
    value_and_gradient,
)

# Extremes


BIG = 1e4
TARGETS = torch.tensor([1, 0, 3, 2])


def extreme(name: str) -> tuple[Tensor, Tensor]:
    s = BIG * torch.tensor([[1, -1, 0, 0.5], [-1, 1, 0.5, 0], [0, 1, -1, 0.75], [0.5, 0, 1, -1]])
    t, rows = s.flip(1), torch.arange(4)
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
            s[rows[:3], TARGETS[:3]] = -INF
        case "teacher masks the target":
            t[rows[:3], TARGETS[:3]] = -INF
        case "both mask all targets":
            s[rows, TARGETS] = t[rows, TARGETS] = -INF
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
    assert all(hasattr(sys.modules[kind.__module__], name) for kind, name in names.items())
    assert all(isinstance(loss, DistillationLoss) for loss in LOSSES.values())
