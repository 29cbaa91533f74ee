"""Measures what distillation gains on five folds of real digits: the experiment of PyTorch's tutorial, with intervals.

A deep CNN learns from all training images of a fold. A light one learns from 200, 1,000 or all of them, alone or taught
by the deep one, always in the same number of steps. All students of a fold start from the same weights and see the
same labelled images in the same order. Differences are taken fold by fold, after averaging over runs; the folds'
training sets overlap, so the 95 % t-intervals are somewhat too narrow.

Run it with `python benchmarks/distillation_quality.py > tables.md` (about half an hour; for a quick look
`--folds 2 --runs 1 --epochs 2`). Progress, with the accuracy of every single fit, goes to stderr.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import NamedTuple

import lightning as L
import torch
from scipy.stats import t as student_t
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold, train_test_split
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, RandomSampler, Sampler, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "digits"))  # the examples are no package

import digits_fits
from data import FOLDS
from networks import Classifier, conv_bn

from lightning_compress import (
    DIST,
    DKD,
    AttentionTransfer,
    DistillationModule,
    FeatureCosine,
    FeatureMSE,
    LogitMSE,
    RelationalAngle,
    RelationalDistance,
    SimilarityPreserving,
    SoftTarget,
)
from lightning_compress.distillation.losses.base import DistillationLoss

RUNS = {200: 2, 1000: 1, None: 1}
"""Runs of every fit by the number of labels; the fewer images, the more it matters which. None: all images."""
TEACHER_EPOCHS, EPOCHS, STEPS, BATCH = 30, 20, 30, 32
"""An epoch is so many steps, not a pass over the images: 600 steps for every student, however few its images."""
TEACHER_LR, LR = 3e-3, 1e-2


class Network(nn.Module):
    """The tutorial's form: two blocks of convolutions, each of which ends in a pooling, and a perceptron.

    BatchNorm isn't the tutorial's: the student alone learns better with it.
    """

    def __init__(self, first: tuple[int, ...], second: tuple[int, ...], hidden: int) -> None:
        super().__init__()
        self.features = nn.Sequential(block(1, *first), block(first[-1], *second))
        self.classifier = nn.Sequential(
            nn.Linear(4 * second[-1], hidden), nn.ReLU(), nn.Dropout(0.1), nn.Linear(hidden, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


def block(*channels: int) -> nn.Sequential:
    layers = [layer for pair in pairwise(channels) for layer in (*conv_bn(*pair), nn.ReLU())]
    return nn.Sequential(*layers, nn.MaxPool2d(2))


Deep = partial(Network, (32, 16), (16, 16), 64)
Light = partial(Network, (8,), (8,), 32)


class Batches(Sampler[Tensor]):
    """The indices of an epoch's batches: each has as many of every pool, in an order of the pool's own."""

    def __init__(self, *pools: Tensor, seed: int) -> None:
        self.pools = [(pool, torch.Generator().manual_seed(seed)) for pool in pools]

    def __len__(self) -> int:
        return STEPS

    def __iter__(self) -> Iterator[Tensor]:
        count = STEPS * BATCH
        orders = [pool[list(RandomSampler(pool, num_samples=count, generator=own))] for pool, own in self.pools]
        return (torch.cat(parts) for parts in zip(*(order.split(BATCH) for order in orders), strict=True))


class Images(L.LightningDataModule):
    """Four of five folds train, one tests.

    Args:
        fold: which fold tests.
        labels: how many training images keep their label; None: all.
        seed: draws them, and the order of the batches.
        unlabelled: whether students see the others too, as many in each batch; their label is -100, which the
            task loss ignores.
    """

    def __init__(self, fold: int, labels: int | None, seed: int, unlabelled: bool = False) -> None:
        super().__init__()
        pixels, classes = load_digits(return_X_y=True)
        # Pixels are 0 to 16; this brings them to about zero mean and unit variance.
        images = (torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) - 4.9) / 6.0
        train, test = list(StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(pixels, classes))[fold]
        pools = [train]
        if labels is not None:
            pools = train_test_split(train, train_size=labels, stratify=classes[train], random_state=seed)
        seen = torch.tensor(classes)
        for pool in pools[1:]:
            seen[pool] = -100
        self.train_set = TensorDataset(images, seen)
        self.batches = Batches(*map(torch.tensor, pools if unlabelled else pools[:1]), seed=seed)
        self.test_set = TensorDataset(images[test], torch.tensor(classes[test]))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_set, sampler=self.batches, batch_size=None)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test_set, batch_size=len(self.test_set))


class Distillation(DistillationModule):
    """Logs nothing while it trains: that takes as long as all else together, with networks so small."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.distill(batch)[0]


class Arm(NamedTuple):
    losses: list[DistillationLoss]
    task_weight: float = 1.0
    unlabelled: bool = False


MAP = ("features.1", "features.1")
"""The tutorial's layer: what the convolutions put out; (8, 2, 2) and (16, 2, 2)."""
HIDDEN = ("classifier.1", "classifier.1")
"""The hidden layer of the perceptron; (32,) and (64,)."""

TEACHER, ALONE = "teacher", "student alone"
ARMS: dict[str, Arm] = {
    ALONE: Arm([]),
    "soft targets, T 2 (tutorial)": Arm([SoftTarget(2.0, weight=0.25)], 0.75),
    "cosine, map (tutorial)": Arm([FeatureCosine(*MAP, weight=0.25)], 0.75),
    "regressor, map (tutorial)": Arm([FeatureMSE(*MAP, weight=0.25)], 0.75),
    "soft targets, T 8": Arm([SoftTarget(8.0, weight=0.75)], 0.25),
    "cosine, hidden layer": Arm([FeatureCosine(*HIDDEN, weight=1.0)], 0.25),
    "regressor, hidden layer": Arm([FeatureMSE(*HIDDEN, weight=0.25)], 0.75),
    "soft targets, T 8, and regressor": Arm([SoftTarget(8.0, weight=0.75), FeatureMSE(*HIDDEN, weight=0.25)], 0.25),
    "standardised soft targets": Arm([SoftTarget(2.0, weight=9.0, standardize=True)], 0.1),
    "logit MSE": Arm([LogitMSE(weight=1.0)]),
    "DKD": Arm([DKD(temperature=4.0, alpha=1.0, beta=8.0, weight=1.0)]),
    "DIST": Arm([DIST(temperature=4.0, beta=1.0, gamma=1.0, weight=2.0)]),
    "attention transfer": Arm([AttentionTransfer("features.0", "features.0", weight=1000.0)]),
    "similarity preserving": Arm([SimilarityPreserving(*MAP, weight=100.0)]),
    "relations (RKD)": Arm([RelationalDistance(*HIDDEN, weight=25.0), RelationalAngle(*HIDDEN, weight=50.0)]),
    "soft targets, T 8, unlabelled images too": Arm([SoftTarget(8.0, weight=0.75)], 0.25, unlabelled=True),
}
ROWS = (TEACHER, *ARMS)


def train_teacher(fold: int, seed: int, epochs: int) -> tuple[nn.Module, float]:
    L.seed_everything(seed, verbose=False)
    data, model = Images(fold, None, seed), Classifier(Deep(), TEACHER_LR)
    digits_fits.fit(model, data, epochs)
    return model.network, digits_fits.test(model, data)["test_acc"]


def train_student(teacher: nn.Module, arm: Arm, fold: int, labels: int | None, seed: int, epochs: int) -> float:
    L.seed_everything(seed, verbose=False)
    data = Images(fold, labels, seed, arm.unlabelled)
    model = Distillation(
        Light(),
        teacher,
        arm.losses,
        task_weight=arm.task_weight,
        optimizer=partial(torch.optim.AdamW, lr=LR, fused=True),
        scheduler=partial(CosineAnnealingLR, T_max=epochs),
    )
    model.example_input_array = torch.zeros(2, 1, 8, 8)  # the loader asks its dataset for batches, not for items
    digits_fits.fit(model, data, epochs)
    return digits_fits.test(model, data)["test_acc"]


Outcome = tuple[int | None, str, float]
"""Number of labels, row, test accuracy."""


def run_fold(fold: int, run: int, teacher_epochs: int, epochs: int) -> Iterator[Outcome]:
    seed = 1000 * run + fold  # every fold has weights and orders of its own
    teacher, accuracy = train_teacher(fold, seed, teacher_epochs)
    for labels in (labels for labels, runs in RUNS.items() if run < runs):
        yield labels, TEACHER, accuracy
        for row, arm in ARMS.items():
            if labels is not None or not arm.unlabelled:
                yield labels, row, train_student(teacher, arm, fold, labels, seed, epochs)


Results = dict[tuple[int | None, str], list[list[float]]]
"""Number of labels and row to accuracies, by fold and run."""


def interval(differences: list[float]) -> str:
    """Mean difference in points and the 95 % t-interval of that mean; bold where it excludes 0."""
    points = [100 * difference for difference in differences]
    mean = statistics.fmean(points)
    if len(points) < 2:
        return f"{mean:+.2f}"
    half = float(student_t.ppf(0.975, len(points) - 1)) * statistics.stdev(points) / len(points) ** 0.5
    text = f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"
    return f"**{text}**" if abs(mean) > half else text


def table(results: Results) -> str:
    folds = {key: [statistics.fmean(runs) for runs in by_fold] for key, by_fold in results.items()}
    names = [f"{labels:,} images" if labels else "all images" for labels in RUNS]
    lines = [f"| Row | {' | '.join(names)} |", f"|:--|{'--:|' * len(names)}"]
    for row in ROWS:
        cells = []
        for labels in RUNS:
            values, alone = folds.get((labels, row), []), folds[labels, ALONE]
            cell = f"{100 * statistics.fmean(values):.2f}" if values else ""
            if values and row != ALONE:
                cell += f", {interval([value - other for value, other in zip(values, alone, strict=True)])}"
            cells.append(cell)
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Five-fold cross-validation of distillation.")
    parser.add_argument("--folds", type=int, default=FOLDS, help="the first so many of five")
    parser.add_argument("--runs", type=int, default=max(RUNS.values()), help="at most so many runs of every fit")
    parser.add_argument("--epochs", type=int, help="for every model; fewer than by default is a quick look")
    arguments = parser.parse_args()
    digits_fits.quiet()
    torch.set_num_threads(1)

    results: Results = {}
    started = time.perf_counter()
    for run, fold in product(range(arguments.runs), range(arguments.folds)):
        epochs = (arguments.epochs or TEACHER_EPOCHS, arguments.epochs or EPOCHS)
        for labels, row, accuracy in run_fold(fold, run, *epochs):
            by_fold = results.setdefault((labels, row), [[] for _ in range(arguments.folds)])
            by_fold[fold].append(accuracy)
            seconds = time.perf_counter() - started
            line = f"{seconds:5.0f} s  run {run} fold {fold} {labels or 'all'} {row}: {accuracy:.6f}"
            print(line, file=sys.stderr, flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
