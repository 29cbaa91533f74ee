from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import lightning_compress.schedules as schedules
from lightning_compress import CompressionError, Cosine, Exponential, Linear, OneShot, Polynomial, Steps
from lightning_compress.schedules import Schedule


@st.composite
def staircases(draw: st.DrawFn) -> Steps:
    points = sorted(draw(st.sets(st.floats(0, 1), min_size=1, max_size=5)))
    fractions = sorted(draw(st.lists(st.floats(0, 1), min_size=len(points) - 1, max_size=len(points) - 1)))
    return Steps(points=points, fractions=[*fractions, 1.0])


ALL: dict[type[Schedule], st.SearchStrategy[Schedule]] = {
    OneShot: st.just(OneShot()),
    Linear: st.just(Linear()),
    Cosine: st.just(Cosine()),
    Exponential: st.floats(1e-3, 50).map(Exponential),
    Polynomial: st.floats(0.1, 10).map(Polynomial),
    Steps: staircases(),
}
ANY = st.one_of(*ALL.values())
PROGRESS = st.floats(0, 1)


def test_every_schedule_of_the_package_is_under_these_laws() -> None:
    leaves = {
        cls
        for cls in vars(schedules).values()
        if isinstance(cls, type) and issubclass(cls, Schedule) and cls != Schedule
    }
    assert leaves == set(ALL)


@given(ANY, st.floats(-2, 2), st.floats(-2, 2))
def test_ends_at_exactly_the_final_value(schedule: Schedule, final: float, initial: float) -> None:
    assert schedule.value(1.0, final, initial) == final
    assert schedule.value(7.0, final, initial) == final


@given(ANY, PROGRESS, st.floats(0, 1), st.floats(0, 1))
def test_stays_between_its_ends(schedule: Schedule, progress: float, a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert low - 1e-12 <= schedule.value(progress, final=a, initial=b) <= high + 1e-12


@given(ANY, PROGRESS, PROGRESS)
def test_never_goes_back(schedule: Schedule, a: float, b: float) -> None:
    earlier, later = sorted((a, b))
    assert schedule.value(earlier, 0.9) <= schedule.value(later, 0.9) + 1e-12


@given(ANY, st.floats(-5, 0))
def test_before_its_start_it_is_at_its_start(schedule: Schedule, progress: float) -> None:
    assert schedule.value(progress, 0.9) == schedule.value(0.0, 0.9)


@given(st.sampled_from([Linear(), Cosine(), Exponential(2.0), Polynomial(2.0)]), st.floats(0, 1))
def test_starts_at_exactly_the_initial_value(schedule: Schedule, initial: float) -> None:
    assert schedule.value(0.0, 0.9, initial) == initial


@given(PROGRESS)
def test_against_closed_forms_in_numpy(progress: float) -> None:
    assume(progress < 1)
    grid = np.float64(progress)
    assert Cosine().fraction(progress) == pytest.approx(np.sin(np.pi * grid / 2) ** 2, abs=1e-12)
    assert Polynomial(3.0).fraction(progress) == pytest.approx(3 * grid - 3 * grid**2 + grid**3, abs=1e-12)
    # The solution of f' = -3 (f - 1 / (1 - e^-3)) with f(0) = 0.
    assert Exponential(3.0).fraction(progress) == pytest.approx((1 - np.exp(-3 * grid)) / (1 - np.exp(-3.0)), abs=1e-12)


def test_zhu_and_gupta_by_hand() -> None:
    # Equation 1 of arXiv:1710.01878 with s_i = 0.1, s_f = 0.9 and half of the steps done.
    assert Polynomial().value(0.5, final=0.9, initial=0.1) == pytest.approx(0.9 + (0.1 - 0.9) * (1 - 0.5) ** 3)


@pytest.mark.parametrize(("progress", "expected"), [(0.0, 0.2), (0.29, 0.2), (0.3, 0.6), (0.7, 1.0), (0.99, 1.0)])
def test_a_staircase_holds_each_value_until_the_next_point(progress: float, expected: float) -> None:
    assert Steps(points=[0.0, 0.3, 0.7], fractions=[0.2, 0.6, 1.0]).fraction(progress) == expected


def test_a_staircase_is_zero_before_its_first_point() -> None:
    assert Steps(points=[0.5], fractions=[1.0]).fraction(0.4) == 0.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Polynomial(0.0), "`power` must be a finite number above 0. Received: power=0.0"),
        (lambda: Polynomial(math.inf), "`power` must"),
        (lambda: Polynomial(math.nan), "`power` must"),
        (lambda: Exponential(0.0), "`rate` must be a finite number above 0. Received: rate=0.0. .*Linear"),
        (lambda: Exponential(-1.0), "`rate` must"),
        (lambda: Steps([], []), "`points` must"),
        (lambda: Steps([0.5, 0.2], [0.5, 1.0]), "`points` must be strictly rising"),
        (lambda: Steps([0.5, 0.5], [0.5, 1.0]), "`points` must be strictly rising"),
        (lambda: Steps([-0.1, 0.5], [0.5, 1.0]), "`points` must"),
        (lambda: Steps([0.0, 1.5], [0.5, 1.0]), "`points` must"),
        (lambda: Steps([0.0, 0.5], [1.0]), "`fractions` must have one value for each point"),
        (lambda: Steps([0.0, 0.5], [0.5, 0.9]), "`fractions` must .* end with 1.0"),
    ],
)
def test_errors(make: object, message: str) -> None:
    with pytest.raises(CompressionError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("fractions", [[math.nan, 1.0], [1.5, 1.0], [-0.5, 1.0]], ids=["nan", "above 1", "below 0"])
def test_a_staircase_never_leaves_its_range(fractions: list[float]) -> None:
    # A sparsity of 1.5 * 0.9 would reach the pruning rule in mid-training, and a NaN would be rounded there.
    with pytest.raises(CompressionError, match="`fractions` must"):
        Steps([0.0, 0.5], fractions)


def test_a_default_staircase_is_not_shared_between_schedules() -> None:
    first = Steps()
    first.points.append(9.0)
    assert Steps().points == [0.0, 0.5, 1.0]
