"""Measures whether an optimizer's state is worth keeping when channels are removed in rounds.

A ResNet that was trained on one of five folds (360 images; the folds are disjoint, so the intervals are honest) loses
channels during a fine-tuning, at once or in ten rounds, and is tested on the other four folds. Carried:
`remove_channels_` is given the optimizer. Dropped: the optimizer is made anew after each round; its learning rate
goes on.

Run it with `python benchmarks/channel_removal_state.py` (ten minutes; `--folds 2` for a quick look).
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "digits"))  # the examples are no package

from channel_removal_quality import ResNet, interval, macs
from data import FOLDS, Digits

from lightning_compress import plan_removal, remove_channels_

KEEP = 0.12
BATCH = 60
EPOCHS_BEFORE, EPOCHS_AFTER = 20, 20
SEEDS = (0,)
FIRST = 5
"""Steps after a removal in which the loss is looked at."""

CARRIED, DROPPED = "carried", "dropped"
OPTIMIZERS = {
    "SGD, momentum 0.9": lambda network, lr: torch.optim.SGD(
        network.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4
    ),
    "AdamW": lambda network, lr: torch.optim.AdamW(network.parameters(), lr=lr),
}
RATES = {"SGD, momentum 0.9": 0.05, "AdamW": 2e-3}
SCHEDULES = {"one shot at 30 %": (1, 0.3), "10 rounds over 50 %": (10, 0.5)}


@dataclass
class Outcome:
    """Of one fit: test accuracy and loss, and the training loss right after removals."""

    accuracy: float
    loss: float
    after_removal: float


def fold_data(fold: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The images of one fold to train on, and those of the other four to test on."""
    data = Digits(fold)
    data.setup("fit")
    pixels, labels = data.test_set.dataset.tensors
    in_fold = torch.zeros(len(labels), dtype=torch.bool)
    in_fold[data.test_set.indices] = True
    return (pixels[in_fold], labels[in_fold]), (pixels[~in_fold], labels[~in_fold])


def batches(images: Tensor, labels: Tensor, epochs: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled, each moved by up to one pixel."""
    generator = torch.Generator().manual_seed(seed)
    low = float(images.min())
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels), generator=generator).split(BATCH)[: len(labels) // BATCH]:
            down, right = torch.randint(3, (2,), generator=generator).tolist()
            padded = functional.pad(images[chosen], (1, 1, 1, 1), value=low)
            yield padded[:, :, down : down + 8, right : right + 8], labels[chosen]


def tune(
    network: nn.Module,
    steps: list[tuple[Tensor, Tensor]],
    optimizer_name: str,
    schedule: str | None = None,
    state: str = CARRIED,
    rate: float | None = None,
) -> float:
    """Train over the steps on a cosine, removing channels in between; returns the mean loss right after removals."""
    rate = rate or RATES[optimizer_name]
    optimizer: Optimizer = OPTIMIZERS[optimizer_name](network, rate)
    whole = macs(network)
    rounds, end = SCHEDULES[schedule] if schedule else (0, 0.0)
    due = {int(end * len(steps) * done / rounds): done / rounds for done in range(1, rounds + 1)}
    network.train()
    seen, since = list[float](), FIRST
    for step, (images, labels) in enumerate(steps):
        if step in due:
            share = (1 - due[step] * (1 - KEEP)) * whole / macs(network)
            plan = plan_removal(network, torch.zeros(2, 1, 8, 8), macs=min(share, 1.0), scope="layer", round_to=1)
            remove_channels_(network, plan, [optimizer] if state == CARRIED else [])
            if state == DROPPED:
                optimizer = OPTIMIZERS[optimizer_name](network, rate)
            since = 0
        for group in optimizer.param_groups:
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / len(steps)))
        optimizer.zero_grad()
        loss = functional.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        # The first loss after a removal comes before any step: it is the same either way.
        if 0 < since < FIRST:
            seen.append(float(loss.detach()))
        since += 1
    return statistics.fmean(seen) if seen else 0.0


@torch.no_grad()
def test(network: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    out = network.eval()(images)
    return float((out.argmax(1) == labels).float().mean()), float(functional.cross_entropy(out, labels))


def run_fold(fold: int) -> Iterator[tuple[str, str, str, Outcome]]:
    train, held_out = fold_data(fold)
    torch.manual_seed(fold)
    trained = ResNet(16)
    tune(trained, list(batches(*train, EPOCHS_BEFORE, 10 * fold)), "SGD, momentum 0.9", rate=0.1)
    for optimizer in OPTIMIZERS:
        for schedule in SCHEDULES:
            for state in (CARRIED, DROPPED):
                outcomes = []
                for seed in SEEDS:
                    network = copy.deepcopy(trained)
                    steps = list(batches(*train, EPOCHS_AFTER, 10 * fold + 1 + seed))
                    after = tune(network, steps, optimizer, schedule, state)
                    outcomes.append(Outcome(*test(network, *held_out), after))
                means = (
                    statistics.fmean(getattr(outcome, name) for outcome in outcomes) for name in Outcome.__annotations__
                )
                yield optimizer, schedule, state, Outcome(*means)


def table(results: dict[tuple[str, str, str], list[Outcome]]) -> str:
    lines = [
        "| Optimizer | Removal | Accuracy carried (%) | Dropped | Carried less dropped (points) | Test loss × 100 "
        "| Training loss × 100, right after a removal |",
        "|:--|:--|--:|--:|--:|--:|--:|",
    ]
    for optimizer in OPTIMIZERS:
        for schedule in SCHEDULES:
            carried, dropped = (results[optimizer, schedule, state] for state in (CARRIED, DROPPED))
            accuracy = [f"{100 * statistics.fmean(fit.accuracy for fit in fits):.2f}" for fits in (carried, dropped)]
            differences = [
                interval([getattr(a, name) - getattr(b, name) for a, b in zip(carried, dropped, strict=True)])
                for name in ("accuracy", "loss", "after_removal")
            ]
            lines.append(f"| {optimizer} | {schedule} | {' | '.join([*accuracy, *differences])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Optimizer state carried over a removal, or dropped.")
    parser.add_argument("--folds", type=int, default=FOLDS, help="the first so many of five")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[tuple[str, str, str], list[Outcome]] = {}
    started = time.perf_counter()
    for fold in range(arguments.folds):
        for *key, outcome in run_fold(fold):
            results.setdefault(tuple(key), []).append(outcome)
            seconds = time.perf_counter() - started
            print(f"{seconds:5.0f} s  fold {fold} {', '.join(key)}: {outcome}", file=sys.stderr, flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
