"""The feature losses at extremes, what is known to be wrong with them, and what they refuse."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_compress import (
    AttentionTransfer,
    FeatureCosine,
    FeatureMSE,
    RelationalAngle,
    RelationalDistance,
    SimilarityPreserving,
)
from lightning_compress.distillation.losses.attention_transfer import attention_transfer
from lightning_compress.distillation.losses.base import DistillationLoss
from lightning_compress.errors import CompressionError
from tests.distillation.losses.feature_formulas import (
    LOSSES,
    RELATIONS,
    Shape,
    by_hand,
    either,
    every_loss,
    inputs,
    park_distances,
    value_and_gradient,
)

# Extremes


@either
@pytest.mark.parametrize("b", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_degenerate_features_have_the_formulas_value_and_a_finite_gradient(
    name: str, b: int, dtype: torch.dtype
) -> None:
    ordinary = inputs((b, 3, 4), dtype=dtype)[0]
    sample = ordinary[:1].expand(b, 3, 4)
    twins = ordinary.clone()
    twins[-1] = twins[0]
    dead = ordinary.clone()
    dead[0] = 0
    kinds = {"zeros": torch.zeros_like(sample), "identical": sample, "twins": twins, "a dead sample": dead}
    kinds["ordinary"] = inputs((b, 3, 4), seed=1, dtype=dtype)[0]
    for first, student in kinds.items():
        for second, teacher in kinds.items():
            value, gradient = value_and_gradient(LOSSES[name], student, teacher)
            expected = by_hand(name, student, teacher)
            assert value.item() == pytest.approx(expected, rel=1e-4, abs=1e-6), (first, second)
            assert gradient.isfinite().all() and gradient.abs().max() < 100, (first, second)


@pytest.mark.parametrize(
    ("name", "b"), [("relational_distance", 1), ("relational_distance", 2), ("relational_angle", 2)]
)
def test_a_batch_too_small_for_relations_gives_0(name: str, b: int) -> None:
    value, gradient = value_and_gradient(LOSSES[name], *inputs((b, 6), (b, 3), dtype=torch.float32))
    assert value.item() == pytest.approx(0, abs=1e-12) and gradient.abs().max() < 1e-6


@either
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 6e4, 1e-6])
def test_sixteen_bits_are_computed_in_full_precision_with_autocast_or_without(
    name: str, dtype: torch.dtype, scale: float
) -> None:
    # 6e4 squared overflows float16, and so do a Gram matrix or a mean of squares; 1e-6 squared vanishes.
    loss = LOSSES[name]
    student, teacher = ((x.clamp(-1, 1) * scale).to(dtype) for x in inputs((6, 4, 5), dtype=torch.float32))
    value, gradient = value_and_gradient(loss, student.float(), teacher.float())
    assert value.dtype == torch.float32 and value > 0
    assert value.item() == pytest.approx(by_hand(name, student, teacher), rel=1e-4)
    for other in (teacher, teacher.float()):
        plain = value_and_gradient(loss, student, other)
        with torch.autocast("cpu", dtype=dtype):
            leaf = student.clone().requires_grad_()
            cast = loss(leaf, other)
        cast.backward()
        assert torch.equal(plain[0], value) and torch.equal(cast, value)
        assert torch.equal(plain[1], gradient.to(dtype)) and torch.equal(leaf.grad, gradient.to(dtype))


MATMUL = pytest.mark.xfail(strict=True, reason="autocast computes the backward of `@` in 16 bits")
WITHIN = [
    pytest.param(name, marks=[MATMUL] if name in ("similarity_preserving", "relational_angle") else [])
    for name in LOSSES
]


@pytest.mark.parametrize("name", WITHIN)
def test_backward_may_run_within_autocast_too(name: str) -> None:
    # As in a training step that calls `manual_backward`. Small features: in float16 the Gram matrix's gradient is NaN.
    student, teacher = ((1e-6 * x).half() for x in inputs((6, 4, 5), dtype=torch.float32))
    _, gradient = value_and_gradient(LOSSES[name], student.float(), teacher.float())
    with torch.autocast("cpu", dtype=torch.float16):
        _, within = value_and_gradient(LOSSES[name], student.float(), teacher.float())
    assert torch.equal(within, gradient)


def test_distances_do_not_cancel() -> None:
    # Far from the origin |a|² + |b|² - 2ab has lost what distinguishes the samples.
    student, teacher = inputs((5, 4))
    offset = 1000.0
    student = (student + offset).float()
    expected = park_distances(student.double().numpy(), teacher.numpy())
    assert LOSSES["relational_distance"](student, teacher.float()).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("big", [25, 26, 40])
def test_distances_of_a_larger_batch_do_not_cancel_either(big: int) -> None:
    # By default `cdist` takes the Gram matrix from 26 samples on.
    student, teacher = inputs((big, 2))
    student = (student + 300.0).float()
    expected = park_distances(student.double().numpy(), teacher.numpy())
    assert LOSSES["relational_distance"](student, teacher.float()).item() == pytest.approx(expected, rel=1e-4)


def test_two_precisions_meet_in_the_higher() -> None:
    for name, loss in LOSSES.items():
        student, teacher = inputs((4, 3, 3))
        value, gradient = value_and_gradient(loss, student.float(), teacher)
        assert value.item() == pytest.approx(by_hand(name, student, teacher), rel=1e-5), name
        assert gradient.dtype == torch.float32 and value_and_gradient(loss, student, teacher.float())[1].any(), name


# Known to be wrong


@pytest.mark.parametrize("name", ["feature_cosine", *RELATIONS])
def test_features_may_be_one_number_a_sample(name: str) -> None:
    student, teacher = inputs((4,))
    torch.testing.assert_close(LOSSES[name](student, teacher), LOSSES[name](student[:, None], teacher[:, None]))


def test_an_empty_batch_gives_0() -> None:
    values = {name: loss(torch.zeros(0, 3, 4), torch.zeros(0, 3, 4)).item() for name, loss in LOSSES.items()}
    assert values == dict.fromkeys(LOSSES, 0.0)


@pytest.mark.parametrize("channel_dim", [True, 1.5, "1", None])
def test_attention_transfer_refuses_channels_that_are_no_dimension(channel_dim: Any) -> None:
    refuses(
        lambda: AttentionTransfer("a", "b", channel_dim=channel_dim),
        f"Received: channel_dim={channel_dim!r}.",
    )


# Refusals


def refuses(make: Callable[[], object], message: str) -> None:
    with pytest.raises(CompressionError) as error:
        make()
    assert message in str(error.value)


@every_loss
def test_what_every_feature_loss_refuses(loss: Any) -> None:
    make = type(loss)
    for weight in (-0.1, math.nan, math.inf, True, "1", None):
        message = f"`weight` must be a finite number, at least 0. Received: weight={weight!r}."
        refuses(lambda weight=weight: make("a", "b", weight=weight), message)
        refuses(lambda weight=weight: make(pairs="auto", weight=weight), message)
    assert make("a", "b", weight=0).weight == 0
    must = (
        "`student_layer` must be named together with `teacher_layer`, or both be left out with pairs='auto'. Received: "
    )
    refuses(make, f"{must}student_layer=None. `teacher_layer` is None, `pairs` is None.")
    refuses(lambda: make("a"), f"{must}student_layer='a'. `teacher_layer` is None, `pairs` is None.")
    refuses(lambda: make(teacher_layer="b"), f"{must}student_layer=None. `teacher_layer` is 'b', `pairs` is None.")
    refuses(lambda: make("a", pairs="auto"), f"{must}student_layer='a'.")
    refuses(
        lambda: make("a", "b", pairs="auto"), f"{must}student_layer='a'. `teacher_layer` is 'b', `pairs` is 'auto'."
    )
    for pairs in ("all", "", False, True, 1):
        message = f"`pairs` must be 'auto', or left out where the layers are named. Received: pairs={pairs!r}."
        refuses(lambda pairs=pairs: make(pairs=pairs), message)
    automatic = make(pairs="auto")
    assert automatic.student_layer is automatic.teacher_layer is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        loss.weight = 1.0
    assert isinstance(hash(loss), int) and loss == dataclasses.replace(loss) != dataclasses.replace(loss, weight=77)


@pytest.mark.parametrize("name", ["feature_cosine", "feature_mse"])
@pytest.mark.parametrize("shape", [(2, 1), (2, 4), (1, 3), (2, 3, 1), (3,)])
def test_features_of_another_shape_are_refused_not_broadcast(name: str, shape: Shape) -> None:
    message = f"`teacher` must give a tensor of the student's shape (2, 3). Received: teacher={shape}."
    refuses(lambda: LOSSES[name](torch.zeros(2, 3), torch.zeros(shape)), message)


@pytest.mark.parametrize("name", RELATIONS)
def test_another_batch_is_refused_not_broadcast(name: str) -> None:
    for b in (1, 2, 4):
        message = f"`teacher` must put out features of the student's batch of 3. Received: teacher={(b, 5)}."
        refuses(lambda b=b: LOSSES[name](torch.zeros(3, 5), torch.zeros(b, 5)), message)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [((2, 3), (2, 3)), ((2, 3, 4), (2, 3, 4, 4)), ((2, 3, 4), (1, 3, 4)), ((1, 3, 4), (2, 3, 4))],
)
def test_attention_transfer_needs_positions_and_one_batch(student: Shape, teacher: Shape) -> None:
    must = f"`student_layer` must have features (B, C, ...) of the teacher's rank and batch, {teacher}. "
    message = f"{must}Received: student_layer={student}. Attention transfer compares positions"
    refuses(lambda: attention_transfer(torch.zeros(student), torch.zeros(teacher)), message)


def test_attention_transfer_refuses_the_batch_as_its_channels() -> None:
    message = "`channel_dim` must be a dimension other than 0, which is the batch. Received: channel_dim=0."
    refuses(lambda: AttentionTransfer("a", "b", channel_dim=0), message)


def test_names_in_the_log() -> None:
    names = {type(loss): loss.name for loss in LOSSES.values()}
    assert names == {
        FeatureCosine: "feature_cosine",
        FeatureMSE: "feature_mse",
        AttentionTransfer: "attention_transfer",
        SimilarityPreserving: "similarity_preserving",
        RelationalDistance: "relational_distance",
        RelationalAngle: "relational_angle",
    }
    assert all(hasattr(sys.modules[kind.__module__], name) for kind, name in names.items())
    assert all(isinstance(loss, DistillationLoss) for loss in LOSSES.values())
    assert {name for name, loss in LOSSES.items() if loss.adapts} == {"feature_cosine", "feature_mse"}
