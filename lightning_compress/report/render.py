"""Prints a comparison: columns with units, made in one place, shown as a terminal table or as Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from lightning_compress.report.compare import Comparison, Row
from lightning_compress.report.latency import Latency
from lightning_compress.report.notes import faster

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
    """A header with its unit, and one cell a row."""

    header: str
    cells: list[Cell]


def table(comparison: Comparison) -> Table:
    """Build the ``rich`` table: one row a model, and under each number its ratio to the baseline's."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    drawn = Table(title="Compression report", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    longest_word = max(len(word) for row in comparison.rows for word in row.name.split() or [""])
    drawn.add_column("Model", style="bold", min_width=min(longest_word, 12), overflow="fold")
    columns = columns_of(comparison)
    for column in columns:
        header = column.header if "\n" in column.header else column.header.replace("_", "_\n", 1)
        drawn.add_column(escape(header), justify="right", no_wrap=True)
    for index, row in enumerate(comparison.rows):
        cells = [column.cells[index] for column in columns]
        drawn.add_row(escape(row.name), *(f"{escape(cell.value)}\n[dim]{cell.ratio}[/dim]" for cell in cells))
    return drawn


def markdown(comparison: Comparison) -> str:
    """Build the Markdown page."""
    columns = columns_of(comparison)
    headers = [_escaped(column.header.replace("\n", " ")) for column in columns]
    lines = ["# Compression report", "", f"| Model | {' | '.join(headers)} |", "|:--|" + "--:|" * len(columns)]
    for index, row in enumerate(comparison.rows):
        texts = [_in_words(column.cells[index]) for column in columns]
        lines.append(f"| {' | '.join([_escaped(row.name), *texts])} |")
    lines += ["", f"Compared with {comparison.baseline}. {legend(comparison)}", ""]
    lines += [f"- {note}" for note in comparison.notes]
    lines += [""] if comparison.notes else []
    return "\n".join(lines)


def _in_words(cell: Cell) -> str:
    return " ".join(part for part in (cell.value, cell.spread, f"({cell.words})" if cell.words else "") if part)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def legend(comparison: Comparison) -> str:
    """Say how the numbers were taken, and on which machine."""
    machine = comparison.machine
    devices = sorted({row.measurement.device for row in comparison.rows})
    threads = sorted({row.measurement.threads for row in comparison.rows})
    return (
        "Size is that of the saved file (1 KB = 1000 bytes), MACs are per sample, latency is the median of repeated "
        f"calls ± half its interquartile range on {'/'.join(devices)}: {machine['cpu']}, {machine['cores']} cores, "
        f"{'/'.join(map(str, threads))} threads, torch {machine['torch']}."
    )


def columns_of(comparison: Comparison) -> list[Column]:
    """Return the columns that have something to show."""
    rows = comparison.rows
    columns = [
        _scaled("Params", "", comparison, lambda row: (row.measurement.parameters, row.parameters_ratio)),
        Column("Zeros\n(%)", [Cell(_number(100 * row.measurement.sparsity)) for row in rows]),
        _scaled("Size", "B", comparison, lambda row: (row.measurement.size_bytes, row.size_ratio)),
    ]
    if any(row.measurement.macs is not None for row in rows):
        macs = _scaled("MACs", "", comparison, lambda row: (row.measurement.macs, row.macs_ratio))
        bounds = ["≥ " if row.measurement.uncounted and row.measurement.macs else "" for row in rows]
        cells = [cell._replace(value=bound + cell.value) for bound, cell in zip(bounds, macs.cells, strict=True)]
        columns.append(Column(macs.header, cells))
    sizes = sorted({one.batch_size for row in rows for one in row.measurement.latency})
    columns += [_latency(size, comparison) for size in sizes]
    return columns + [_metric(name, comparison) for name in shown_metrics(rows)]


def shown_metrics(rows: Sequence[Row]) -> list[str]:
    """Return the metrics worth a column: those of the test, else those of the validation, else all."""
    names = list(dict.fromkeys(name for row in rows for name in row.metrics))
    for stage in ("test", "val"):
        if found := [name for name in names if name.startswith(stage)]:
            return found
    return names


def _scaled(
    title: str, unit: str, comparison: Comparison, pick: Callable[[Row], tuple[int | None, float | None]]
) -> Column:
    picked = [pick(row) for row in comparison.rows]
    # The unit fits the smallest, or a tenfold smaller model would be printed as 0.01 of something.
    smallest = min((value for value, _ in picked if value), default=1)
    scale, prefix = next((scale, prefix) for scale, prefix in _UNITS if smallest >= scale)
    cells = []
    for row, (value, ratio) in zip(comparison.rows, picked, strict=True):
        shown = _UNKNOWN if value is None else _number(value / scale, whole=scale == 1.0)
        gained = ratio is not None and row.name != comparison.baseline
        cells.append(Cell(shown, "", *(_against(ratio, "÷", "less", "more") if gained and ratio else ())))
    return Column(f"{title}\n({prefix}{unit})" if prefix or unit else title, cells)


def _latency(size: int, comparison: Comparison) -> Column:
    base = _at(size, comparison[comparison.baseline])
    cells = []
    for row in comparison.rows:
        one = _at(size, row)
        if one is None:
            cells.append(Cell(_UNKNOWN))
            continue
        spread = f"± {_number((one.upper_ms - one.lower_ms) / 2)}"
        compared = base is not None and size in row.speedup and row.name != comparison.baseline
        gained = _speed(row.speedup[size], one, base) if compared and base else ("", "")
        cells.append(Cell(_number(one.median_ms), spread, *gained))
    return Column(f"Batch {size}\n(ms)", cells)


def _at(size: int, row: Row) -> Latency | None:
    return next((one for one in row.measurement.latency if one.batch_size == size), None)


def _speed(ratio: float, one: Latency, base: Latency) -> tuple[str, str]:
    return ("no gain", "no faster") if faster(one, base) is None else _against(ratio, "×", "faster", "slower")


def _metric(name: str, comparison: Comparison) -> Column:
    cells = []
    for row in comparison.rows:
        change = row.metric_changes.get(name) if row.name != comparison.baseline else None
        value = f"{row.metrics[name]:.4g}" if name in row.metrics else _UNKNOWN
        shown = "" if change is None else f"{change:+.4g}"
        cells.append(Cell(value, "", shown, shown))
    return Column(name, cells)


def _batch_sizes(rows: Sequence[Row]) -> list[int]:
    return sorted({one.batch_size for row in rows for one in row.measurement.latency})


def _against(ratio: float, sign: str, better: str, worse: str) -> tuple[str, str]:
    if 0.99 <= ratio <= 1.01:
        return "same", "same"
    words = f"{_factor(ratio)}x {better}" if ratio > 1 else f"{_factor(1 / ratio)}x {worse}"
    return f"{sign} {_factor(ratio)}", words


def _factor(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 2 else f"{ratio:.1f}" if ratio < 100 else f"{ratio:,.0f}"


def _number(value: float, *, whole: bool = False) -> str:
    if whole or value == 0:
        return f"{value:,.0f}"
    if not math.isfinite(value):
        return str(value)
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{digits}f}"
