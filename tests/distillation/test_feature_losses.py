"""The feature losses against their papers' formulas as plain loops in float64, the laws they obey, and extremes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_compress.distillation import (
    AttentionTransfer,
    DistillationLoss,
    FeatureCosine,
    FeatureLoss,
    FeatureMSE,
    RelationalAngle,
    RelationalDistance,
    SimilarityPreserving,
    attention_transfer,
    feature_cosine,
    feature_mse,
    functional,
    losses,
)
from lightning_compress.errors import CompressionError

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
        maps = [(each**2).sum(channels) for each in (a, b)]
        size = [min(sizes) for sizes in zip(*(each.shape for each in maps), strict=True)]
        ours, theirs = (direction(shrunk(each, size).reshape(-1)) for each in maps)
        terms.append(((ours - theirs) ** 2).mean())
    return float(np.mean(terms))


def zagoruyko_last(s: Array, t: Array) -> float:
    return zagoruyko(s, t, -1)


def tung(s: Array, t: Array) -> float:
    total, n = 0.0, len(s)
    for i in range(n):
        ours, theirs = (direction(np.array([x[i] @ x[j] for j in range(n)])) for x in (flat(s), flat(t)))
        total += ((ours - theirs) ** 2).sum()
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


# Against the formulas


def test_every_feature_loss_has_rows_here() -> None:
    public = {getattr(losses, name) for name in losses.__all__} - {FeatureLoss}
    assert {each for each in public if issubclass(each, FeatureLoss)} == {type(loss) for loss in LOSSES.values()}
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
RELATIONS = ["similarity_preserving", "relational_distance", "relational_angle"]
either = pytest.mark.parametrize("name", LOSSES)


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
    for ours, student in kinds.items():
        for theirs, teacher in kinds.items():
            value, gradient = value_and_gradient(LOSSES[name], student, teacher)
            expected = by_hand(name, student, teacher)
            assert value.item() == pytest.approx(expected, rel=1e-4, abs=1e-6), (ours, theirs)
            assert gradient.isfinite().all() and gradient.abs().max() < 100, (ours, theirs)


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
    assert all(hasattr(functional, name) for name in names.values())
    assert all(isinstance(loss, DistillationLoss) for loss in LOSSES.values())
    assert {name for name, loss in LOSSES.items() if loss.adapts} == {"feature_cosine", "feature_mse"}
