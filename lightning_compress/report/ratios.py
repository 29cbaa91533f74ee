"""How does a model compare with the baseline: how much smaller, how much faster?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lightning_compress.report.latency import speedup_range
from lightning_compress.report.measure import Measurement


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
