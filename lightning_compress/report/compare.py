"""What did a compression bring? Measured models side by side, with ratios against one of them."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_compress.errors import CompressionError, invalid, nearest
from lightning_compress.report.facts import Sensitivity, listed
from lightning_compress.report.figures import csv_text
from lightning_compress.report.html import page
from lightning_compress.report.measure import Measurement
from lightning_compress.report.ratios import Row, busy_notes, make_row, row_notes
from lightning_compress.report.render import markdown, table

if TYPE_CHECKING:
    from rich.table import Table

VERSION = 3
"""Of the JSON. It changes whenever an entry is added, renamed or removed."""
_PACKAGES = ("lightning_compress", "lightning", "torchao", "onnx", "onnxruntime", "openvino", "executorch")


@dataclass(frozen=True)
class Comparison:
    """Measured models side by side, as plain data; `to_html` and the other methods show it.

    ``settings`` are those of the run as YAML, empty where they aren't known; ``sensitivity`` is None where no table was
    given.
    """

    rows: tuple[Row, ...]
    baseline: str
    notes: tuple[str, ...]
    machine: dict[str, Any]
    settings: str = ""
    sensitivity: Sensitivity | None = None

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise invalid("name", "be a row of the comparison", name, nearest(name, [row.name for row in self.rows]))

    def to_table(self) -> Table:
        """Return the comparison as a ``rich`` table for the terminal."""
        return table(self.rows, self.baseline)

    def to_markdown(self) -> str:
        """Return the comparison as a Markdown page: table, notes, machine."""
        return markdown(self.rows, self.baseline, self.notes, self.machine)

    def to_html(self) -> str:
        """Return the comparison as a page of its own: no scripts, and nothing that is loaded from elsewhere."""
        return page(self.rows, self.baseline, self.notes, self.machine, self.settings, self.sensitivity)

    def to_csv(self) -> str:
        """Return the figures as CSV: a line for each row."""
        return csv_text(self.rows)

    def as_dict(self) -> dict[str, Any]:
        """Return numbers, strings, lists and dicts with string keys only."""
        return {
            "version": VERSION,
            "baseline": self.baseline,
            "rows": [row.as_dict() for row in self.rows],
            "notes": list(self.notes),
            "machine": self.machine,
            "settings": self.settings,
            "sensitivity": None if self.sensitivity is None else listed(asdict(self.sensitivity)),
        }

    def to_json(self) -> str:
        """Return the comparison as JSON text that `from_json` reads. A metric that isn't finite becomes null."""
        return json.dumps(_finite(self.as_dict()), indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Comparison:
        """Read what `to_json` wrote.

        Raises:
            CompressionError: the text is no report, or one of another version.
        """
        try:
            plain = json.loads(text)
            if (version := plain["version"]) != VERSION:
                newer = isinstance(version, int) and version > VERSION
                remedy = "Update lightning_compress." if newer else "An older package wrote it: measure again."
                raise invalid("text", f"be a report of version {VERSION}", version, remedy)
            rows = tuple(Row.from_dict(row) for row in plain["rows"])
            table = plain["sensitivity"]
            sensitivity = None if table is None else Sensitivity.from_dict(table)
            notes, machine = tuple(plain["notes"]), plain["machine"]
            return cls(rows, plain["baseline"], notes, machine, plain["settings"], sensitivity)
        except CompressionError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise invalid("text", "be the JSON of a report", text[:80], f"({type(error).__name__}: {error})") from error


def compare(
    measurements: Mapping[str, Measurement],
    *,
    baseline: str | None = None,
    metrics: Mapping[str, Mapping[str, float]] | None = None,
    notes: Sequence[str] = (),
    origins: Mapping[str, Mapping[str, str]] | None = None,
    settings: str = "",
    sensitivity: str | Path | None = None,
) -> Comparison:
    """Compare measured models with one of them.

    Args:
        measurements: The rows, in order: name to measurement.
        baseline: The row that ratios refer to; the first by default.
        metrics: Row name to metric name to value, such as ``{"student": {"test_acc": 0.98}}``.
        notes: Sentences to print after those that follow from the measurements.
        origins: Row name to metric name to how it was measured, such as ``{"student": {"test_acc": "test"}}``.
        settings: How the models were made, as YAML.
        sensitivity: Path of a table of sensitivities, as JSON, to show beside the layers.

    Returns:
        Rows with ratios, and notes. A note says so where a row is no smaller, not measurably faster or not comparable
        with the baseline. Time models in turns (`measure_in_turns`), or what slowed the machine for one of them counts.

    Raises:
        CompressionError: there are no measurements, ``baseline`` or a key of ``metrics`` or ``origins`` is none, or
            ``sensitivity`` is no table.

    Example:
        >>> from torch import nn
        >>> from lightning_compress.report import measure
        >>> comparison = compare({"large": measure(nn.Linear(512, 512)), "small": measure(nn.Linear(64, 64))})
        >>> comparison["small"].size_ratio > 10
        True
        >>> round(comparison["small"].parameters_ratio, 1)
        63.1
    """
    if not measurements:
        raise invalid("measurements", "hold at least one row", dict(measurements))
    chosen = next(iter(measurements)) if baseline is None else baseline
    metrics, origins = metrics or {}, origins or {}
    for argument, names in (("baseline", [chosen]), ("metrics", list(metrics)), ("origins", list(origins))):
        for name in names:
            if name not in measurements:
                raise invalid(argument, "name a row of `measurements`", name, nearest(name, measurements))
    rows = tuple(
        make_row(
            name,
            measurement,
            metrics.get(name, {}),
            origins.get(name, {}),
            measurements[chosen],
            metrics.get(chosen, {}),
        )
        for name, measurement in measurements.items()
    )
    base = next(row for row in rows if row.name == chosen)
    found = [note for row in rows if row is not base for note in row_notes(row, base)]
    said = tuple(dict.fromkeys([*found, *busy_notes(rows), *notes]))
    table = None if sensitivity is None else Sensitivity.load(sensitivity)
    return Comparison(rows, chosen, said, machine_facts(), settings, table)


def machine_facts() -> dict[str, Any]:
    """Return what figures depend on: processor, cores, threads, system and versions. No names of hosts or files.

    Example:
        >>> machine_facts()["threads"] == torch.get_num_threads()
        True
    """
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "quantized_engine": torch.backends.quantized.engine,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as facts:
            names = [line.partition(":")[2].strip() for line in facts if line.startswith("model name")]
    except OSError:
        names = []
    return (names[0] if names else platform.processor()) or "unknown"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
