from __future__ import annotations

import itertools
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_compress.report.layers import paired
from lightning_compress.report.storage import LayerMeasurement
from lightning_compress.report.svg import Point, bars, cost_axis, metric_axis, scatter

COSTS = st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=6)
METRICS = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=6)


def parts(text: str, tag: str) -> list[dict[str, str]]:
    return [
        part.attrib | {"text": part.text or ""}
        for part in ElementTree.fromstring(text).iter()
        if part.tag.endswith(f"}}{tag}")
    ]


@given(costs=COSTS, metrics=METRICS)
def test_axes_have_a_place_for_every_value_and_ticks_within(costs: list[float], metrics: list[float]) -> None:
    for axis, values in ((cost_axis("x", costs), costs), (metric_axis("y", metrics), metrics)):
        low, high = sorted((axis.start, axis.end))
        places = [axis.place(value) for value in values]
        assert all(low <= place <= high for place in places)
        order = sorted(zip(values, places, strict=True), key=lambda pair: pair[0], reverse=axis.end < axis.start)
        assert [place for _, place in order] == sorted(places)
        assert all(axis.low <= tick <= axis.high for tick in axis.ticks)
        assert 1 <= len(axis.ticks) <= 7


def test_a_wide_range_is_logarithmic_and_a_narrow_one_is_not() -> None:
    assert cost_axis("x", [1.0, 100.0]).log and not cost_axis("x", [1.0, 2.0]).log
    axis = cost_axis("x", [1.0, 10.0, 100.0])
    first, second, third = (axis.place(value) for value in (1.0, 10.0, 100.0))
    assert second - first == pytest.approx(third - second, abs=0.11)


def test_a_fraction_ends_at_one() -> None:
    assert metric_axis("acc", [0.5, 1.0]).high == 1.0
    assert metric_axis("loss", [0.5, 1.2]).high > 1.2


def drawn(points: list[Point]) -> str:
    across, up = (cost_axis("ms", [p.x for p in points]), metric_axis("acc", [p.y for p in points]))
    return scatter("a", "A title", "What it shows.", points, across, up)


def test_points_stand_where_their_values_are_and_the_front_joins_them() -> None:
    points = [
        Point("before", 4.0, 0.9, "base", True),
        Point("after", 2.0, 0.8, "judged", True),
        Point("b", 3.0, 0.7, "other", False),
    ]
    text = drawn(points)
    before, after, other = parts(text, "circle")
    assert float(after["cx"]) < float(other["cx"]) < float(before["cx"])
    assert float(before["cy"]) < float(after["cy"]) < float(other["cy"])
    [path] = parts(text, "path")
    assert path["d"] == f"M{after['cx']} {after['cy']}H{before['cx']}V{before['cy']}"
    assert not parts(drawn([points[0]]), "path"), "a front of one point is no line"


@pytest.mark.parametrize("near", [0.0, 0.001, 0.02])
def test_names_of_points_that_are_near_do_not_cover_each_other(near: float) -> None:
    points = [Point(f"model number {i}", 2.0 + near * i, 0.9 + near * i, "other", False) for i in range(5)]
    labels = [one for one in parts(drawn(points), "text") if one["text"].startswith("model number")]
    assert len(labels) == 5
    boxes = []
    for one in labels:
        width = 8.2 * len(one["text"])
        left = float(one["x"]) - (width if one["text-anchor"] == "end" else 0)
        boxes.append((left, left + width, float(one["y"])))
    for (a, b, y), (c, d, z) in itertools.combinations(boxes, 2):
        assert b <= c or d <= a or abs(y - z) >= 13
    assert all(left >= 0 and right <= 400 for left, right, _ in boxes)


def test_bars_are_as_long_as_their_bytes() -> None:
    def layer(name: str, size: int) -> LayerMeasurement:
        return LayerMeasurement(name, "Linear", size, size, size, "float32")

    pairs = paired([layer("a", 1000), layer("b", 500), layer("gone", 200)], [layer("a", 250), layer("b", 500)])
    widths = [float(one["width"]) for one in parts(bars("a", "t", "d", pairs), "rect")]
    assert widths == [400, 100, 200, 200, 80, 0]
    said = [one["text"] for one in parts(bars("a", "t", "d", pairs), "text")]
    assert said == ["a", "4.0x", "b", "same", "gone", "gone"]
