"""The parts of `report.html` in words: what stayed float, what brought nothing, notes, settings and versions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning_compress.messages import by_reason, merged
from lightning_compress.report.markup import Markup, element, folded, joined, prose, table, terms
from lightning_compress.report.ratios import Row, row_notes
from lightning_compress.report.render import factor, on_one_line

_OPEN_NOTES = 8


def floats_section(row: Row) -> Markup:
    """Return the layers that stayed float, by reason; nothing where nothing was quantized."""
    if row.measurement.quantized is None:
        return Markup("")
    reasons = by_reason(row.measurement.quantized.floats)
    if not reasons:
        return element("p", "Nothing: every layer that the scheme is for is quantized.")
    lines = [
        [joined((element("code", path or "the module") for path in merged(layers)), ", "), prose(reason)]
        for reason, layers in reasons.items()
    ]
    return table(
        "floats-table", f"Layers of {on_one_line(row.name)} that stayed float", ["Layers", "Reason"], lines, "words"
    )


def without_gain_section(rows: Sequence[Row], base: Row) -> Markup:
    """Return in plain words what is no smaller and no faster."""
    others = [row for row in rows if row is not base]
    found = [note for row in others for note in _without_gain(row, base)]
    if not found:
        return element("p", "Nothing that was measured: all of it is smaller, and faster where latency was compared.")
    return element("ul", *(element("li", prose(on_one_line(note))) for note in dict.fromkeys(found)))


def _without_gain(row: Row, base: Row) -> Iterator[str]:
    notes = list(row_notes(row, base))
    yield from notes
    if not any("are zero" in note for note in notes):
        yield from _zeros(row, base)
    yield from _slow_files(row)


def _zeros(row: Row, base: Row) -> Iterator[str]:
    zeros = row.measurement.sparsity
    if row.measurement.file is None and zeros > base.measurement.sparsity + 0.01:
        yield (
            f"{row.name}: {zeros:.1%} of its parameters are zero, which alone makes nothing faster and no plain file "
            "smaller: kernels multiply a zero, and files store it, like any other number."
        )


def _slow_files(row: Row) -> Iterator[str]:
    facts = row.measurement.file
    if facts is None:
        return
    for timed in facts.latency:
        if timed.quartiles[0] > 1:
            yield (
                f"{row.name}: {factor(timed.ratio)} times slower in {facts.runtime} than the "
                f"{timed.baseline} model in torch at batch {timed.batch_size}."
            )


def notes_section(rows: Sequence[Row], base: Row, notes: Sequence[str]) -> Markup:
    """Return the notes that don't stand among what brought nothing; of many the first ones open."""
    said = {note for row in rows if row is not base for note in row_notes(row, base)}
    rest = [element("li", prose(on_one_line(note))) for note in notes if note not in said]
    if not rest:
        return Markup("")
    more = (
        [folded(f"{len(rest) - _OPEN_NOTES} more notes", element("ul", *rest[_OPEN_NOTES:]))]
        if len(rest) > _OPEN_NOTES
        else []
    )
    return joined([element("ul", *rest[:_OPEN_NOTES]), *more])


def settings_section(settings: str, machine: Mapping[str, Any]) -> Markup:
    """Return the settings as YAML, and what figures depend on: the machine and versions."""
    plain = {
        name.replace("_", " "): value
        for name, value in machine.items()
        if value is not None and not isinstance(value, Mapping)
    }
    packages = machine.get("packages") or {}
    said = [*plain.items(), *packages.items()]
    yaml = (
        element("pre", element("code", settings), tabindex=0, role="region", aria_label="Settings as YAML")
        if settings
        else Markup("")
    )
    return joined([yaml, element("div", terms((str(name), str(value)) for name, value in said), class_="facts")])
