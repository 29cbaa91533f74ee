"""Measures the accuracy of the digits' models over five folds, with paired differences and their 95 % t-intervals.

Every image is tested once: by the models that were trained without its fold. Differences are taken fold by fold,
between models that saw the same images. The folds' training sets overlap, so the intervals are somewhat too narrow.

Run it with `python benchmarks/digits_cross_validation.py` (some minutes; `--epochs 1` for a quick look).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from scipy.stats import t as student_t

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "digits"))  # the examples are no package

import digits_fits
from data import FOLDS, Digits
from networks import Classifier

from lightning_compress.report.measure import measure

TEACHER, ALONE = "teacher", "student alone"


def run_fold(fold: int, teacher_epochs: int, student_epochs: int) -> tuple[dict[str, float], dict[str, int]]:
    """Test accuracy, and bytes of the saved weights, of each model on one fold."""
    L.seed_everything(fold, verbose=False)
    data = Digits(fold)
    teacher = digits_fits.train_teacher(data, teacher_epochs)
    alone = digits_fits.train_alone(data, student_epochs)
    distilled = digits_fits.distil(teacher.network, data, student_epochs)
    with tempfile.TemporaryDirectory() as folder:
        callbacks = (
            *digits_fits.compression(),
            ModelCheckpoint(folder, filename="last", save_on_train_epoch_end=True, enable_version_counter=False),
        )
        int8 = digits_fits.distil(teacher.network, data, student_epochs, callbacks)
        pruned = Classifier(digits_fits.float_form(Path(folder) / "last.ckpt"))
    models = {
        TEACHER: (teacher, teacher.network),
        ALONE: (alone, alone.network),
        "distilled": (distilled, distilled.student),
        "distilled, pruned": (pruned, pruned.network),
        "distilled, pruned, int8": (int8, int8.student),
    }
    accuracy = {name: digits_fits.test(model, data)["test_acc"] for name, (model, _) in models.items()}
    size = {name: measure(network).size_bytes for name, (_, network) in models.items()}
    return accuracy, size


def interval(differences: list[float]) -> str:
    """Mean difference in points, and the 95 % t-interval of that mean."""
    points = [100 * difference for difference in differences]
    mean, error = statistics.fmean(points), statistics.stdev(points) / len(points) ** 0.5
    half = float(student_t.ppf(0.975, len(points) - 1)) * error
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"


def table(folds: list[dict[str, float]], sizes: dict[str, int]) -> str:
    lines = [
        "| Model | Accuracy by fold (%) | Mean (%) | To the teacher (points) | To the student alone | Size (KB) |",
        "|:--|:--|--:|--:|--:|--:|",
    ]
    for name in folds[0]:
        values = [fold[name] for fold in folds]
        by_fold = " ".join(f"{100 * value:.1f}" for value in values)
        against = [
            "" if name == other else interval([value - fold[other] for value, fold in zip(values, folds, strict=True)])
            for other in (TEACHER, ALONE)
        ]
        size = sizes[name] / 1e3
        lines.append(
            f"| {name} | {by_fold} | {100 * statistics.fmean(values):.2f} | {' | '.join(against)} | {size:,.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Five-fold cross-validation of the digits' models.")
    parser.add_argument("--epochs", type=int, help="for every model; fewer than by default is a quick look")
    epochs = parser.parse_args().epochs
    digits_fits.quiet()
    torch.set_num_threads(1)

    folds, sizes = [], {}
    for fold in range(FOLDS):
        started = time.perf_counter()
        accuracy, sizes = run_fold(fold, epochs or digits_fits.TEACHER_EPOCHS, epochs or digits_fits.STUDENT_EPOCHS)
        folds.append(accuracy)
        print(f"fold {fold + 1} of {FOLDS}: {time.perf_counter() - started:.0f} s", flush=True)
    print(f"\n{table(folds, sizes)}")


if __name__ == "__main__":
    main()
