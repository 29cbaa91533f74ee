"""`compare`: measurements side by side, with ratios against one of them and a plain word where nothing was gained."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from lightning_compress.errors import invalid, nearest
from lightning_compress.report.measure import Measurement
from lightning_compress.report.notes import busy_notes, row_notes

if TYPE_CHECKING:
    from rich.table import Table

VERSION = 1


@dataclass(frozen=True)
class Row:
    """One model in a comparison. Ratios are baseline / this model: 2.0 is half the size, or twice as fast.

    A ratio is None where one side wasn't measured. ``metric_changes`` are this model's metric minus the baseline's.
    """

    name: str
    measurement: Measurement
    metrics: dict[str, float]
    parameters_ratio: float | None
    size_ratio: float | None
    macs_ratio: float | None
    speedup: dict[int, float]
    metric_changes: dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """Measured models side by side, as plain data; printed by `to_table`, `to_markdown` and `to_json`."""

    rows: tuple[Row, ...]
    baseline: str
    notes: tuple[str, ...]
    machine: dict[str, Any]

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise invalid("name", "be a row of the comparison", name, nearest(name, [row.name for row in self.rows]))

    def to_table(self) -> Table:
        """Return the comparison as a ``rich`` table for the terminal."""
        from lightning_compress.report.render import table

        return table(self)

    def to_markdown(self) -> str:
        """Return the comparison as a Markdown page: table, notes, machine."""
        from lightning_compress.report.render import markdown

        return markdown(self)

    def as_dict(self) -> dict[str, Any]:
        """Return numbers, strings, lists and dicts with string keys only."""
        rows = [
            {**asdict(row), "measurement": row.measurement.as_dict(), "speedup": _keys_to(str, row.speedup)}
            for row in self.rows
        ]
        return {
            "version": VERSION,
            "baseline": self.baseline,
            "rows": rows,
            "notes": list(self.notes),
            "machine": self.machine,
        }

    def to_json(self) -> str:
        """Return the comparison as JSON text that `from_json` reads. A metric that isn't finite becomes null."""
        return json.dumps(_finite(self.as_dict()), indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Comparison:
        """Read what `to_json` wrote.

        Raises:
            CompressionError: the text is no report, or one of a later version of the package.
        """
        try:
            plain = json.loads(text)
            if plain["version"] != VERSION:
                raise invalid("text", f"be a report of version {VERSION}", plain["version"], "Measure again.")
            rows = tuple(_row_from(one) for one in plain["rows"])
            return cls(rows, plain["baseline"], tuple(plain["notes"]), plain["machine"])
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise invalid("text", "be the JSON of a report", text[:80], f"({type(error).__name__}: {error})") from error


def compare(
    measurements: Mapping[str, Measurement],
    *,
    baseline: str | None = None,
    metrics: Mapping[str, Mapping[str, float]] | None = None,
    notes: Sequence[str] = (),
) -> Comparison:
    """Compare measured models with one of them.

    Args:
        measurements: The rows, in order: name to measurement.
        baseline: The row that ratios refer to; the first by default.
        metrics: Row name to metric name to value, such as ``{"student": {"test_acc": 0.98}}``.
        notes: Sentences to print before those that are made here.

    Returns:
        Rows with ratios, and notes. A note says so where a row is no smaller, no faster (a difference that lies within
        the spread of the runs is none) or not comparable with the baseline.

    Raises:
        CompressionError: there are no measurements, or ``baseline`` or a key of ``metrics`` is none of them.

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
    metrics = metrics or {}
    for argument, names in (("baseline", [chosen]), ("metrics", list(metrics))):
        for name in names:
            if name not in measurements:
                raise invalid(argument, "name a row of `measurements`", name, nearest(name, measurements))
    base, base_metrics = measurements[chosen], metrics.get(chosen, {})
    rows = tuple(_row(name, one, dict(metrics.get(name, {})), base, base_metrics) for name, one in measurements.items())
    made = [note for row in rows if row.name != chosen for note in row_notes(row.name, row.measurement, chosen, base)]
    return Comparison(rows, chosen, tuple(dict.fromkeys([*notes, *made, *busy_notes(measurements)])), machine_facts())


def machine_facts() -> dict[str, Any]:
    """Return what a latency depends on: processor, cores, threads, system and versions. No names of hosts or files.

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
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as facts:
            names = [line.partition(":")[2].strip() for line in facts if line.startswith("model name")]
    except OSError:
        names = []
    return (names[0] if names else platform.processor()) or "unknown"


def _row(
    name: str, one: Measurement, metrics: dict[str, float], base: Measurement, base_metrics: Mapping[str, float]
) -> Row:
    # Two lower bounds have no ratio.
    exact = not one.uncounted and not base.uncounted
    same_device = one.device == base.device
    speedup = {
        size: base.latency_ms[size] / median
        for size, median in one.latency_ms.items()
        if same_device and size in base.latency_ms
    }
    return Row(
        name=name,
        measurement=one,
        metrics=metrics,
        parameters_ratio=_ratio(base.parameters, one.parameters),
        size_ratio=_ratio(base.size_bytes, one.size_bytes),
        macs_ratio=_ratio(base.macs, one.macs) if exact else None,
        speedup=speedup,
        metric_changes={key: value - base_metrics[key] for key, value in metrics.items() if key in base_metrics},
    )


def _ratio(base: int | None, one: int | None) -> float | None:
    return base / one if base and one else None


def _row_from(plain: Mapping[str, Any]) -> Row:
    return Row(
        **{
            **plain,
            "measurement": Measurement.from_dict(plain["measurement"]),
            "metrics": {key: math.nan if value is None else value for key, value in plain["metrics"].items()},
            "metric_changes": {
                key: math.nan if value is None else value for key, value in plain["metric_changes"].items()
            },
            "speedup": {int(size): ratio for size, ratio in plain["speedup"].items()},
        }
    )


def _keys_to(kind: type, plain: Mapping[Any, Any]) -> dict[Any, Any]:
    return {kind(key): value for key, value in plain.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
