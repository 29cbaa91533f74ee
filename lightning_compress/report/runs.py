"""Two runs beside each other: what the second brought against the first, of the JSON that both wrote."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import replace

from lightning_compress.errors import invalid
from lightning_compress.report.compare import Comparison, compare
from lightning_compress.report.ratios import Row
from lightning_compress.report.verdict import judged

_CLOCK = ("cpu", "cores", "torch")
"""Facts of a machine on which latencies depend."""


def compare_runs(first: Comparison, second: Comparison, names: tuple[str, str] = ("first", "second")) -> Comparison:
    """Compare what two runs ended with: their last models, and the files that they wrote.

    Latencies of two runs weren't measured in turns, so a difference must be larger than their spread to count; where
    the machines differ no speed-up is given.

    Args:
        first: The run that ratios refer to.
        second: The other one.
        names: Of the two, for the rows.

    Returns:
        A comparison as any other, with what differs between the settings.

    Raises:
        CompressionError: both have the same name.
    """
    if names[0] == names[1]:
        raise invalid("names", "be two different ones", names)
    runs = dict(zip(names, (first, second), strict=True))
    found = {name: row for run, comparison in runs.items() for name, row in _ends(run, comparison)}
    other = [fact for fact in _CLOCK if first.machine.get(fact) != second.machine.get(fact)]
    notes = [f"{run}: {note}" for run, comparison in runs.items() for note in comparison.notes]
    if other:
        notes.insert(0, f"The runs were measured with another {' and '.join(other)}: no speed-up is given.")
    sensitivity = second.sensitivity or first.sensitivity
    compared = compare(
        {name: row.measurement for name, row in found.items()},
        metrics={name: row.metrics for name, row in found.items()},
        origins={name: row.origins for name, row in found.items()},
        settings=_difference(first.settings, second.settings, names),
    )
    rows = tuple(replace(row, speedup={}, speedup_range={}) for row in compared.rows) if other else compared.rows
    machine = second.machine
    return replace(compared, rows=rows, notes=tuple(notes), machine=machine, sensitivity=sensitivity)


def _ends(run: str, comparison: Comparison) -> Iterator[tuple[str, Row]]:
    last = judged(comparison.rows, comparison.baseline) or comparison[comparison.baseline]
    yield run, last
    for row in comparison.rows:
        if row.measurement.file is not None and row is not last:
            yield f"{run}: {row.name}", row


def _difference(first: str, second: str, names: tuple[str, str]) -> str:
    """Return both settings with the lines marked in which they differ."""
    lines = difflib.unified_diff(first.splitlines(), second.splitlines(), *names, lineterm="", n=1000)
    return "\n".join(lines) or second
