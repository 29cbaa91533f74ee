"""Prints what the demo measured: a table with what each step brought, and one sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

from rich import box
from rich.table import Table

from lightning_compress.report import Comparison, Measurement, compare
from lightning_compress.report.ratios import Row

BATCH = 32


def steps_table(comparison: Comparison, in_runtime: Mapping[str, Measurement], pictures: int) -> Table:
    """Show a row for each model; ``in_runtime`` measures its file, and every step is held against the row above it."""
    rows = [comparison[name] for name in in_runtime]
    brought = ["", "", *(step(before, after, in_runtime, pictures) for before, after in pairwise(rows[1:]))]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("Model", no_wrap=True)
    for header in ("Letters\nread (%)", "Size\n(MB)", "In torch\n(ms)", "In onnxruntime\n(ms)"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("What the step brought")
    for row, said in zip(rows, brought, strict=True):
        measured = row.measurement
        table.add_row(
            row.name,
            f"{100 * row.metrics['test_acc']:.1f}",
            f"{measured.size_bytes / 1e6:.2f}",
            f"{measured.latency_ms[BATCH]:.2f}",
            f"{in_runtime[row.name].latency_ms[BATCH]:.2f}",
            said,
        )
    table.caption = (
        f"{pictures:,} pictures tested. Times: {BATCH} at once, on one thread. A step is held against the row above, "
        "its speed in onnxruntime."
    )
    table.caption_justify = "left"
    return table


def step(before: Row, after: Row, in_runtime: Mapping[str, Measurement], pictures: int) -> str:
    """Say what a step brought, times in onnxruntime, and what of it can't be told from noise."""
    pair = compare({row.name: in_runtime[row.name] for row in (before, after)})[after.name]
    said = []
    if (size := before.measurement.size_bytes / after.measurement.size_bytes) > 1.05:
        said.append(f"{size:.1f}x smaller")
        told_apart = pair.is_faster(BATCH) is not None
        said.append(f"{pair.speedup[BATCH]:.1f}x as fast" if told_apart else "no measurable speed")
    points = 100 * (after.metrics["test_acc"] - before.metrics["test_acc"])
    chance = 100 * noise(before.metrics["test_acc"], pictures)
    said.append(f"{points:+.1f} points" + ("" if abs(points) > chance else " (noise)"))
    return ", ".join(said)


def noise(accuracy: float, pictures: int) -> float:
    """Return the largest difference of two accuracies that chance explains, at 95 %."""
    return 1.96 * math.sqrt(2 * accuracy * (1 - accuracy) / pictures)


def verdict(comparison: Comparison, in_runtime: Mapping[str, Measurement], file: str) -> str:
    """Say in one sentence what the file is to the teacher, and to the student that nobody taught."""
    teacher, alone, *_, last = in_runtime
    faster = compare({name: in_runtime[name] for name in (teacher, last)})[last].speedup[BATCH]
    read = {name: f"{100 * comparison[name].metrics['test_acc']:.1f} %" for name in (file, teacher, alone)}
    return (
        f"The int8 file is {comparison[file].size_ratio:.0f} times smaller than the {teacher}, {faster:.0f} times as "
        f"fast where both run in onnxruntime, and reads {read[file]} of the letters; the {teacher} reads "
        f"{read[teacher]}, and the same {alone} {read[alone]}."
    )
