"""The parts of `report.html` that hold rows beside each other: a few figures large, and all of them as a table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_compress.report.figures import figures_of
from lightning_compress.report.markup import Markup, element, folded, joined, table
from lightning_compress.report.metrics import chosen_metric, more_is_better
from lightning_compress.report.ratios import Row
from lightning_compress.report.render import Cell, columns_of, legend, on_one_line, origins_of


def tiles(base: Row, row: Row | None) -> Markup:
    """Return the few figures that matter most, large: size, latency and the metric, after and before."""
    if row is None:
        return Markup("")
    chosen, found = chosen_metric([base, row]), list[Markup]()
    for column in columns_of([base, row], base.name):
        label, unit = _label_and_unit(column.header, [base, row])
        if label not in ("Size", chosen) and not label.startswith("Latency, "):
            continue
        before, cell = column.cells
        was = [f"{on_one_line(base.name)}: {before.value} {unit}".strip()]
        if cell.words:
            was.append(_change(cell._replace(words=cell.words.partition(", ")[0]), label))
        figure = [element("span", cell.value, class_="big"), Markup(" "), element("span", unit, class_="unit")]
        said = element("dd", *figure, element("span", joined(was, ", "), class_="was"))
        found.append(element("div", element("dt", label), said))
    return element("dl", *found, class_="tiles")


def _label_and_unit(header: str, rows: Sequence[Row]) -> tuple[str, str]:
    """Part a header of a table into what it names and its unit; metrics have names of the user's, and no unit."""
    text = header.replace("\n", " ")
    match = re.fullmatch(r"(.*?) \(([^()]*)\)", text)
    if match is None or any(header in row.metrics for row in rows):
        return text, ""
    return f"Latency, {match[1].lower()}" if match[1].startswith("Batch ") else match[1], match[2]


def _change(cell: Cell, title: str) -> Markup:
    """Return what a figure means against the baseline; words carry it, and colour repeats them."""
    more = more_is_better(title)
    better, worse = "less" in cell.words or "faster" in cell.words, "more" in cell.words or "slower" in cell.words
    if more is not None and cell.words[0] in "+-" and float(cell.words):
        better = (cell.words[0] == "+") is more
        worse = not better
    return element("span", cell.words, class_="good" if better else "bad" if worse else None)


def rows_section(rows: Sequence[Row], baseline: str, machine: Mapping[str, Any]) -> Markup:
    """Return all rows beside each other, a line for each figure."""
    lines = []
    for column in columns_of(rows, baseline):
        label, unit = _label_and_unit(column.header, rows)
        cells = [_cell(cell, label) for cell in column.cells]
        lines.append([joined([label, element("span", f" {unit}", class_="unit")]) if unit else label, *cells])
    names = [on_one_line(row.name) for row in rows]
    figures = {row.name: figures_of(row) for row in rows}
    keys = dict.fromkeys(name for found in figures.values() for name in found)
    exact = [[key, *(f"{found[key]!r}" if key in found else "–" for found in figures.values())] for key in keys]
    head, against = ["Figure", *names], f"Each figure as measured, and what it means against {on_one_line(baseline)}"
    return joined(
        [
            table("figures-rows", against, head, lines),
            element("p", joined(filter(None, [origins_of(rows), legend(rows, machine)]), " "), class_="quiet"),
            folded("Every figure, unrounded", table("figures-exact", "The figures of report.csv", head, exact)),
        ]
    )


def _cell(cell: Cell, title: str) -> Markup:
    small = [element("small", cell.spread.replace(" ", "\N{NO-BREAK SPACE}"))] if cell.spread else []
    if cell.words:
        small.append(element("small", _change(cell, title)))
    return joined([cell.value, *small])
