"""Any comparison of legal rows is written and drawn, and says nothing that its numbers don't."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_compress.report import Comparison, Measurement, compare
from lightning_compress.report.latency import Latency
from lightning_compress.report.layers import largest, paired, saved, size_of
from lightning_compress.report.plots import plot_report
from lightning_compress.report.sparsity_plot import plot_sparsity
from lightning_compress.report.storage import LayerMeasurement
from tests.report.test_compare import LARGE

NAMES = st.one_of(
    st.sampled_from(
        ["a|b", "$x_1$", "50 % \\frac{", "__init__", "a\nb", "`c", "*d*", "[bold]", "<b>", "名前", "x" * 200]
    ),
    st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Z")), max_size=12),
)
COUNTS = st.one_of(st.sampled_from([0, 1, 10**15]), st.integers(0, 10**6))
TIMES = st.one_of(st.sampled_from([0.0, 1e-6, 1e6]), st.floats(1e-4, 1e4))
VALUES = st.one_of(st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1e300, -1e300, 1e-300]), st.floats(-2, 2))
DTYPES = st.sampled_from(["float32", "int8", "4 bits"])


@st.composite
def layer(draw: st.DrawFn, name: str) -> LayerMeasurement:
    parameters = draw(COUNTS)
    return LayerMeasurement(name, "Linear", parameters, draw(st.integers(0, parameters)), draw(COUNTS), draw(DTYPES))


@st.composite
def latency(draw: st.DrawFn, batch_size: int) -> Latency:
    lower, median, upper = sorted(draw(st.tuples(TIMES, TIMES, TIMES)))
    rounds = draw(st.lists(TIMES, min_size=8, max_size=8))
    return Latency(batch_size, median, lower, upper, 40, tuple(rounds), draw(st.sampled_from(["", "a", "b"])))


@st.composite
def measurement(draw: st.DrawFn) -> Measurement:
    parameters = draw(COUNTS)
    names = draw(st.one_of(st.lists(NAMES, max_size=3, unique=True), st.just([f"net.{i}" for i in range(25)])))
    return Measurement(
        parameters=parameters,
        nonzeros=draw(st.integers(0, parameters)),
        size_bytes=draw(COUNTS),
        compressed_bytes=draw(st.none() | COUNTS),
        macs=draw(st.none() | COUNTS),
        uncounted=draw(st.sampled_from([(), ("aten.fold",)])),
        latency=tuple(draw(latency(size)) for size in draw(st.sampled_from([(), (1,), (1, 32)]))),
        layers=tuple(draw(layer(name)) for name in names),
        device=draw(st.sampled_from(["cpu", "cuda"])),
        threads=draw(st.sampled_from([1, 4])),
    )


@st.composite
def comparisons(draw: st.DrawFn) -> Comparison:
    names = draw(st.lists(NAMES, min_size=1, max_size=4, unique=True))
    metrics = draw(
        st.fixed_dictionaries({}, optional={name: st.dictionaries(NAMES, VALUES, max_size=3) for name in names})
    )
    origins = {name: dict.fromkeys(found, draw(NAMES)) for name, found in metrics.items()}
    rows = {name: draw(measurement()) for name in names}
    return compare(rows, metrics=metrics, origins=origins, notes=draw(st.lists(NAMES, max_size=3)))


def cells(line: str) -> list[str]:
    return re.split(r"(?<!\\)\|", line)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(comparison=comparisons())
def test_any_comparison_is_written(comparison: Comparison) -> None:
    page = comparison.to_markdown().splitlines()
    rows = page[2 : 4 + len(comparison.rows)]
    assert {len(cells(line)) for line in rows} == {len(cells(page[2]))}, "every row of the table has its cells"
    assert page[4 + len(comparison.rows)] == ""
    assert comparison.to_table().row_count == len(comparison.rows)
    again = Comparison.from_json(comparison.to_json())
    assert again.to_json() == comparison.to_json()
    for row, line in zip(comparison.rows, rows[2:], strict=True):
        for size, (lower, upper) in row.speedup_range.items():
            assert lower <= row.speedup[size] <= upper
        if row.speedup and all(lower <= 1 <= upper for lower, upper in row.speedup_range.values()):
            assert "faster" not in line and "slower" not in line


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(comparison=comparisons())
def test_any_comparison_is_drawn(tmp_path: Path, comparison: Comparison) -> None:
    # As SVG: the same drawing, without the time that pixels take.
    text = plot_report(comparison, tmp_path / "report.svg").read_text(encoding="utf-8")
    assert ElementTree.fromstring(text).tag.endswith("svg")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(before=st.lists(layer("x"), max_size=30), after=st.lists(layer("x"), max_size=30))
def test_bars_say_what_the_bytes_say(before: list[LayerMeasurement], after: list[LayerMeasurement]) -> None:
    old, new = (
        tuple(LayerMeasurement(**{**vars(one), "name": f"{index}"}) for index, one in enumerate(found))
        for found in (before, after)
    )
    pairs = largest(paired(old, new))
    assert sum(size_of(pair.before) for pair in pairs) == sum(one.size_bytes for one in old)
    for pair in pairs:
        said, size, now = saved(pair), size_of(pair.before), size_of(pair.after)
        if said == "gone":
            assert now == 0
        elif said == "same":
            assert abs(size - now) <= 0.01 * now
        elif said == "new":
            assert size == 0 < now
        else:
            factor = float(said.split("x")[0].replace(",", ""))
            assert factor == pytest.approx(now / size if said.endswith("larger") else size / now, rel=0.05)


def test_names_start_no_formula_and_settings_of_the_user_do_not_reach_the_picture(tmp_path: Path) -> None:
    import matplotlib

    rows = {"$\\alpha_{1$ and $5": LARGE, "b": LARGE}
    with matplotlib.rc_context({"text.usetex": True, "svg.fonttype": "none"}):
        text = plot_report(compare(rows), tmp_path / "report.svg").read_text(encoding="utf-8")
    assert ElementTree.fromstring(text).tag.endswith("svg")


HISTORIES = {
    "one point": [(5, 0.5, {"w": 0.5})],
    "no layers": [(5, 0.5, {})],
    "nothing is pruned": [(1, 0.0, {"w": 0.0}), (1, 0.0, {"w": 0.0})],
    "two hundred layers": [(step, 0.1, {f"$a_{i}$|\n": 0.1 for i in range(200)}) for step in (1, 2)],
    "a layer left": [(1, 0.1, {"w": 0.1, "v": 0.2}), (2, 0.2, {"w": 0.3})],
}


@pytest.mark.parametrize("history", HISTORIES.values(), ids=HISTORIES)
def test_any_history_is_drawn(tmp_path: Path, history) -> None:
    assert plot_sparsity(history, tmp_path / "sparsity.svg").exists()
