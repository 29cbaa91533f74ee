"""Measures what the callbacks' defaults and other settings cost: small networks on digits, pretrained ones, five seeds.

Every arm of a row and a seed starts from the same weights and sees the same batches in the same order, so differences
are paired by seed; in brackets is the 95 % t-interval of their mean. Results are appended to a file as they come, and
what it holds isn't measured again, so a run may be broken off, and rows may be measured one by one:

    python benchmarks/defaults.py --rows "mlp-bn/scratch*" --arms "plain,QAT*"    # patterns
    python benchmarks/defaults.py --list                                          # the rows and arms
    python benchmarks/defaults.py --table > benchmarks/defaults.md                # the tables of what was measured

A row of a pretrained network is left out, with a word, where its package isn't installed: see `defaults_pretrained.py`.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import torch
from defaults_rows import FITS, TASKS, score
from scipy.stats import t as student_t
from torch import nn

from lightning_compress import (
    ChannelPruning,
    Distillation,
    Linear,
    OneShot,
    PostTrainingQuantization,
    QuantizationAwareTraining,
    ScheduledPruning,
    Snapshot,
    SoftTarget,
    StaticInt8,
    Window,
)
from lightning_compress.channels.planning import search

Arm = Callable[[], tuple[list, list | None]]
Scores = dict[tuple[str, str, int], float]

PLAIN, PTQ = "plain", "PTQ of plain"
QAT, CUT, ZEROS = "QAT", "ChannelPruning", "ScheduledPruning"
BEFORE = f"{CUT}, uncalibrated"
FX = ", by fx"
"""Ends what was measured at commit a68ae47, whose static int8 went through torch.fx and torch.ao."""
_WITHOUT: dict[str, Any] = {"calibration_batches": 0, "schedule": Linear(), "window": Window(0.0, 0.3)}
_MOVED = StaticInt8(equalize=True, smooth=True)


class Floored(ChannelPruning):
    """Leaves another part of each layer's even share; 0 is none but a tenth of its width, as it was."""

    def __init__(self, share: float, **budget: float) -> None:
        super().__init__(**budget, **_WITHOUT)
        self.share = share

    def _remove(self, *args: Any) -> None:
        with mock.patch.object(search, "SHARE", self.share):
            super()._remove(*args)


class FrozenStatistics(L.Callback):
    """Puts BatchNorms into evaluation mode at a fraction of a float fit, as training for int8 did."""

    def __init__(self, start: float) -> None:
        self.start = start

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        for module in pl_module.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train(trainer.global_step < self.start * trainer.estimated_stepping_batches)


def _from_float(task_weight: float) -> Distillation:
    """Teach what the network gave before the fit, at temperature 1: alone, as in arXiv 2601.20088, or beside labels."""
    loss = SoftTarget(temperature=1.0, weight=1.0 - task_weight)
    return Distillation(Snapshot(), [loss], task_weight)


ARMS: dict[str, Arm] = {
    PLAIN: lambda: ([], None),
    PTQ: lambda: ([], [PostTrainingQuantization()]),
    QAT: lambda: ([QuantizationAwareTraining()], None),
    f"{QAT}, as it was": lambda: (
        [QuantizationAwareTraining(freeze_observers=0.9, freeze_batchnorm=0.9)],
        None,
    ),
    f"{QAT}, equalized": lambda: ([QuantizationAwareTraining(_MOVED)], None),
    f"{QAT}, freeze_batchnorm=0.5": lambda: ([QuantizationAwareTraining(freeze_batchnorm=0.5)], None),
    f"{QAT}, freeze_observers=0.9": lambda: ([QuantizationAwareTraining(freeze_observers=0.9)], None),
    f"{QAT}, none, but statistics frozen at 0.9": lambda: ([FrozenStatistics(0.9)], None),
    f"{QAT}, Window(0.5)": lambda: ([QuantizationAwareTraining(window=Window(0.5))], None),
    f"{QAT}, distilled": lambda: ([_from_float(0.0), QuantizationAwareTraining()], None),
    f"{QAT}, half distilled": lambda: ([_from_float(0.5), QuantizationAwareTraining()], None),
    CUT: lambda: ([ChannelPruning(macs=0.5)], None),
    f"{CUT}, at 0": lambda: ([ChannelPruning(macs=0.5, window=Window(0.0, 0.3))], None),
    f"{CUT}, at 0.3": lambda: ([ChannelPruning(macs=0.5, window=Window(0.3))], None),
    f"{CUT}, in rounds": lambda: ([ChannelPruning(macs=0.5, schedule=Linear())], None),
    BEFORE: lambda: ([ChannelPruning(macs=0.5, **_WITHOUT)], None),
    f"{BEFORE}, as it was": lambda: ([Floored(0.0, macs=0.5)], None),
    f"{BEFORE}, half the share": lambda: ([Floored(0.5, macs=0.5)], None),
    f"{BEFORE}, layer": lambda: ([ChannelPruning(macs=0.5, scope="layer", **_WITHOUT)], None),
    f"{BEFORE}, 0.25": lambda: ([ChannelPruning(macs=0.25, **_WITHOUT)], None),
    f"{BEFORE}, 0.25, as it was": lambda: ([Floored(0.0, macs=0.25)], None),
    f"{BEFORE}, floor 0.35": lambda: ([ChannelPruning(macs=0.5, min_layer_channels=0.35, **_WITHOUT)], None),
    f"{BEFORE}, OneShot": lambda: ([ChannelPruning(macs=0.5, **{**_WITHOUT, "schedule": OneShot()})], None),
    f"{BEFORE}, l2": lambda: ([ChannelPruning(macs=0.5, importance="l2", **_WITHOUT)], None),
    f"{BEFORE}, taylor": lambda: (
        [ChannelPruning(macs=0.5, importance="taylor", **{**_WITHOUT, "window": Window(0.05, 0.3)})],
        None,
    ),
    ZEROS: lambda: ([ScheduledPruning(sparsity=0.8)], None),
    f"{ZEROS}, as it was": lambda: ([ScheduledPruning("l1_unstructured", sparsity=0.8)], None),
    f"{ZEROS}, 0.9": lambda: ([ScheduledPruning(sparsity=0.9)], None),
    f"{ZEROS}, 0.9, as it was": lambda: ([ScheduledPruning("l1_unstructured", sparsity=0.9)], None),
    f"{ZEROS}, layer": lambda: ([ScheduledPruning("l1_unstructured", sparsity=0.8, scope="layer")], None),
    f"{ZEROS}, every step": lambda: ([ScheduledPruning(sparsity=0.8, window=Window(0.1, 0.6))], None),
    f"{ZEROS}, to 0.75": lambda: ([ScheduledPruning(sparsity=0.8, window=Window(0.1, 0.75, every_n_steps=10))], None),
}


def rows() -> Iterator[tuple[str, str]]:
    """Networks and the fits that they have."""
    for name, task in TASKS.items():
        for fit, how in FITS.items():
            uneven = not how.uneven or name in ("cnn", "transformer")
            if bool(task.package) == fit.startswith("pretrained") and uneven:
                yield name, fit


def read(path: Path) -> Scores:
    """Row, arm and seed to the score."""
    if not path.exists():
        return {}
    lines = map(json.loads, path.read_text("utf-8").splitlines())
    return {(line["row"], line["arm"], line["seed"]): line["score"] for line in lines}


def measure(path: Path, row_patterns: list[str], arm_patterns: list[str], seeds: int) -> None:
    known = read(path)
    for name, fit in rows():
        row = f"{name}/{fit}"
        if not any(fnmatch(row, pattern) for pattern in row_patterns):
            continue
        if TASKS[name].missing:
            print(f"{row}: left out, {TASKS[name].package} isn't installed", file=sys.stderr)
            continue
        for seed in range(seeds):
            for arm, make in ARMS.items():
                if (row, arm, seed) in known or not any(fnmatch(arm, pattern) for pattern in arm_patterns):
                    continue
                start = time.perf_counter()
                found = score(name, FITS[fit], seed, *make())
                seconds = round(time.perf_counter() - start, 1)
                line = {"row": row, "arm": arm, "seed": seed, "score": found, "seconds": seconds}
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                print(f"{row}, {arm}, seed {seed}: {found:.2f} in {seconds} s", file=sys.stderr)


def difference(known: Scores, row: str, arm: str, base: str, seeds: int = 0) -> tuple[list[float], str]:
    """The differences by seed, and their mean with its interval; bold where that lies below 0.

    Where there are less than ``seeds``, their number is added.
    """
    pairs = [(value, known.get((row, base, seed))) for (r, a, seed), value in known.items() if (r, a) == (row, arm)]
    found = [value - other for value, other in pairs if other is not None]
    if len(found) < 2:
        return found, f"{found[0]:+.2f}" + (" (1)" if seeds > 1 else "") if found else ""
    mean = statistics.mean(found)
    half = student_t.ppf(0.975, len(found) - 1) * statistics.stdev(found) / len(found) ** 0.5
    text = f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]" + (f" ({len(found)})" if len(found) < seeds else "")
    return found, f"**{text}**" if mean + half < 0 else text


def arms_of(known: Scores, technique: str) -> list[str]:
    """The arms of a technique that were measured, at last what this code can't measure any more."""
    found = dict.fromkeys(arm for _, arm, _ in known)
    return [arm for arm in dict.fromkeys([*ARMS, *found]) if arm in found and arm.split(", ")[0] == technique]


def table(known: Scores, arms: list[str], base: str) -> Iterator[str]:
    """The differences of arms of a technique to ``base``, row by row."""
    heads = [arm.partition(", ")[2] or "as it is" for arm in arms]
    yield f"| Network, fit | Seeds | {base} (%) | " + " | ".join(heads) + " |"
    yield "|:--|--:|--:|" + ":--|" * len(arms)
    for name, fit in rows():
        row = f"{name}/{fit}"
        seeds = max((len(difference(known, row, arm, base)[0]) for arm in arms), default=0)
        cells = [difference(known, row, arm, base, seeds) for arm in arms]
        if seeds:
            level = statistics.mean(value for (r, a, _), value in known.items() if (r, a) == (row, base))
            yield f"| {name}, {fit} | {seeds} | {level:.2f} | " + " | ".join(text for _, text in cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="*", help="patterns of network/fit, with semicolons between them")
    parser.add_argument("--arms", default="*", help="patterns of arms, with semicolons between them")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.list:
        print("\n".join([*(f"{name}/{fit}" for name, fit in rows()), "", *ARMS]))
        return
    if not args.table:
        warnings.simplefilter("ignore")
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        torch.set_num_threads(1)
        measure(args.results, args.rows.split(";"), args.arms.split(";"), args.seeds)
    known = read(args.results)
    qat = arms_of(known, QAT)
    now = [arm for arm in qat if not arm.endswith(FX)]
    tables = [(now, PTQ), (qat, PLAIN), ([QAT], f"{QAT}{FX}"), ([PTQ], f"{PTQ}{FX}"), (arms_of(known, PTQ), PLAIN)]
    tables += [([arm for arm in now if "distilled" in arm], QAT)]
    cuts = arms_of(known, CUT)
    before = [arm for arm in cuts if arm.startswith(BEFORE)]
    tables += [([arm for arm in cuts if arm not in before], PLAIN), ([CUT], BEFORE), (before, PLAIN)]
    for arms, base in [*tables, (arms_of(known, ZEROS), PLAIN)]:
        print(f"\n{BEFORE if arms == before else arms[0].partition(', ')[0]}, to {base}:\n")
        print("\n".join(table(known, arms, base)))


if __name__ == "__main__":
    main()
