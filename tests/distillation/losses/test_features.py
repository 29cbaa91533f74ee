"""The feature losses against their papers' formulas, and the laws they obey."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import lightning_compress
from lightning_compress import (
    FeatureLoss,
)
from lightning_compress.distillation.losses.attention_transfer import attention_transfer
from lightning_compress.distillation.losses.features import feature_cosine, feature_mse
from tests.distillation.losses.feature_formulas import (
    CASES,
    FORMULAS,
    LOSSES,
    RELATIONS,
    SHAPES,
    Shape,
    by_hand,
    either,
    inputs,
    laws,
    seeds,
    value_and_gradient,
)

# Against the formulas


def test_every_feature_loss_has_rows_here() -> None:
    public = {getattr(lightning_compress, name) for name in lightning_compress.__all__} - {FeatureLoss}
    concrete = {kind for kind in public if isinstance(kind, type) and issubclass(kind, FeatureLoss)}
    assert concrete == {type(loss) for loss in LOSSES.values()}
    assert list(LOSSES) == list(FORMULAS) == list(SHAPES)


@pytest.mark.parametrize(("name", "s", "t"), CASES)
def test_the_value_is_the_papers_formula(name: str, s: Shape, t: Shape) -> None:
    student, teacher = inputs(s, t, dtype=torch.float32)
    expected = by_hand(name, student, teacher)
    value = LOSSES[name](student, teacher)
    assert value.shape == () and value.dtype == torch.float32
    assert value.item() == pytest.approx(expected, rel=1e-5, abs=1e-7)
    exact = LOSSES[name](student.double(), teacher.double())
    assert exact.dtype == torch.float64 and exact.item() == pytest.approx(expected, rel=1e-10, abs=1e-15)


@pytest.mark.parametrize(("name", "s", "t"), [case for case in CASES if math.prod(case.values[1]) <= 48])
def test_the_gradient_is_that_of_the_papers_formula(name: str, s: Shape, t: Shape) -> None:
    student, teacher = inputs(s, t)
    _, gradient = value_and_gradient(LOSSES[name], student, teacher)
    expected = torch.zeros_like(student)
    for i in range(student.numel()):
        ends = [student.clone() for _ in range(2)]
        ends[0].view(-1)[i] += 1e-5
        ends[1].view(-1)[i] -= 1e-5
        values = [by_hand(name, end, teacher) for end in ends]
        expected.view(-1)[i] = (values[0] - values[1]) / 2e-5
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)


def test_there_is_a_gradient() -> None:
    for name, loss in LOSSES.items():
        _, gradient = value_and_gradient(loss, *inputs((4, 3, 3)))
        assert gradient.flatten(1).any(1).all(), name


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 4, 5)])
def test_against_torchs_own_losses(shape: Shape) -> None:
    student, teacher = inputs(shape, dtype=torch.float32)
    torch.testing.assert_close(feature_mse(student, teacher), F.mse_loss(student, teacher))
    s, t = student.flatten(1), teacher.flatten(1)
    torch.testing.assert_close(feature_cosine(student, teacher), 1 - F.cosine_similarity(s, t).mean())
    ones = torch.ones(len(s))
    torch.testing.assert_close(feature_cosine(student, teacher), F.cosine_embedding_loss(s, t, ones))


def test_attention_transfer_pools_as_torch_does() -> None:
    student, teacher = inputs((2, 3, 5, 7), (2, 4, 3, 4), dtype=torch.float32)
    pooled = F.adaptive_avg_pool2d(student.square().sum(1, keepdim=True), (3, 4)).sqrt()
    torch.testing.assert_close(attention_transfer(student, teacher), attention_transfer(pooled, teacher))


# Laws

SCALED = [name for name in LOSSES if name != "feature_mse"]
BY_SAMPLE = ["feature_cosine", "feature_mse", "attention_transfer", "attention_transfer, channels last"]


def rotation(n: int, seed: int) -> Tensor:
    return torch.linalg.qr(inputs((n, n), seed=seed + 1)[0])[0]


@pytest.mark.parametrize("name", SCALED)
@given(seeds, st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
@laws
def test_the_scale_of_features_does_not_matter(name: str, seed: int, a: float, b: float) -> None:
    loss = LOSSES[name]
    student, teacher = inputs((4, 3, 5), seed=seed)
    value = loss(student, teacher)
    torch.testing.assert_close(loss(student * a, teacher * b), value)
    if name != "feature_cosine":
        torch.testing.assert_close(loss(-student, teacher), value)


@pytest.mark.parametrize("name", RELATIONS)
@given(seeds)
@laws
def test_relations_are_the_same_after_a_rotation_or_a_reflection(name: str, seed: int) -> None:
    loss = LOSSES[name]
    student, teacher = inputs((5, 4), seed=seed)
    value = loss(student, teacher)
    torch.testing.assert_close(loss(student @ rotation(4, seed), teacher.flip(1)), value)


@pytest.mark.parametrize("name", ["relational_distance", "relational_angle"])
@given(seeds, st.floats(-10, 10))
@laws
def test_relations_are_the_same_after_a_translation(name: str, seed: int, shift: float) -> None:
    loss = LOSSES[name]
    student, teacher = inputs((5, 4), seed=seed)
    value = loss(student, teacher)
    torch.testing.assert_close(loss(student + shift * torch.arange(4), teacher - shift), value)


@given(seeds)
@laws
def test_a_mixture_of_channels_has_the_same_attention(seed: int) -> None:
    student, teacher = inputs((2, 3, 4, 4), (2, 5, 4, 4), seed=seed)
    mixed = torch.einsum("bchw,cd->bdhw", student, rotation(3, seed))
    torch.testing.assert_close(attention_transfer(mixed, teacher.flip(1)), attention_transfer(student, teacher))
    last = [x.permute(0, 2, 3, 1) for x in (student, teacher)]
    torch.testing.assert_close(attention_transfer(*last, channel_dim=-1), attention_transfer(student, teacher))
    torch.testing.assert_close(attention_transfer(*last, channel_dim=3), attention_transfer(student, teacher))


@either
@given(seeds, st.integers(1, 5))
@laws
def test_the_order_of_samples_does_not_matter(name: str, seed: int, b: int) -> None:
    loss = LOSSES[name]
    student, teacher = inputs((b, 3, 4), seed=seed)
    order = torch.randperm(b)
    value = loss(student, teacher)
    torch.testing.assert_close(loss(student[order], teacher[order]), value)
    if name in BY_SAMPLE:  # means, not sums
        torch.testing.assert_close(loss(student.repeat(2, 1, 1), teacher.repeat(2, 1, 1)), value)


@either
@given(seeds, st.integers(1, 5))
@laws
def test_never_negative_and_0_for_the_teacher_itself(name: str, seed: int, b: int) -> None:
    loss = LOSSES[name]
    student, teacher = inputs((b, 3, 4), seed=seed)
    assert loss(student, teacher) >= 0
    value, gradient = value_and_gradient(loss, teacher, teacher)
    assert value.abs() < 1e-12 and gradient.abs().max() < 1e-12


@either
@given(seeds, st.sampled_from([math.nan, math.inf, -math.inf]))
@laws
def test_samples_that_are_not_valid_do_not_matter_at_all(name: str, seed: int, padding: float) -> None:
    loss = LOSSES[name]
    student, teacher = inputs((5, 3, 4), seed=seed)
    valid = torch.tensor([True, False, True, True, False])[torch.randperm(5)]
    student[~valid] = teacher[~valid] = padding
    value, gradient = value_and_gradient(loss, student, teacher, valid)
    alone, its_gradient = value_and_gradient(loss, student[valid], teacher[valid])
    torch.testing.assert_close(value, alone)
    torch.testing.assert_close(gradient[valid], its_gradient)
    assert not gradient[~valid].any()


@either
@given(seeds, st.sampled_from([math.nan, math.inf, -math.inf]))
@laws
def test_what_stands_at_positions_that_are_not_valid_does_not_matter(name: str, seed: int, padding: float) -> None:
    loss = LOSSES[name]
    student, teacher = inputs((4, 5, 3), seed=seed)
    valid = torch.rand(4, 5, generator=torch.Generator().manual_seed(seed)) < 0.6
    valid[0, 1] = True
    valid[1] = False  # a sample of padding alone
    zeros = [x.masked_fill(~valid.unsqueeze(-1), 0.0) for x in (student, teacher)]
    student[~valid] = teacher[~valid] = padding
    value, gradient = value_and_gradient(loss, student, teacher, valid)
    assert not gradient[~valid].any() and gradient.isfinite().all()
    counts = valid.any(1)
    expected = by_hand(name, *(x[counts] for x in zeros))
    if name == "feature_mse":  # which means over the positions
        expected = by_hand(name, student[valid], teacher[valid])
    if name == "attention_transfer, channels last":  # likewise; the map is 0 at the others
        expected *= valid[counts].numel() / int(valid.sum())
    assert value.item() == pytest.approx(expected, rel=1e-7, abs=1e-12)
    fewer, its_gradient = value_and_gradient(loss, student[counts], teacher[counts], valid[counts])
    torch.testing.assert_close(value, fewer)
    torch.testing.assert_close(gradient[counts], its_gradient)


PADDED = [name for name in LOSSES if name != "attention_transfer"]


@pytest.mark.parametrize("name", PADDED)
def test_more_padding_changes_nothing(name: str) -> None:
    student, teacher = inputs((4, 6, 3))
    valid = torch.ones(4, 6, dtype=torch.bool)
    valid[:, 4:] = False
    value, gradient = value_and_gradient(LOSSES[name], student, teacher, valid)
    cut, its_gradient = value_and_gradient(LOSSES[name], student[:, :4], teacher[:, :4])
    torch.testing.assert_close(value, cut)
    torch.testing.assert_close(gradient[:, :4], its_gradient)


@either
def test_valid_everywhere_is_no_mask_and_valid_nowhere_is_0_with_a_graph(name: str) -> None:
    loss = LOSSES[name]
    student, teacher = inputs((4, 5, 3), dtype=torch.float32)
    plain = value_and_gradient(loss, student, teacher)
    for shape in ((4,), (4, 5)):
        valid = torch.ones(shape, dtype=torch.bool)
        for mask in (valid, valid.long()):
            masked = value_and_gradient(loss, student, teacher, mask)
            torch.testing.assert_close(masked, plain, rtol=1e-6, atol=1e-7)
        value, gradient = value_and_gradient(loss, torch.full_like(student, math.nan), teacher, ~valid)
        assert value == 0 and not gradient.any()


@either
def test_a_mask_that_does_not_speak_of_the_features_leaves_them_whole(name: str) -> None:
    loss = LOSSES[name]
    student, teacher = inputs((4, 5, 3))
    for shape in ((3,), (4, 3), (4, 5, 3), (4, 5, 1), (4, 1), (5, 4), ()):
        assert torch.equal(loss(student, teacher, torch.zeros(shape, dtype=torch.bool)), loss(student, teacher)), shape
    maps = inputs((4, 5, 3, 2))
    assert torch.equal(loss(*maps, torch.zeros(4, 5, dtype=torch.bool)), loss(*maps))


@pytest.mark.parametrize("name", RELATIONS)
def test_a_mask_may_speak_of_one_side_alone(name: str) -> None:
    valid = torch.tensor([[True, True, False], [False] * 3, [True] * 3, [True, False, False]])
    student, teacher = inputs((4, 3, 2), (4, 7))
    shown = student.masked_fill(~valid.unsqueeze(-1), 0.0)
    student[~valid] = math.nan
    counts = valid.any(1)
    value = LOSSES[name](student, teacher, valid)
    assert value.item() == pytest.approx(by_hand(name, shown[counts], teacher[counts]))


@either
def test_inputs_may_be_views_and_stay_as_they_were(name: str) -> None:
    loss = LOSSES[name]
    student, teacher = inputs((4, 3, 5), dtype=torch.float32)
    student[1] = math.nan
    valid = torch.tensor([True, False, True, True])
    views = [torch.stack([x, x], -1)[..., 0].transpose(1, 2).clone().transpose(1, 2) for x in (student, teacher)]
    views = [views[0].mT.contiguous().mT, views[1].mT.contiguous().mT, torch.stack([valid, valid], -1)[..., 0]]
    copies = [x.clone() for x in views]
    assert not any(x.is_contiguous() for x in views)
    torch.testing.assert_close(loss(*views), loss(student, teacher, valid))
    for view, copy in zip(views, copies, strict=True):
        assert view._version == 0
        torch.testing.assert_close(view, copy, rtol=0, atol=0, equal_nan=True)
    channels_last = inputs((4, 3, 5, 2), dtype=torch.float32)
    torch.testing.assert_close(
        loss(*(x.contiguous(memory_format=torch.channels_last) for x in channels_last)), loss(*channels_last)
    )
