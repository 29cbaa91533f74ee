"""Says in plain words what a compression did not bring, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lightning_compress.report.latency import Latency
from lightning_compress.report.measure import Measurement

# Below one per cent a difference in file size is names and padding.
_SAME_SIZE = 0.01
_ZEROS_ARE_DENSE = "zeros in dense kernels are multiplied like any other number"


# Middle halves wider than this fraction of the median are the machine's other work, not the model's.
_BUSY = 0.5


def busy_notes(names: Mapping[str, Measurement]) -> Iterator[str]:
    """Yield a sentence that names the rows whose latency varied too much to be trusted."""
    for name, one in names.items():
        sizes = [str(at.batch_size) for at in one.latency if at.upper_ms - at.lower_ms > _BUSY * at.median_ms]
        if sizes:
            at_batch = f"{name}: latency at batch {' and '.join(sizes)}"
            yield (
                f"{at_batch} varied by more than {_BUSY:.0%}: the machine was busy. "
                f"Measure again{'' if one.threads == 1 else ', perhaps with threads=1'}."
            )


def row_notes(name: str, one: Measurement, baseline: str, base: Measurement) -> Iterator[str]:
    """Yield a sentence for each thing in which ``one`` is no better than the baseline."""
    yield from _size_notes(name, one, baseline, base)
    if one.uncounted:
        yield f"{name}: the MACs are a lower bound, not counted: {', '.join(one.uncounted)}."
    if not one.latency or not base.latency:
        return
    if one.device != base.device:
        yield f"{name}: measured on {one.device}, {baseline} on {base.device}: no speed-up is given."
        return
    if one.threads != base.threads:
        yield f"{name}: measured with {one.threads} threads, {baseline} with {base.threads}."
    yield from _speed_notes(name, one, baseline, base)


def faster(one: Latency, base: Latency) -> bool | None:
    """Say whether ``one`` is faster (True) or slower (False), None where their middle halves overlap.

    Example:
        >>> faster(Latency(1, 1.0, 0.9, 1.1, 50), Latency(1, 2.0, 1.9, 2.1, 50))
        True
        >>> faster(Latency(1, 1.9, 1.8, 2.0, 50), Latency(1, 2.0, 1.9, 2.1, 50)) is None
        True
    """
    if one.upper_ms < base.lower_ms:
        return True
    return False if one.lower_ms > base.upper_ms else None


def _size_notes(name: str, one: Measurement, baseline: str, base: Measurement) -> Iterator[str]:
    if one.size_bytes <= base.size_bytes * (1 - _SAME_SIZE):
        return
    larger = one.size_bytes > base.size_bytes * (1 + _SAME_SIZE)
    note = f"{name}: {'larger' if larger else 'no smaller'} on disk than {baseline}"
    if one.sparsity > base.sparsity + _SAME_SIZE:
        note += f": {one.sparsity:.1%} of its parameters are zero, but a zero is stored like any other number"
        if one.compressed_bytes and base.compressed_bytes:
            note += f" (a compressed file is {base.compressed_bytes / one.compressed_bytes:.1f}x smaller)"
    yield note + "."


def _speed_notes(name: str, one: Measurement, baseline: str, base: Measurement) -> Iterator[str]:
    before = {latency.batch_size: latency for latency in base.latency}
    verdicts = {
        latency.batch_size: faster(latency, before[latency.batch_size])
        for latency in one.latency
        if latency.batch_size in before
    }
    for verdict, words in ((None, "no faster than"), (False, "slower than")):
        sizes = [str(size) for size, found in verdicts.items() if found is verdict]
        if sizes:
            yield f"{name}: {words} {baseline} at batch {' and '.join(sizes)}{_why(one, base)}."


def _why(one: Measurement, base: Measurement) -> str:
    if one.macs != base.macs or _dtypes(one) != _dtypes(base):
        return ""
    if one.sparsity > base.sparsity + _SAME_SIZE:
        return f": {_ZEROS_ARE_DENSE}"
    return ": it does the same arithmetic"


def _dtypes(measurement: Measurement) -> set[str]:
    return {layer.dtype for layer in measurement.layers}
