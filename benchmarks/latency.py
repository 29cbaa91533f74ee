"""Times teacher, student and their int8 forms alternately in one process, as ratios to the teacher.

The models take turns, round after round, and each ratio is taken within a round: a busy moment of the machine falls
on all of them. Weights are untrained, since no kernel here depends on their values: the pruned student shows that
zeros are as slow as other numbers.

Run it with `python benchmarks/latency.py` (about half a minute; `--rounds 2` for a quick look).
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "digits"))  # the examples are no package

from digits_fits import quiet
from networks import Student, Teacher

from lightning_compress import prune_, quantize

BATCH_SIZES = (1, 32)
CALLS = 50


def build() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    calibration = [torch.randn(64, 1, 8, 8) for _ in range(4)]
    teacher, student, pruned = Teacher().eval(), Student().eval(), Student().eval()
    prune_(pruned, sparsity=0.5)
    return {
        "teacher": teacher,
        "teacher, int8": quantize(teacher, "int8_static", calibration=calibration),
        "student": student,
        "student, half of it zeros": pruned,
        "student, int8": quantize(student, "int8_static", calibration=calibration),
    }


def time_calls(model: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """Median milliseconds of one call."""
    for _ in range(5):
        model(images)
    times = []
    for _ in range(CALLS):
        started = time.perf_counter()
        model(images)
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)


def measure_in_turns(models: dict[str, nn.Module], batch_size: int, rounds: int) -> dict[str, list[float]]:
    images = torch.randn(batch_size, 1, 8, 8)
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for _ in range(rounds):
            for name, model in models.items():
                times[name].append(time_calls(model, images))
    return times


def table(times: dict[str, list[float]], batch_size: int) -> str:
    lines = [
        f"| Batch {batch_size} | Median (ms) | Faster than the teacher | Middle half of the rounds |",
        "|:--|--:|--:|--:|",
    ]
    for name, values in times.items():
        ratios = [base / value for base, value in zip(times["teacher"], values, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        lines.append(f"| {name} | {statistics.median(values):.3f} | {middle:.2f}x | {low:.2f}x to {high:.2f}x |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Latency of the digits' models, in turns.")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    quiet()
    torch.set_num_threads(arguments.threads)
    gc.disable()

    models = build()
    print(f"{arguments.rounds} rounds of {CALLS} calls, {arguments.threads} thread(s)")
    for batch_size in BATCH_SIZES:
        print(f"\n{table(measure_in_turns(models, batch_size, arguments.rounds), batch_size)}", flush=True)


if __name__ == "__main__":
    main()
