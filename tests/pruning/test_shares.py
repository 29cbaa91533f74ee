"""How many weights of which layer go."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from lightning_compress.pruning.shares import REACH, share

Layer = tuple[int, float, float, float]
LAYERS = st.lists(
    st.tuples(st.integers(1, 5000), st.floats(0, 0.5), st.floats(0.5, 1), st.floats(1e-6, 1e3)), min_size=1, max_size=8
)
"""Each with its size, the parts of it that have gone and that may go at most, and its error."""


@given(LAYERS, st.floats(0, 1))
def test_the_total_is_met_between_what_has_gone_and_what_may_go(layers: list[Layer], part: float) -> None:
    sizes = {str(number): size for number, (size, *_) in enumerate(layers)}
    least = {str(number): math.floor(gone * size) for number, (size, gone, *_) in enumerate(layers)}
    most = {str(number): math.ceil(may * size) for number, (size, _, may, _) in enumerate(layers)}
    errors = {str(number): error for number, (*_, error) in enumerate(layers)}
    low, high = sum(least.values()), sum(most.values())
    total = low + round(part * (high - low))
    counts = share(sizes, least, most, total, errors)
    assert sum(counts.values()) == total
    assert all(least[name] <= counts[name] <= most[name] for name in sizes)


def test_a_small_layer_that_does_much_stays_whole_and_no_layer_loses_far_more_than_the_mean() -> None:
    sizes = {"first": 200, "hidden": 400_000, "last": 600_000}
    counts = share(sizes, dict.fromkeys(sizes, 0), sizes, 500_100, {"first": 0.1, "hidden": 0.01, "last": 0.0005})
    parts = {name: counts[name] / sizes[name] for name in sizes}
    assert parts["first"] == 0
    assert 0.3 < parts["hidden"] < 0.5 < parts["last"] <= 0.5 + REACH


def test_equal_errors_for_each_weight_share_evenly() -> None:
    sizes = {"small": 100, "large": 900}
    assert share(sizes, dict.fromkeys(sizes, 0), sizes, 300, {"small": 1.0, "large": 9.0}) == {
        "small": 30,
        "large": 270,
    }
