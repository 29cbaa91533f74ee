"""Measures the accuracy of pruned networks over five folds: several ways to prune, four sparsities, two networks.

Every model sees the same images in the same order from the same initial weights as its dense twin, so differences
are taken fold by fold. The folds' training sets overlap, so the 95 % t-intervals are somewhat too narrow.

Run it with `python benchmarks/pruning_quality.py > tables.md` (about an hour; for a quick look
`--folds 2 --epochs 10 --levels 90`). Progress, with the accuracy of every single fit, goes to stderr.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelPruning
from scipy.stats import t as student_t
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR, CosineAnnealingWarmRestarts, LRScheduler

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "digits"))  # the examples are no package

import digits_fits
from data import FOLDS, Digits
from networks import Classifier, Student

from lightning_compress import OneShot, Polynomial, Rewind, ScheduledPruning, Steps, Targets, Window, prune_, sparsity

EPOCHS = 40
LEVELS = (80, 90, 95, 98)
ROUNDS = 5
ONE_LEVEL = 95
"""Where rewinding is also tried to initialization, and with a whole fit for each round: as long as six rows."""

DENSE, GRADUAL = "dense", "gradual"


class Block(nn.Module):
    """Attention and a two-layer perceptron; all weights in `nn.Linear`, the only attention that both tools can prune.

    `ModelPruning` breaks `nn.MultiheadAttention`, whose output projection is read without being called.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_perceptron = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.query_key_value(self.before_attention(x)).unflatten(-1, (3, self.heads, -1))
        attended = functional.scaled_dot_product_attention(*heads.permute(2, 0, 3, 1, 4))
        x = x + self.output(attended.transpose(1, 2).flatten(2))
        return x + self.down(functional.relu(self.up(self.before_perceptron(x))))


class Transformer(nn.Module):
    """Two blocks over the eight rows of an image."""

    def __init__(self, width: int = 48, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.position = nn.Parameter(0.5 * torch.randn(8, width))  # with the usual 0.02 it learns more slowly
        self.blocks = nn.Sequential(Block(width, heads), Block(width, heads))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x.flatten(1, 2)) + self.position).mean(1))


class Fast(Classifier):
    """The networks' own, with the one-kernel form of its optimizer: a fifth of the time of these fits."""

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, fused=True)
        return {"optimizer": optimizer, "lr_scheduler": self.schedule(optimizer)}

    def schedule(self, optimizer: torch.optim.Optimizer) -> LRScheduler:
        return CosineAnnealingLR(optimizer, T_max=self.trainer.max_epochs)


class Restarting(Fast):
    """Its learning rate starts anew for each round of rewinding."""

    def schedule(self, optimizer: torch.optim.Optimizer) -> LRScheduler:
        return CosineAnnealingWarmRestarts(optimizer, T_0=self.trainer.max_epochs // (ROUNDS + 1))


NETWORKS: dict[str, type[nn.Module]] = {"CNN": Student, "Transformer": Transformer}

Make = Callable[[Classifier, float, int], L.Callback]
"""The callback that prunes a model to a sparsity in a fit of so many epochs."""


def gradual(method: str = "l1_unstructured") -> Make:
    return lambda model, goal, epochs: ScheduledPruning(method, goal)


def one_shot(model: Classifier, goal: float, epochs: int) -> L.Callback:
    return ScheduledPruning("magnitude", goal, schedule=OneShot(), window=Window(0.75))


def rewinding(to: int, window: Window | None = None) -> Make:
    """Five rounds, each of which prunes the same fraction of what the last one left."""

    def make(model: Classifier, goal: float, epochs: int) -> L.Callback:
        points = [done / (ROUNDS - 1) for done in range(ROUNDS)]
        fractions = [(1 - (1 - goal) ** (done / ROUNDS)) / goal for done in range(1, ROUNDS)]
        settings = {} if window is None else {"window": window}
        return ScheduledPruning(
            "magnitude", goal, schedule=Steps(points, [*fractions, 1.0]), rewind=Rewind(to, unit="epoch"), **settings
        )

    return make


def model_pruning_by_default(model: Classifier, goal: float, epochs: int) -> L.Callback:
    """All defaults, the lottery ticket among them; `amount` is of what is left, once an epoch."""
    return ModelPruning("l1_unstructured", amount=1 - (1 - goal) ** (1 / epochs))


def model_pruning_at_its_best(model: Classifier, goal: float, epochs: int) -> L.Callback:
    """No lottery ticket; the weights, the cubic schedule and the window of `ScheduledPruning`."""
    selected = Targets().select(model)
    weights = [
        (model.get_submodule(target.layer), target.name.removeprefix(f"{target.layer}.")) for target in selected.targets
    ]
    bounds = ScheduledPruning(sparsity=goal).window.bounds(epochs, 1)  # it prunes between epochs only
    progress = [bounds.progress(epoch) or 0.0 for epoch in range(epochs + 1)]
    zeros = [round(selected.numel * Polynomial().value(done, goal)) for done in progress]
    return ModelPruning(
        "l1_unstructured",
        parameters_to_prune=weights,
        amount=lambda epoch: zeros[epoch + 1] - zeros[epoch],
        use_lottery_ticket_hypothesis=False,
    )


BY_DEFAULT = "`ModelPruning`, its defaults"
AT_THE_END = "one-shot at the end, no fine-tuning"
TO_INIT, LONG = "five rounds, rewinding to initialization", "five rounds, rewinding to epoch 1, 6 times the training"
FITS: dict[str, Make] = {
    "one-shot at 75 % of the fit, fine-tuned": one_shot,
    GRADUAL: gradual(),
    "gradual, LAMP": gradual("lamp"),
    "gradual, Taylor": gradual("taylor"),
    "gradual, movement": gradual("movement"),
    "five rounds, rewinding to epoch 1": rewinding(1),
    TO_INIT: rewinding(0),
    BY_DEFAULT: model_pruning_by_default,
    "`ModelPruning`, same schedule and weights": model_pruning_at_its_best,
}
ROWS = (DENSE, AT_THE_END, *FITS, LONG)


def train(kind: type[nn.Module], fold: int, epochs: int, goal: float = 0.0, make: Make | None = None) -> Classifier:
    L.seed_everything(fold, verbose=False)
    model = Fast(kind())
    digits_fits.fit(model, Digits(fold), epochs, callbacks=() if make is None else (make(model, goal, epochs),))
    return model


def train_long(kind: type[nn.Module], fold: int, epochs: int, goal: float) -> Classifier:
    """A whole fit before every round of pruning and after the last, as in the papers on rewinding."""
    L.seed_everything(fold, verbose=False)
    model = Restarting(kind())
    window = Window(1 / (ROUNDS + 1), ROUNDS / (ROUNDS + 1))
    digits_fits.fit(model, Digits(fold), (ROUNDS + 1) * epochs, callbacks=(rewinding(1, window)(model, goal, epochs),))
    return model


Run = tuple[int, str, float, float]
"""Level, row, test accuracy of the last weights, and the fraction of weights that are zero."""


def run_fold(kind: type[nn.Module], fold: int, epochs: int, levels: list[int]) -> Iterator[Run]:
    dense = train(kind, fold, epochs)
    accuracy = digits_fits.test(dense, Digits(fold))["test_acc"]
    for level in levels:
        goal = level / 100
        yield level, DENSE, accuracy, sparsity(dense)
        pruned = copy.deepcopy(dense)
        prune_(pruned, goal, "magnitude")
        yield level, AT_THE_END, digits_fits.test(pruned, Digits(fold))["test_acc"], check(pruned, goal)
        for row, make in FITS.items():
            if row == TO_INIT and level != ONE_LEVEL:
                continue
            model = train(kind, fold, epochs, goal, make)
            # By default ModelPruning prunes biases and norms too, so its share of the weights isn't exactly the goal.
            zeros = sparsity(model) if row == BY_DEFAULT else check(model, goal)
            yield level, row, digits_fits.test(model, Digits(fold))["test_acc"], zeros


def run_fold_long(kind: type[nn.Module], fold: int, epochs: int, levels: list[int]) -> Iterator[Run]:
    if ONE_LEVEL in levels:
        model = train_long(kind, fold, epochs, ONE_LEVEL / 100)
        yield ONE_LEVEL, LONG, digits_fits.test(model, Digits(fold))["test_acc"], check(model, ONE_LEVEL / 100)


def check(model: nn.Module, goal: float) -> float:
    reached, weights = sparsity(model), Targets().select(model).numel
    if round(reached * weights) != round(goal * weights):
        raise RuntimeError(f"{reached:.4%} of the weights are zero, not {goal:.0%}.")
    return reached


def interval(differences: list[float], bold: bool = False) -> str:
    """Mean difference in points, and the 95 % t-interval of that mean; bold, where asked for, if it excludes 0."""
    points = [100 * difference for difference in differences]
    mean = statistics.fmean(points)
    if len(points) < 2:
        return f"{mean:+.2f}"
    half = float(student_t.ppf(0.975, len(points) - 1)) * statistics.stdev(points) / len(points) ** 0.5
    text = f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"
    return f"**{text}**" if bold and abs(mean) > half else text


Results = dict[tuple[int, str], list[float]]
"""Level and row to the accuracy on each fold."""


def table(results: Results, levels: list[int], cell: Callable[[int, str], str], without: str) -> str:
    rows = [row for row in ROWS if row != without and any((level, row) in results for level in levels)]
    lines = [
        f"| Row | {' | '.join(f'{level} %' for level in levels)} |",
        f"|:--|{'--:|' * len(levels)}",
    ]
    for row in rows:
        cells = [cell(level, row) if (level, row) in results else "" for level in levels]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tables(name: str, results: Results, levels: list[int]) -> str:
    def less(level: int, row: str, other: str) -> list[float]:
        return [first - second for first, second in zip(results[level, row], results[level, other], strict=True)]

    def to_dense(level: int, row: str) -> str:
        return f"{100 * statistics.fmean(results[level, row]):.2f}, {interval(less(level, row, DENSE))}"

    dense = results[levels[0], DENSE]
    by_fold = " ".join(f"{100 * value:.1f}" for value in dense)
    return "\n\n".join(
        [
            f"## {name}: dense {100 * statistics.fmean(dense):.2f} % (by fold {by_fold})",
            "Mean accuracy (%), and its difference to dense (points):",
            table(results, levels, to_dense, without=DENSE),
            "Difference to gradual pruning by magnitude (points); bold where the interval excludes 0:",
            table(results, levels, lambda level, row: interval(less(level, row, GRADUAL), bold=True), without=GRADUAL),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Five-fold cross-validation of pruning.")
    parser.add_argument("--folds", type=int, default=FOLDS, help="the first so many of five")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of every fit; at least 10, or it can't be rewound")
    parser.add_argument("--levels", type=int, nargs="+", default=LEVELS, help="percent of the weights that are zero")
    parser.add_argument("--skip-long", action="store_true", help=f"without the row '{LONG}'")
    arguments = parser.parse_args()
    digits_fits.quiet()
    torch.set_num_threads(1)

    results: dict[str, Results] = {name: {} for name in NETWORKS}
    shares: list[float] = []
    started = time.perf_counter()
    # What takes longest comes last, so that most of the progress is seen before it.
    for run in (run_fold,) if arguments.skip_long else (run_fold, run_fold_long):
        for name, fold in itertools.product(NETWORKS, range(arguments.folds)):
            for level, row, accuracy, zeros in run(NETWORKS[name], fold, arguments.epochs, arguments.levels):
                results[name].setdefault((level, row), []).append(accuracy)
                if row == BY_DEFAULT:
                    shares.append(100 * zeros - level)
                seconds = time.perf_counter() - started
                line = f"{seconds:5.0f} s  {name} fold {fold} {level} % {row}: {accuracy:.6f}, zeros {zeros:.2%}"
                print(line, file=sys.stderr, flush=True)
    for name in NETWORKS:
        print(f"{tables(name, results[name], arguments.levels)}\n")
    print(
        "Exactly the stated share of the weights is zero in every model, counted after each fit; with "
        f"{BY_DEFAULT}, {min(shares):+.2f} to {max(shares):+.2f} points more."
    )


if __name__ == "__main__":
    main()
