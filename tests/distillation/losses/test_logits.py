"""The logit losses against their papers' formulas, and the laws they obey."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import lightning_compress
from lightning_compress import DKD, HardTarget, LogitLoss, LogitMSE
from lightning_compress.distillation.losses.dist import dist
from lightning_compress.distillation.losses.dkd import dkd
from lightning_compress.distillation.losses.logits import logit_mse, standardize_logits
from lightning_compress.distillation.losses.soft_target import hard_target, soft_target
from tests.distillation.losses.logit_formulas import (
    FORMULAS,
    INF,
    LOSSES,
    SHAPES,
    by_hand,
    every_loss,
    gradient_by_hand,
    inputs,
    laws,
    seeds,
    value_and_gradient,
    z_score,
)

# Against the formulas


def test_every_logit_loss_has_rows_here() -> None:
    public = {getattr(lightning_compress, name) for name in lightning_compress.__all__} - {LogitLoss}
    concrete = {kind for kind in public if isinstance(kind, type) and issubclass(kind, LogitLoss)}
    assert concrete == set(FORMULAS) == {type(loss) for loss in LOSSES.values()}
    for kind in concrete:
        rows_of_it = [loss for loss in LOSSES.values() if type(loss) is kind]
        fields = {field.name for field in dataclasses.fields(kind)}
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
    unmasked = torch.ones_like(logits, dtype=torch.bool)
    if masked:
        unmasked[range(b), targets] = False
    out = standardize_logits(logits, unmasked if masked else None)
    expected = np.array([z_score(row) for row in logits.masked_fill(~unmasked, -INF).numpy()])
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-4, atol=1e-4)  # a pair of logits may be nearly equal
    assert (out[~unmasked] == -INF).all() and out[unmasked].isfinite().all()


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
