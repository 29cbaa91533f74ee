from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings

from lightning_compress.report import Comparison, compare
from lightning_compress.report.figures import figures_of
from lightning_compress.report.html import page
from lightning_compress.report.storage import LayerMeasurement
from tests.report.pages import HOSTILE, Page, everything, times
from tests.report.test_any_report import comparisons
from tests.report.test_compare import INT8, LARGE, MASKED, SMALL

STYLE = (Path(page.__code__.co_filename).parent / "style.css").read_text()
PARTS = [
    "Before and after",
    "What it costs",
    "Layer by layer",
    "Exported files",
    "What stayed float, and why",
    "What brought nothing",
    "Notes",
    "Settings and versions",
]


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    return everything(tmp_path)


def check(text: str) -> Page:
    """Whatever a report says, a page is whole, stands alone, and can be read without eyes and without a mouse."""
    found = Page(text)
    ids = [one.attributes["id"] for one in found.elements if "id" in one.attributes]
    assert len(ids) == len(set(ids))
    assert {id_ for one in found.elements for id_ in one.attributes.get("aria-labelledby", "").split()} <= set(ids)
    links = [one.attributes["href"] for one in found.all("a")]
    assert links and all(link.startswith("#") and link[1:] in ids for link in links)
    assert not found.all("script", "img", "iframe", "object", "embed", "link", "base", "form")
    assert not [name for one in found.elements for name in one.attributes if name.startswith("on") or name == "src"]
    assert "url(" not in STYLE and "@import" not in STYLE
    levels = [int(one.tag[1]) for one in found.all("h1", "h2", "h3")]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    for header in found.all("th"):
        assert header.attributes["scope"] in ("row", "col") and header.text.strip()
    assert len(found.all("caption")) == len(found.all("table"))
    for part in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        drawn = ElementTree.fromstring(part)
        assert drawn.get("role") == "img"
        assert [child.tag.rpartition("}")[2] for child in drawn[:2]] == ["title", "desc"]
        assert all(child.text for child in drawn[:2])
    for one in found.elements:  # what scrolls takes the focus, and has a name
        if "scroll" in one.attributes.get("class", ""):
            assert (one.attributes["tabindex"], one.attributes["role"]) == ("0", "region")
    assert {"header", "nav", "main"} <= {one.tag for one in found.elements}
    assert found.all("html")[0].attributes["lang"] == "en"
    return found


def test_parts_stand_in_their_order(comparison: Comparison) -> None:
    found = check(comparison.to_html())
    assert [one.text for one in found.all("h2")] == PARTS
    assert len(found.all("svg")) == 3
    assert found.all("h1")[0].text == (
        "The compressed model is 4.0 times smaller and 2.5 times faster at batch 32, but 1.50 times slower at batch 1; "
        "test_acc falls from 0.9712 to 0.9688."
    )


def test_every_figure_is_on_the_page(comparison: Comparison) -> None:
    text = check(comparison.to_html()).text
    for row in comparison.rows:
        for name, value in figures_of(row).items():
            assert name in text and repr(value) in text, (row.name, name)
        for layer in row.measurement.layers:
            assert layer.name in text and f"{layer.size_bytes:,}" in text
    for said in ("0.9987", "99.5%", "1.23%", "50.00%", "3 batches"):  # agreement and rounding errors
        assert said in text
    for said in ("0.0345 ± 0.0021", "0.91", "int8_static"):  # sensitivity
        assert said in text
    for said in ("0.999991", "99.8%", "642 samples", "1, 64, 129", "2 of 3 quantized layers", "no kernel takes it"):
        assert said in text
    for said in ("1.50x slower", "8.0x faster", "onnxruntime 1.2.3", "become floats when the file is loaded"):
        assert said in text
    assert "net.23" in text and "net is called <twice>" in text
    assert "max_epochs: 7" in text and comparison.machine["torch"] in text
    assert "net was calibrated on 8 batches." in text


def test_a_busy_machine_is_named_at_once() -> None:
    busy = replace(LARGE, latency=(replace(times(1, *[2.0] * 8), waited=0.75),))
    quiet, loud = (check(compare({"before": one, "after": SMALL}).to_html()) for one in (LARGE, busy))
    said = "The machine did other work while latency was measured"
    assert said in loud.all("header")[0].text and said not in quiet.text


def test_what_brought_nothing_is_said_in_plain_words(comparison: Comparison) -> None:
    text = check(comparison.to_html()).text
    assert "after: slower than before at batch 1." in text
    assert "model.onnx: 1.50 times slower in onnxruntime than the float model in torch at batch 64." in text
    zeros = check(compare({"before": LARGE, "after": replace(MASKED, size_bytes=2000)}).to_html()).text
    assert "after: 90.0% of its parameters are zero, which alone makes nothing faster" in zeros
    fine = check(compare({"before": LARGE, "after": SMALL}).to_html()).text
    assert "Nothing that was measured" in fine


def test_the_front_is_marked_in_words(comparison: Comparison) -> None:
    found = check(comparison.to_html())
    rows = [one.text for one in found.all("tr") if one.text.endswith(("yes", "no"))]
    # By latency int8 in torch is slower and less accurate than float; by bytes each is a choice.
    assert ["yes" if row.endswith("yes") else "no" for row in rows] == ["yes", "no", "yes", "yes", "yes", "yes"]


def fronts(first_ms: list[float], second_ms: list[float]) -> list[str]:
    rows = {
        name: replace(LARGE, latency=(times(1, *rounds),))
        for name, rounds in (("before", first_ms), ("after", second_ms))
    }
    found = check(compare(rows, metrics={"before": {"acc": 0.5}, "after": {"acc": 0.5}}).to_html())
    return [one.text[-3:] for one in found.all("tr") if one.text.startswith(("before", "after"))][:2]


def test_what_is_not_measurably_slower_is_on_the_front_too() -> None:
    assert fronts([2.0] * 8, [2.0, 2.1, 1.9, 2.1, 1.9, 2.1, 2.1, 1.9]) == ["yes", "yes"]
    assert fronts([2.0] * 8, [2.1] * 8) == ["yes", "5no"]


def test_parts_without_content_are_left_out() -> None:
    found = check(compare({"one": replace(LARGE, latency=(), macs=None, layers=())}).to_html())
    assert [one.text for one in found.all("h2")] == [
        "Side by side",
        "What it costs",
        "What brought nothing",
        "Settings and versions",
    ]
    assert "Only one was measured" in found.text and "No metric was measured" in found.text


def test_names_of_users_become_no_markup(tmp_path: Path) -> None:
    layer = LayerMeasurement(HOSTILE, HOSTILE, 10, 5, 40, HOSTILE)
    rows = {HOSTILE: replace(LARGE, layers=(layer,)), HOSTILE + "2": replace(INT8, layers=(layer,))}
    metrics = {name: {HOSTILE: 0.5} for name in rows}
    hostile = everything(tmp_path, HOSTILE)
    origins = {name: {HOSTILE: HOSTILE} for name in rows}
    for comparison in (hostile, compare(rows, metrics=metrics, origins=origins, notes=[HOSTILE], settings=HOSTILE)):
        text = comparison.to_html()
        found = check(text)
        assert "<script>alert('x')</script>" in found.text, "it is shown as it is"
        assert not re.search("[\x00-\x08\x0b-\x1f]", text)
        text.encode("utf-8")


def test_surrogates_can_be_written() -> None:
    compare({"a\ud800": LARGE}).to_html().encode("utf-8")


@settings(max_examples=25, deadline=None, derandomize=True)
@given(comparison=comparisons())
def test_any_comparison_becomes_a_page(comparison: Comparison) -> None:
    check(comparison.to_html())


def test_a_thousand_layers_are_a_few_hundred_kilobytes() -> None:
    layers = tuple(LayerMeasurement(f"net.blocks.{i}.fc", "Linear", 1000, 900, 4000, "float32") for i in range(1000))
    text = compare({"before": replace(LARGE, layers=layers), "after": replace(SMALL, layers=layers)}).to_html()
    assert len(text) < 300_000
    assert "The largest 400 of 1000 layers" in check(text).text


def test_the_page_is_drawn_from_the_json(comparison: Comparison) -> None:
    assert Comparison.from_json(comparison.to_json()) == comparison
    assert Comparison.from_json(comparison.to_json()).to_html() == comparison.to_html()
    assert json.loads(comparison.to_json())["version"] == 3


def luminance(color: str) -> float:
    parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_colors_have_contrast(theme: int) -> None:
    """By WCAG 2.2: 4.5 for text, 3 for what a picture draws."""
    blocks = re.findall(r":root \{([^}]*)\}", STYLE)
    assert len(blocks) == 2
    colors = dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", blocks[theme]))

    def contrast(one: str, other: str) -> float:
        low, high = sorted((luminance(colors[one]), luminance(colors[other])))
        return (high + 0.05) / (low + 0.05)

    assert [name for name in ("ink", "muted", "accent", "good", "bad") if contrast(name, "page") < 4.5] == []
    assert contrast("ink", "panel") >= 4.5
    assert contrast("base", "page") >= 3
