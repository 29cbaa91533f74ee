"""Which metric speaks for a comparison, which way is better, and which models nothing else beats."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lightning_compress.report.ratios import Row
from lightning_compress.report.render import shown_metrics

LARGEST = 1e30
"""Beyond it float arithmetic of a picture ends."""

# Long words count wherever they stand, short ones as a word of their own: `val_acc`, and no `acc` in `vaccine`.
_MORE = ("accuracy", "precision", "recall", "auroc", "f1score", "jaccard", "dice", "agreement")
_MORE_SHORT = {"acc", "f", "auc", "iou", "miou", "map", "ap", "bleu", "rouge", "psnr", "ssim", "r", "kappa", "top"}
_LESS = ("loss", "error", "perplexity", "rmse")
_LESS_SHORT = {"err", "mse", "mae", "ppl", "wer", "cer", "fid", "nll"}


def more_is_better(metric: str) -> bool | None:
    """Tell by its name whether more of a metric is better (True) or less (False); None where the name doesn't say.

    Example:
        >>> [more_is_better(name) for name in ("test_acc1", "val_loss", "accuracy_error", "layer2")]
        [True, False, False, None]
    """
    name = metric.lower()
    words = {word.rstrip("0123456789") for word in re.split("[^a-z0-9]+", name)}
    if any(word in name for word in _LESS) or words & _LESS_SHORT:
        return False
    return True if any(word in name for word in _MORE) or words & _MORE_SHORT else None


def chosen_metric(rows: Sequence[Row]) -> str | None:
    """Return the metric of most rows, an accuracy first; None where there is none that can be drawn."""
    counts = {name: sum(drawable(row.metrics.get(name)) for row in rows) for name in shown_metrics(rows)}
    shown = [name for name, count in counts.items() if count]
    # That of most rows, as a single value compares nothing; among those an accuracy, as it says most.
    return max(shown, key=lambda name: (counts[name], "acc" in name.lower()), default=None)


def drawable(value: float | None) -> bool:
    """Tell whether a value has a place on an axis."""
    return value is not None and abs(value) <= LARGEST


def fastest(row: Row) -> float | None:
    """Return the latency of the smallest batch in milliseconds; None where there is none."""
    latency = row.measurement.latency
    return min(latency, key=lambda timed: timed.batch_size).median_ms if latency else None


def on_front(points: Sequence[tuple[float, float]], more: bool) -> list[bool]:
    """Tell of each point (cost, metric) whether no other costs as little and is as good, and is better in one of both.

    Example:
        >>> on_front([(4.0, 0.9), (1.0, 0.8), (2.0, 0.7)], more=True)
        [True, True, False]
    """
    signed = [(cost, metric if more else -metric) for cost, metric in points]
    return [
        not any(other[0] <= point[0] and other[1] >= point[1] and other != point for other in signed)
        for point in signed
    ]
