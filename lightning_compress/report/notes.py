"""What did a compression not bring, and why? Sentences in plain words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lightning_compress.report.measure import Measurement
from lightning_compress.report.ratios import Row

# Below one per cent a difference in file size is names and padding.
_SAME_SIZE = 0.01
_ZEROS_ARE_DENSE = "zeros in dense kernels are multiplied like any other number"
# Middle halves wider than this fraction of the median are the machine's other work, not the model's; so are waits.
_BUSY, _WAITED = 0.5, 0.2


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
