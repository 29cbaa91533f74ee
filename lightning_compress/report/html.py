"""`report.html`: one page of its own, drawn from a comparison; no scripts, nothing that is loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from lightning_compress.report.explained import floats_section, notes_section, settings_section, without_gain_section
from lightning_compress.report.exported import files_section
from lightning_compress.report.facts import Sensitivity
from lightning_compress.report.layer_table import layers_section
from lightning_compress.report.markup import Markup, element, joined
from lightning_compress.report.ratios import BEFORE, Row, busy_notes
from lightning_compress.report.side_by_side import rows_section, tiles
from lightning_compress.report.tradeoff import tradeoff_section
from lightning_compress.report.verdict import judged, verdict

_STYLE = files(__package__).joinpath("style.css").read_text(encoding="utf-8")
_BUSY = "The machine did other work while latency was measured: speeds are less certain than usual. See the notes."
# Even if a name became markup, nothing could run and nothing could be loaded.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page(
    rows: Sequence[Row],
    baseline: str,
    notes: Sequence[str],
    machine: Mapping[str, Any],
    settings: str = "",
    sensitivity: Sensitivity | None = None,
) -> str:
    """Return the page as HTML: the verdict, then the figures, then what explains them.

    Args:
        rows: of the comparison.
        baseline: the row that the others are compared with.
        notes: of the comparison.
        machine: on which it was measured.
        settings: of the run, as YAML.
        sensitivity: of single layers.
    """
    base = next(row for row in rows if row.name == baseline)
    row = judged(rows, baseline)
    said = verdict(rows, baseline)
    sections = [
        (
            "figures",
            "Before and after" if baseline == BEFORE else "Side by side",
            rows_section(rows, baseline, machine),
        ),
        ("tradeoff", "What it costs", tradeoff_section(rows, base, row)),
        ("layers", "Layer by layer", layers_section(base, row, sensitivity)),
        ("files", "Exported files", files_section(rows)),
        ("floats", "What stayed float, and why", floats_section(row or base)),
        ("nothing", "What brought nothing", without_gain_section(rows, base)),
        ("notes", "Notes", notes_section(rows, base, notes)),
        ("settings", "Settings and versions", settings_section(settings, machine)),
    ]
    drawn = [(id_, title, content) for id_, title, content in sections if content]
    links = element("ul", *(element("li", element("a", title, href=f"#{id_}")) for id_, title, _ in drawn))
    header = element(
        "header",
        element("p", "Compression report", class_="eyebrow"),
        element("h1", said),
        *([element("p", _BUSY, class_="quiet")] if any(busy_notes(rows)) else []),
        tiles(base, row),
        element("nav", links, aria_label="Parts of the report"),
    )
    parts = [
        element("section", element("h2", title, id=id_), content, aria_labelledby=id_) for id_, title, content in drawn
    ]
    body = element("div", header, element("main", *parts, id="main"), class_="page")
    head = joined(
        [
            Markup('<meta charset="utf-8">'),
            Markup('<meta name="viewport" content="width=device-width,initial-scale=1">'),
            Markup(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
            element("title", f"Compression report: {said}"),
            Markup(f"<style>\n{_STYLE}</style>"),
        ]
    )
    skip = element("a", "To the figures", href="#main", class_="skip")
    document = element("html", element("head", head), element("body", skip, body), lang="en")
    return f"<!DOCTYPE html>\n{document}\n"
