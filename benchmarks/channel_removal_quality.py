"""Measures accuracy and latency of narrowed networks over five folds: `ChannelPruning` and torch-pruning by hand.

Every row sees the same images in the same order; rows that start from a trained network start from the same one, and
all are trained for as many epochs as the full network, so differences are taken fold by fold. The folds' training sets
overlap, so the 95 % t-intervals are somewhat too narrow.

Run it with `python benchmarks/channel_removal_quality.py > tables.md` (most of an hour; `--quick` for a quick look).
Progress, with the accuracy of every single fit, goes to stderr.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import lightning as L
import torch
import torch_pruning
from scipy.stats import t as student_t
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "digits"))  # the examples are no package

import digits_fits
from data import FOLDS, Digits
from networks import Classifier, Residual, conv_bn

from lightning_compress import ChannelPruning

KEEP = (0.5, 0.25, 0.12)
BEFORE, AFTER = 8, 6
"""Epochs of the first training, and of the fine-tuning."""

SPARSE_REG = 5e-4
"""What torch-pruning's own examples take for their sparse training on CIFAR."""

LEAST = 0.1
"""The least fraction of its channels that a layer keeps: the default of `min_layer_channels`, for torch-pruning too."""

FULL = "full network, trained as long"
TRAINED = '`ChannelPruning`, scope="global", fit of the trained network'
BY_HAND = "torch-pruning by hand, of the trained network"
SPARSE = "torch-pruning by hand, sparse training in half of the epochs"
ROWS = (TRAINED, BY_HAND, SPARSE)


class ResNet(nn.Module):
    """Three residual blocks on images of 16 × 16 pixels, so that convolutions take the time."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.larger = nn.Upsample(scale_factor=2, mode="bilinear")
        self.stem = nn.Sequential(*conv_bn(1, width), nn.ReLU())
        self.features = nn.Sequential(
            Residual(width, width), Residual(width, 2 * width, stride=2), Residual(2 * width, 4 * width, stride=2)
        )
        self.head = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(self.stem(self.larger(x))).mean((2, 3)))


class Module(Classifier):
    """The networks' own, with the one-kernel form of its optimizer."""

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.trainer.max_epochs)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class Sparse(Module):
    """Trained with torch-pruning's group regularization, which its users call between backward and step."""

    def __init__(self, network: nn.Module, pruner: torch_pruning.pruner.GroupNormPruner) -> None:
        super().__init__(network)
        self.pruner = [pruner]  # in a list: it is no submodule

    def on_train_epoch_start(self) -> None:
        self.pruner[0].update_regularizer()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.pruner[0].regularize(self.network)


def macs(network: nn.Module) -> int:
    """Multiply-accumulates of one image, counted by torch."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        copy.deepcopy(network).eval()(torch.zeros(1, 1, 8, 8))
    return counter.get_total_flops() // 2


def pruner_by_hand(network: nn.Module) -> torch_pruning.pruner.GroupNormPruner:
    """As in torch-pruning's README: group magnitude, all layers ranked together, the last layer left alone."""
    return torch_pruning.pruner.GroupNormPruner(
        network,
        torch.zeros(1, 1, 8, 8),
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        global_pruning=True,
        pruning_ratio=1.0,
        max_pruning_ratio=1 - LEAST,
        iterative_steps=200,
        ignored_layers=[network.head],
        reg=SPARSE_REG,
        # Its default arguments are shared by all pruners and written to.
        in_channel_groups={},
        out_channel_groups={},
        num_heads={},
    )


def prune_by_hand(network: nn.Module, pruner: torch_pruning.pruner.GroupNormPruner, keep: float) -> None:
    goal = keep * macs(network)
    while macs(network) > goal:
        pruner.step()
    network.train()  # it puts the network into evaluation, and there Lightning would leave it


def fit(module: L.LightningModule, fold: int, epochs: int, callbacks: tuple[L.Callback, ...] = ()) -> nn.Module:
    digits_fits.fit(module, Digits(fold), epochs, callbacks=callbacks)
    return module.network


def test(network: nn.Module, fold: int) -> float:
    return digits_fits.test(Classifier(network), Digits(fold))["test_acc"]


def fresh(fold: int) -> nn.Module:
    L.seed_everything(fold, verbose=False)
    return ResNet()


Key = tuple[float, str]
"""The fraction kept, and the row."""


@dataclass
class Results:
    """Accuracy and network of each fold, by fraction kept and row."""

    accuracy: dict[Key, list[float]] = field(default_factory=dict)
    networks: dict[Key, list[nn.Module]] = field(default_factory=dict)


Epochs = tuple[int, int]


def run_row(row: str, trained: nn.Module, fold: int, keep: float, epochs: Epochs) -> nn.Module:
    after = epochs[1]
    network = copy.deepcopy(trained)
    if row == TRAINED:
        return fit(Module(network), fold, after, (ChannelPruning(macs=keep, scope="global"),))
    pruner = pruner_by_hand(network)
    if row == SPARSE:
        fit(Sparse(network.train(), pruner), fold, after // 2)
        after -= after // 2
    prune_by_hand(network, pruner, keep)
    return fit(Module(network), fold, after)


def run_fold(fold: int, levels: tuple[float, ...], epochs: Epochs) -> Iterator[tuple[float, str, nn.Module]]:
    trained = fit(Module(fresh(fold)), fold, epochs[0])
    full = fit(Module(copy.deepcopy(trained)), fold, epochs[1])
    yield 1.0, FULL, full
    for keep in levels:
        for row in ROWS:
            yield keep, row, run_row(row, trained, fold, keep, epochs)


def interval(differences: list[float]) -> str:
    """Mean difference in points, and the 95 % t-interval of that mean."""
    points = [100 * difference for difference in differences]
    mean = statistics.fmean(points)
    if len(points) < 2:
        return f"{mean:+.2f}"
    half = float(student_t.ppf(0.975, len(points) - 1)) * statistics.stdev(points) / len(points) ** 0.5
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"


def less(results: Results, key: Key, other: Key) -> str:
    return interval([a - b for a, b in zip(results.accuracy[key], results.accuracy[other], strict=True)])


def accuracy_table(results: Results) -> str:
    full = macs(results.networks[1.0, FULL][0])
    lines = [
        "| Keep | Row | Accuracy (%) | To the full network (points) | To torch-pruning by hand | Parameters | MACs |",
        "|--:|:--|--:|--:|--:|--:|--:|",
    ]
    for (keep, row), values in sorted(results.accuracy.items(), key=lambda entry: -entry[0][0]):
        to_full = "" if row == FULL else less(results, (keep, row), (1.0, FULL))
        to_hand = "" if row in (FULL, BY_HAND) else less(results, (keep, row), (keep, BY_HAND))
        networks = results.networks[keep, row]
        parameters = round(
            statistics.fmean(sum(parameter.numel() for parameter in network.parameters()) for network in networks)
        )
        share = statistics.fmean(macs(network) for network in networks) / full
        lines.append(
            f"| {keep:.0%} | {row} | {100 * statistics.fmean(values):.2f} | {to_full} | {to_hand} "
            f"| {parameters:,} | {share:.1%} |"
        )
    return "\n".join(lines)


def time_calls(network: Callable[[Tensor], Tensor], images: Tensor, calls: int) -> float:
    """Milliseconds of the fastest of some calls: what else runs on the machine makes none faster."""
    network(images)
    times = []
    for _ in range(calls):
        started = time.perf_counter()
        network(images)
        times.append(time.perf_counter() - started)
    return 1e3 * min(times)


def time_in_turns(networks: dict[Key, list[nn.Module]], batch: int, rounds: int) -> dict[Key, list[list[float]]]:
    """Milliseconds by row, round and fold; all networks take turns, so a busy machine slows all of them."""
    images = torch.randn(batch, 1, 8, 8)
    times: dict[Key, list[list[float]]] = {key: [] for key in networks}
    with torch.inference_mode():
        for _ in range(rounds):
            for key, models in networks.items():
                times[key].append([time_calls(model.eval(), images, 20 if batch == 1 else 5) for model in models])
    return times


def latency_table(networks: dict[Key, list[nn.Module]], rounds: int) -> str:
    columns = [(threads, batch) for threads in (1, 2) for batch in (1, 32)]
    cells: dict[Key, list[str]] = {key: [] for key in networks}
    for threads, batch in columns:
        torch.set_num_threads(threads)
        times = time_in_turns(networks, batch, rounds)
        full = [statistics.median(turn) for turn in times[1.0, FULL]]
        for key, turns in times.items():
            if key[1] == FULL:
                cells[key].append(f"{statistics.median(full):.2f} ms")
                continue
            ratios = [whole / seconds for whole, turn in zip(full, turns, strict=True) for seconds in turn]
            low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
            cells[key].append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
    torch.set_num_threads(1)
    names = [f"{threads} thread{'s' * (threads > 1)}, batch {batch}" for threads, batch in columns]
    lines = [f"| Keep | Row | {' | '.join(names)} |", f"|--:|:--|{'--:|' * len(columns)}"]
    for (keep, row), values in sorted(cells.items(), key=lambda entry: -entry[0][0]):
        lines.append(f"| {keep:.0%} | {row} | {' | '.join(values)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Five-fold cross-validation of channel removal.")
    parser.add_argument("--folds", type=int, default=FOLDS, help="the first so many of five")
    parser.add_argument("--rounds", type=int, default=15, help="of timing")
    parser.add_argument("--quick", action="store_true", help="one fold, two epochs, a quarter of the MACs")
    arguments = parser.parse_args()
    digits_fits.quiet()
    torch.set_num_threads(1)
    folds, levels, epochs, rounds = arguments.folds, KEEP, (BEFORE, AFTER), arguments.rounds
    if arguments.quick:
        folds, levels, epochs, rounds = 1, (0.25,), (2, 2), 5

    results, started = Results(), time.perf_counter()
    for fold in range(folds):
        for keep, row, network in run_fold(fold, levels, epochs):
            key = keep, row
            results.accuracy.setdefault(key, []).append(test(network, fold))
            results.networks.setdefault(key, []).append(copy.deepcopy(network))
            line = f"{time.perf_counter() - started:5.0f} s  fold {fold} {keep:.0%} {row}: "
            print(f"{line}{results.accuracy[key][-1]:.6f}, {macs(network):,} MACs", file=sys.stderr, flush=True)
    gc.disable()
    print(f"{accuracy_table(results)}\n")
    print(latency_table(results.networks, rounds))


if __name__ == "__main__":
    main()
