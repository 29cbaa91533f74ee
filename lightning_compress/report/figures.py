"""The figures of a comparison under plain names: for CSV, loggers, and readers who want them unrounded."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from lightning_compress.report.ratios import Row


def figures_of(row: Row) -> dict[str, float]:
    """Return what was measured of a row, by name with unit and batch size; what wasn't measured is left out."""
    measured = row.measurement
    found: dict[str, float | None] = {
        "parameters": measured.parameters,
        "nonzeros": measured.nonzeros,
        "sparsity": measured.sparsity,
        "size_bytes": measured.size_bytes,
        "compressed_bytes": measured.compressed_bytes,
        "macs": measured.macs,
        "parameters_ratio": row.parameters_ratio,
        "size_ratio": row.size_ratio,
        "macs_ratio": row.macs_ratio,
    }
    for timed in measured.latency:
        size = timed.batch_size
        found |= {f"latency_ms/batch_{size}": timed.median_ms, f"speedup/batch_{size}": row.speedup.get(size)}
    if measured.quantized is not None:
        agreement = {"cosine": measured.quantized.cosine, "same_class": measured.quantized.same_class}
        found |= {f"agreement/{name}": value for name, value in agreement.items()}
    found |= {f"metric/{name}": value for name, value in row.metrics.items()}
    return {name: value for name, value in found.items() if value is not None}


def csv_text(rows: Sequence[Row]) -> str:
    """Return the figures as CSV, a line for each row, empty where something wasn't measured."""
    figures = {row.name: figures_of(row) for row in rows}
    names = dict.fromkeys(name for found in figures.values() for name in found)
    text = io.StringIO()
    writer = csv.DictWriter(text, ["model", *names], lineterminator="\n")
    writer.writeheader()
    writer.writerows({"model": name, **found} for name, found in figures.items())
    return text.getvalue()
