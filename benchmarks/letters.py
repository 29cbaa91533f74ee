"""Measures what each step of the demo brings in accuracy, over seeds: one teacher, and students of five seeds.

The pictures are those of the demo. A seed decides the weights that a student begins with; steps are compared within a
seed, with the 95 % t-interval of their mean.

Run it with `python benchmarks/letters.py` (twelve minutes of CPU time; `--epochs 1 --seeds 2` for a quick look).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from itertools import pairwise
from pathlib import Path

import lightning as L
from scipy.stats import t as student_t

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "letters"))  # the examples are no package

import demo

from lightning_compress import QuantizationAwareTraining


def interval(points: list[float]) -> str:
    """Mean, and the 95 % t-interval of that mean."""
    half = float(student_t.ppf(0.975, len(points) - 1)) * statistics.stdev(points) / len(points) ** 0.5
    mean = statistics.fmean(points)
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description="What each step of the demo brings, over seeds.")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int)
    arguments = parser.parse_args()
    demo.quiet()
    data = demo.Letters()
    epochs = demo.Epochs() if arguments.epochs is None else demo.Epochs(*[arguments.epochs] * 3)
    L.seed_everything(0, verbose=False)
    teacher = demo.fit(demo.Teacher(), data, epochs.whole, demo.TEACHER)
    found: dict[str, list[float]] = {name: [] for name in demo.MODELS[1:]}
    for seed in range(arguments.seeds):
        L.seed_everything(seed, verbose=False)
        students = demo.train_students(teacher, data, epochs, QuantizationAwareTraining())
        for name, network in students.items():
            found[name].append(100 * demo.accuracy(network, data))
    print("| Model | Accuracy by seed (%) | Mean (%) | To the row above (points) |\n|:--|:--|--:|--:|")
    print(f"| {demo.TEACHER} | | {100 * demo.accuracy(teacher, data):.2f} | |")
    above = {after: before for before, after in pairwise(found)}
    for name, values in found.items():
        base = found.get(above.get(name, ""), [])
        to_base = interval([value - other for value, other in zip(values, base, strict=True)]) if base else ""
        by_seed = " ".join(f"{value:.1f}" for value in values)
        print(f"| {name} | {by_seed} | {statistics.fmean(values):.2f} | {to_base} |")


if __name__ == "__main__":
    main()
