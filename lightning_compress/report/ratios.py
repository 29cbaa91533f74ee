"""How does a model compare with the baseline: how much smaller and faster, and what isn't, in plain words?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightning_compress.report.latency import speedup_range
from lightning_compress.report.measure import Measurement

BEFORE, AFTER, TESTED = "before", "after", "tested"
"""Rows of a Trainer's report."""

# Below one per cent a difference in file size is names and padding.
_SAME_SIZE = 0.01
_ZEROS_ARE_DENSE = "zeros in dense kernels are multiplied like any other number"
# Middle halves wider than this fraction of the median are the machine's other work, not the model's; so are waits.
_BUSY, _WAITED = 0.5, 0.2


@dataclass(frozen=True)
class Row:
    """A model in a comparison. Ratios are baseline / this model: 2.0 is half the size, or twice as fast.

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

    def as_dict(self) -> dict[str, Any]:
        """Return numbers, strings, lists and dicts with string keys only."""
        return {
            **asdict(self),
            "measurement": self.measurement.as_dict(),
            "speedup": {str(size): ratio for size, ratio in self.speedup.items()},
            "speedup_range": {str(size): list(ratios) for size, ratios in self.speedup_range.items()},
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Row:
        """Build the row that `as_dict` described."""
        metrics, changes = (
            {key: math.nan if value is None else value for key, value in plain[name].items()}
            for name in ("metrics", "metric_changes")
        )
        return cls(
            **{
                **plain,
                "measurement": Measurement.from_dict(plain["measurement"]),
                "metrics": metrics,
                "metric_changes": changes,
                "speedup": {int(size): ratio for size, ratio in plain["speedup"].items()},
                "speedup_range": {int(size): (lower, upper) for size, (lower, upper) in plain["speedup_range"].items()},
            }
        )

    def is_faster(self, batch_size: int) -> bool | None:
        """Say whether it is faster than the baseline (True) or slower (False); None if no difference is measurable."""
        lower, upper = self.speedup_range[batch_size]
        return True if lower > 1 else False if upper < 1 else None


def make_row(
    name: str,
    measurement: Measurement,
    metrics: Mapping[str, float],
    origins: Mapping[str, str],
    base: Measurement,
    base_metrics: Mapping[str, float],
) -> Row:
    """Hold a model against the baseline: its measurement, and its metrics with what is known of their origins."""
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


def _ratio(before: int | None, after: int | None) -> float | None:
    return before / after if before and after else None


def busy_notes(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a sentence that names the rows whose latency varied too much to be trusted."""
    for row in rows:
        latency = row.measurement.latency
        sizes = [str(at.batch_size) for at in latency if at.upper_ms - at.lower_ms > _BUSY * at.median_ms]
        if sizes:
            yield (
                f"{row.name}: latency at batch {' and '.join(sizes)} varied by more than {_BUSY:.0%}: the machine was "
                f"busy. Measure again{'' if row.measurement.threads == 1 else ', perhaps with threads=1'}."
            )
    waited = {row.name: max((at.waited for at in row.measurement.latency), default=0.0) for row in rows}
    waiting = [f"{name} {share:.0%}" for name, share in waited.items() if share > _WAITED]
    if waiting:
        yield (
            f"Calls waited for a part of their time ({', '.join(waiting)}): the machine was busy, or the model waits. "
            "Long calls wait more often, so a speed-up may be too large."
        )


def row_notes(row: Row, baseline: Row) -> Iterator[str]:
    """Yield a sentence for each thing in which ``row`` is no better than the baseline."""
    name, measurement, base = row.name, row.measurement, baseline.measurement
    yield from _size_notes(name, measurement, baseline.name, base)
    if measurement.uncounted:
        yield f"{name}: the MACs are a lower bound, not counted: {', '.join(measurement.uncounted)}."
    if not measurement.latency or not base.latency:
        return
    if measurement.device != base.device:
        yield f"{name}: measured on {measurement.device}, {baseline.name} on {base.device}: no speed-up is given."
        return
    if measurement.threads != base.threads:
        yield f"{name}: measured with {measurement.threads} threads, {baseline.name} with {base.threads}."
    yield from _speed_notes(row, baseline)


def _size_notes(name: str, measured: Measurement, baseline: str, base: Measurement) -> Iterator[str]:
    if measured.size_bytes <= base.size_bytes * (1 - _SAME_SIZE):
        return
    larger = measured.size_bytes > base.size_bytes * (1 + _SAME_SIZE)
    note = f"{name}: {'larger' if larger else 'no smaller'} on disk than {baseline}"
    if measured.sparsity > base.sparsity + _SAME_SIZE:
        note += f": {measured.sparsity:.1%} of its parameters are zero, but a zero is stored like any other number"
        if measured.compressed_bytes and (base.compressed_bytes or 0) > measured.compressed_bytes * (1 + _SAME_SIZE):
            note += f" (a compressed file is {(base.compressed_bytes or 0) / measured.compressed_bytes:.1f}x smaller)"
    yield note + "."


def _speed_notes(row: Row, baseline: Row) -> Iterator[str]:
    verdicts = {size: row.is_faster(size) for size in row.speedup_range}
    for verdict, words in ((None, "no measurable difference in speed to"), (False, "slower than")):
        sizes = [str(size) for size, found in verdicts.items() if found is verdict]
        if sizes:
            why = _why(row.measurement, baseline.measurement)
            yield f"{row.name}: {words} {baseline.name} at batch {' and '.join(sizes)}{why}."


def _why(measured: Measurement, base: Measurement) -> str:
    if measured.macs is None or measured.uncounted or measured.macs != base.macs or _dtypes(measured) != _dtypes(base):
        return ""
    if measured.sparsity > base.sparsity + _SAME_SIZE:
        return f": {_ZEROS_ARE_DENSE}"
    return ": it does the same arithmetic"


def _dtypes(measurement: Measurement) -> set[str]:
    return {layer.dtype for layer in measurement.layers}
