"""The bound of a paired fall: it holds as often as it says, and says how many samples would do."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lightning_compress.choosing.paired import Fall, Group, student_t, unit_of


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 15, 31, 200])
def test_the_quantile_is_that_of_scipy(degrees: int) -> None:
    assert student_t(degrees) == pytest.approx(stats.t.ppf(0.95, degrees), rel=5e-3)


def groups(values: np.ndarray, size: int) -> list[Group]:
    return [Group(len(part), float(part.mean())) for part in np.split(values, range(size, len(values), size))]


@pytest.mark.parametrize(("lost", "won"), [(0.0, 0.0), (0.004, 0.0), (0.01, 0.006), (0.05, 0.03)])
@pytest.mark.parametrize("samples", [300, 1000])
def test_the_true_fall_is_below_the_bound_as_often_as_it_says(lost: float, won: float, samples: int) -> None:
    # Answers of two models that are right or wrong: the true fall is what is lost less what is won.
    generator = np.random.default_rng(0)
    kept = 0
    for _ in range(400):
        draw = generator.random(samples)
        before = np.where(draw < lost, 1.0, np.where(draw < lost + won, 0.0, 1.0))
        after = np.where(draw < lost, 0.0, 1.0)
        size = math.ceil(samples / 32)
        kept += Fall.between(groups(before, size), groups(after, size), "max", 1.0).bound >= lost - won
    assert kept / 400 >= 0.94


def test_the_fall_is_that_of_the_whole_and_the_noise_is_students() -> None:
    before, after = [0.9, 0.8, 0.7, 1.0], [0.85, 0.8, 0.6, 1.0]
    fall = Fall.between([Group(10, v) for v in before], [Group(10, v) for v in after], "max", unit=0.0)
    differences = np.subtract(before, after)
    assert fall.fall == pytest.approx(differences.mean())
    assert fall.error == pytest.approx(stats.sem(differences))
    assert fall.bound == pytest.approx(differences.mean() + stats.t.ppf(0.95, 3) * stats.sem(differences), rel=5e-3)
    worse = Fall.between([Group(10, v) for v in before], [Group(10, v) for v in after], "min", unit=0.0)
    assert worse.fall == -fall.fall


def test_groups_count_by_their_samples() -> None:
    fall = Fall.between([Group(30, 1.0), Group(10, 1.0)], [Group(30, 1.0), Group(10, 0.0)], "max", unit=0.0)
    assert fall.fall == 0.25 and fall.after == 0.75


@settings(max_examples=100, deadline=None)
@given(
    fall=st.floats(-0.1, 0.1),
    error=st.floats(0, 0.1),
    samples=st.integers(2, 10_000),
    margin=st.floats(1e-3, 0.2),
    unit=st.sampled_from([0.0, 1.0, 100.0]),
)
def test_so_many_samples_would_do_and_fewer_would_not(
    fall: float, error: float, samples: int, margin: float, unit: float
) -> None:
    seen = Fall(0.9, 0.9 - fall, fall, error, samples, 1.7, unit)
    needed = seen.needed(fall + margin)
    assert needed is not None

    def bound(count: int) -> float:
        return Fall(0.9, 0.9 - fall, fall, error * (samples / count) ** 0.5, count, 1.7, unit).bound

    if needed:
        assert bound(needed) <= fall + margin + 1e-6
    if needed > 1:
        assert bound(needed - 1) >= fall + margin - 1e-6
    assert seen.needed(fall) is None


def test_a_sample_counts_one_or_the_largest_value() -> None:
    assert unit_of([Group(1, 0.2), Group(1, math.nan)]) == 1.0
    assert unit_of([Group(1, -3.0), Group(1, 2.0)]) == 3.0
