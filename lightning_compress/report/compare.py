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

from lightning_compress.errors import CompressionError, invalid, nearest
from lightning_compress.report.latency import speedup_range
from lightning_compress.report.measure import Measurement
from lightning_compress.report.notes import busy_notes, row_notes

if TYPE_CHECKING:
    from rich.table import Table

VERSION = 2


@dataclass(frozen=True)
class Row:
    """One model in a comparison. Ratios are baseline / this model: 2.0 is half the size, or twice as fast.

    A ratio is None where one side wasn't measured. ``speedup`` is by batch size, and ``speedup_range`` its middle half
    over the rounds in which both took turns (for rows that were timed one after the other, how far apart the middle
    halves of their times may lie): where that holds 1, no difference was measurable. ``metric_changes`` are this
    model's metric minus the baseline's; ``origins`` say how a metric was measured.
    """

    name: str
    measurement: Measurement
    metrics: dict[str, float]
    parameters_ratio: float | None
    size_ratio: float | None
    macs_ratio: float | None
    speedup: dict[int, float]
    speedup_range: dict[int, tuple[float, float]]
    metric_changes: dict[str, float]
    origins: dict[str, str]


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
            {
                **asdict(row),
                "measurement": row.measurement.as_dict(),
                "speedup": {str(size): ratio for size, ratio in row.speedup.items()},
                "speedup_range": {str(size): list(ratios) for size, ratios in row.speedup_range.items()},
            }
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
        except CompressionError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise invalid("text", "be the JSON of a report", text[:80], f"({type(error).__name__}: {error})") from error


def compare(
    measurements: Mapping[str, Measurement],
    *,
    baseline: str | None = None,
    metrics: Mapping[str, Mapping[str, float]] | None = None,
    notes: Sequence[str] = (),
    origins: Mapping[str, Mapping[str, str]] | None = None,
) -> Comparison:
    """Compare measured models with one of them.

    Args:
        measurements: The rows, in order: name to measurement.
        baseline: The row that ratios refer to; the first by default.
        metrics: Row name to metric name to value, such as ``{"student": {"test_acc": 0.98}}``.
        notes: Sentences to print after those that are made here.
        origins: Row name to metric name to how it was measured, such as ``{"student": {"test_acc": "test"}}``.

    Returns:
        Rows with ratios, and notes. A note says so where a row is no smaller, not measurably faster or not comparable
        with the baseline. Time models in turns (`measure_in_turns`), or what slowed the machine for one of them counts.

    Raises:
        CompressionError: there are no measurements, or ``baseline`` or a key of ``metrics`` or ``origins`` is none.

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
        _row(
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
    made = [note for row in rows if row is not base for note in row_notes(row, base)]
    return Comparison(rows, chosen, tuple(dict.fromkeys([*made, *busy_notes(rows), *notes])), machine_facts())


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
    name: str,
    measurement: Measurement,
    metrics: Mapping[str, float],
    origins: Mapping[str, str],
    base: Measurement,
    base_metrics: Mapping[str, float],
) -> Row:
    # Two lower bounds have no ratio.
    exact = not measurement.uncounted and not base.uncounted
    before = {latency.batch_size: latency for latency in base.latency if measurement.device == base.device}
    found = {
        latency.batch_size: speedup_range(latency, before[latency.batch_size])
        for latency in measurement.latency
        if latency.batch_size in before
    }
    speedups = {size: ratios for size, ratios in found.items() if ratios is not None}
    return Row(
        name=name,
        measurement=measurement,
        metrics=dict(metrics),
        parameters_ratio=_ratio(base.parameters, measurement.parameters),
        size_ratio=_ratio(base.size_bytes, measurement.size_bytes),
        macs_ratio=_ratio(base.macs, measurement.macs) if exact else None,
        speedup={size: median for size, (_, median, _) in speedups.items()},
        speedup_range={size: (lower, upper) for size, (lower, _, upper) in speedups.items()},
        metric_changes={key: value - base_metrics[key] for key, value in metrics.items() if key in base_metrics},
        origins={key: origin for key, origin in origins.items() if key in metrics},
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
            "speedup_range": {int(size): (lower, upper) for size, (lower, upper) in plain["speedup_range"].items()},
        }
    )


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
