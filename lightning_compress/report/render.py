"""How does a comparison look, as a terminal table and as Markdown? Columns with units are made for both."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_compress.report.ratios import Row

if TYPE_CHECKING:
    from rich.table import Table

_UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "K"), (1.0, ""))
_UNKNOWN = "-"


class Cell(NamedTuple):
    """A value, its spread, and what it means against the baseline: as a sign and a number, and in words."""

    value: str
    spread: str = ""
    ratio: str = ""
    words: str = ""


class Column(NamedTuple):
    """A header with its unit, and a cell for each row."""

    header: str
    cells: list[Cell]


def table(rows: Sequence[Row], baseline: str) -> Table:
    """Build the ``rich`` table: a row for each model, and under each number its ratio to the baseline's."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    drawn = Table(title="Compression report", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    names = [on_one_line(row.name) for row in rows]
    longest_word = max(len(word) for name in names for word in name.split() or [""])
    drawn.add_column("Model", style="bold", min_width=min(longest_word, 12), overflow="fold")
    columns = columns_of(rows, baseline)
    for column in columns:
        header = column.header if "\n" in column.header else column.header.replace("_", "_\n", 1)
        drawn.add_column(escape(header), justify="right", no_wrap=True)
    for index, name in enumerate(names):
        cells = [column.cells[index] for column in columns]
        drawn.add_row(escape(name), *(f"{escape(cell.value)}\n[dim]{cell.ratio}[/dim]" for cell in cells))
    return drawn


def markdown(rows: Sequence[Row], baseline: str, notes: Sequence[str], machine: Mapping[str, Any]) -> str:
    """Build the Markdown page."""
    columns = columns_of(rows, baseline)
    headers = [_escaped(column.header.replace("\n", " ")) for column in columns]
    lines = ["# Compression report", "", f"| Model | {' | '.join(headers)} |", "|:--|" + "--:|" * len(columns)]
    for index, row in enumerate(rows):
        texts = [_in_words(column.cells[index]) for column in columns]
        lines.append(f"| {' | '.join([_escaped(row.name), *texts])} |")
    lines += ["", f"Compared with {_escaped(baseline)}. {_escaped(legend(rows, machine))}", ""]
    if origins := origins_of(rows):
        lines += [_escaped(origins), ""]
    lines += [f"- {_escaped(note)}" for note in notes]
    lines += [""] if notes else []
    return "\n".join(lines)


def _in_words(cell: Cell) -> str:
    return " ".join(part for part in (cell.value, cell.spread, f"({cell.words})" if cell.words else "") if part)


def on_one_line(text: str) -> str:
    """The text without line breaks, which would end a row of a table."""
    return " ".join(text.split())


_MARKDOWN = re.compile(r"[\\|*$<~]|(?<![0-9A-Za-z])_+|_+(?![0-9A-Za-z])")


def _escaped(text: str) -> str:
    """The text as Markdown shows it: no formula, no emphasis, no cell of its own; code in backticks stays."""
    parts = on_one_line(text).split("`")
    if len(parts) % 2 == 0:  # a backtick that opens no code
        parts = [on_one_line(text).replace("`", "\\`")]
    prose = [_MARKDOWN.sub(lambda found: "".join(f"\\{sign}" for sign in found[0]), part) for part in parts[::2]]
    code = [part.replace("|", "\\|") for part in parts[1::2]]
    return "`".join(part for pair in zip(prose, [*code, ""], strict=True) for part in pair).removesuffix("`")


def legend(rows: Sequence[Row], machine: Mapping[str, Any]) -> str:
    """Say how the numbers were taken, and on which machine."""
    devices = sorted({row.measurement.device for row in rows})
    threads = sorted({row.measurement.threads for row in rows})
    turns = {latency.turns for row in rows for latency in row.measurement.latency}
    ratio = ""
    if len(rows) > 1 and turns:
        in_turns = len(turns) == 1 and "" not in turns
        ratio = (
            "Rows took turns, and a speed-up is the median ratio of a round, with its middle half. "
            if in_turns
            else "Rows were timed one after the other. "
        )
    return (
        "Size is that of the saved file (1 KB = 1000 bytes), MACs are per sample, latency is the median of repeated "
        f"calls ± half its interquartile range. {ratio}On {'/'.join(devices)}: {machine['cpu']}, {machine['cores']} "
        f"cores, {'/'.join(map(str, threads))} thread{'' if threads == [1] else 's'}, torch {machine['torch']}."
    )


def origins_of(rows: Sequence[Row]) -> str:
    """Say how the metrics that are shown were measured, where that is known."""
    shown = shown_metrics(rows)
    parts = []
    for row in rows:
        by_origin: dict[str, list[str]] = {}
        for name in shown:
            if name in row.origins:
                by_origin.setdefault(row.origins[name], []).append(name)
        parts += [f"{row.name}: {origin} ({', '.join(names)})" for origin, names in by_origin.items()]
    return f"Metrics of {'; '.join(parts)}." if parts else ""


def columns_of(rows: Sequence[Row], baseline: str) -> list[Column]:
    """Return the columns that have something to show."""
    columns = [
        _scaled("Params", "", rows, baseline, lambda row: (row.measurement.parameters, row.parameters_ratio)),
        Column("Zeros\n(%)", [Cell(_number(100 * row.measurement.sparsity)) for row in rows]),
        _scaled("Size", "B", rows, baseline, lambda row: (row.measurement.size_bytes, row.size_ratio)),
    ]
    if any(row.measurement.macs is not None for row in rows):
        macs = _scaled("MACs per sample", "", rows, baseline, lambda row: (row.measurement.macs, row.macs_ratio))
        bounds = ["≥ " if row.measurement.uncounted and row.measurement.macs else "" for row in rows]
        cells = [cell._replace(value=bound + cell.value) for bound, cell in zip(bounds, macs.cells, strict=True)]
        columns.append(Column(macs.header, cells))
    sizes = sorted({latency.batch_size for row in rows for latency in row.measurement.latency})
    columns += [_latency(size, rows, baseline) for size in sizes]
    return columns + [_metric(name, rows, baseline) for name in shown_metrics(rows)]


def shown_metrics(rows: Sequence[Row]) -> list[str]:
    """Return the metrics worth a column: those of the test, else those of the validation, else all.

    Both, where only those of the validation compare rows, or a row has no others.
    """
    counts = Counter(name for row in rows for name in row.metrics)
    test, val = ([name for name in counts if name.startswith(stage)] for stage in ("test", "val"))
    if not (test and val):
        return test or val or list(counts)
    compares = any(counts[name] > 1 for name in val) and not any(counts[name] > 1 for name in test)
    bare = any(row.metrics.keys() & set(val) and not row.metrics.keys() & set(test) for row in rows)
    return test + val if compares or bare else test


def _scaled(
    title: str, unit: str, rows: Sequence[Row], baseline: str, pick: Callable[[Row], tuple[int | None, float | None]]
) -> Column:
    picked = [pick(row) for row in rows]
    # The unit fits the smallest, or a tenfold smaller model would be printed as 0.01 of something.
    smallest = min((value for value, _ in picked if value), default=1)
    scale, prefix = next((scale, prefix) for scale, prefix in _UNITS if smallest >= scale)
    cells = []
    for row, (value, ratio) in zip(rows, picked, strict=True):
        shown = _UNKNOWN if value is None else _number(value / scale, whole=scale == 1.0)
        gained = ratio is not None and row.name != baseline
        cells.append(Cell(shown, "", *(_against(ratio, "÷", "less", "more") if gained and ratio else ())))
    # Two lines of a header, the unit at the end of the second.
    first, _, second = title.partition(" per ")
    lines = [f"{first} per", second] if second else [first]
    unit = f"({prefix}{unit})" if prefix or unit else ""
    return Column("\n".join([lines[0], " ".join(filter(None, [*lines[1:], unit]))]).strip(), cells)


def _latency(size: int, rows: Sequence[Row], baseline: str) -> Column:
    cells = []
    for row in rows:
        latency = next((timed for timed in row.measurement.latency if timed.batch_size == size), None)
        if latency is None:
            cells.append(Cell(_UNKNOWN))
            continue
        spread = f"± {_number((latency.upper_ms - latency.lower_ms) / 2)}"
        compared = size in row.speedup and row.name != baseline
        cells.append(Cell(_number(latency.median_ms), spread, *(_speed(row, size) if compared else ())))
    return Column(f"Batch {size}\n(ms)", cells)


def _speed(row: Row, size: int) -> tuple[str, str]:
    if row.is_faster(size) is None:
        return "no gain", "no measurable difference"
    sign, words = _against(row.speedup[size], "×", "faster", "slower")
    lower, upper = row.speedup_range[size]
    if row.speedup[size] < 1:
        lower, upper = 1 / upper, 1 / lower if lower else math.inf
    return sign, words if words == "same" else f"{words}, {factor(lower)} to {factor(upper)}"


def _metric(name: str, rows: Sequence[Row], baseline: str) -> Column:
    cells = []
    for row in rows:
        change = row.metric_changes.get(name) if row.name != baseline else None
        value = f"{row.metrics[name]:.4g}" if name in row.metrics else _UNKNOWN
        shown = "" if change is None or not math.isfinite(change) else f"{change:+.4g}"
        cells.append(Cell(value, "", shown, shown))
    return Column(name, cells)


def _against(ratio: float, sign: str, better: str, worse: str) -> tuple[str, str]:
    if 0.99 <= ratio <= 1.01:
        return "same", "same"
    words = f"{factor(ratio)}x {better}" if ratio > 1 else f"{factor(1 / ratio)}x {worse}"
    return f"{sign} {factor(ratio)}", words


def factor(ratio: float) -> str:
    """A ratio with as many digits as a reader needs."""
    if ratio < 0.1:
        return f"{ratio:.1g}"
    return f"{ratio:.2f}" if ratio < 2 else f"{ratio:.1f}" if ratio < 100 else f"{ratio:,.0f}"


def _number(value: float, *, whole: bool = False) -> str:
    if whole or value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    if 0 < abs(value) < 0.001:
        return f"{value:.1g}"
    digits = 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{digits}f}"
