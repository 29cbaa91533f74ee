"""Measures what networks keep that lose weights, channels or blocks: without training, and after a short fit.

A seed draws the calibration and the held-out samples; all arms of a row and a seed get the same, so ratios are paired
by seed; in brackets is the 95 % t-interval. The loss is 1 less the agreement with the original's outputs; latency, at
batch 1, is measured by turns and a ratio to the original's. Results are appended to a file as they come, and what it
holds isn't measured again, so a run may be broken off:

    python benchmarks/compensation.py --rows "voices;pitch" --arms "MACs*;2:4*" --seeds 1  # patterns
    python benchmarks/compensation.py --list                                               # the rows and arms
    python benchmarks/compensation.py --table > benchmarks/compensation.md                 # of what was measured

Arms and rows that can't be measured here are left out, with a word.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from compensation_arms import ARMS, ORIGINAL, TODAY, Arm, Missing, macs
from compensation_fits import BY_HAND, FITS
from compensation_networks import ROWS, Row
from scipy.stats import t as student_t
from torch import nn

from lightning_compress.modules.latency import latency_ratio

ALL: dict[str, Arm] = {**ARMS, **FITS}
Result = dict[str, Any]
Results = dict[tuple[str, str, int], Result]
HELD_OUT, OTHER, LATENCY = "held_out", "other", "latency"


def result(row: Row, arm: Arm, original: nn.Module, seed: int) -> Result:
    """What an arm made of a row's network; only ``problem`` where it fails."""
    calibration, start = row.calibration(seed), time.process_time()
    try:
        model = arm(row, copy.deepcopy(original), calibration, seed)
    except Missing:
        raise
    except Exception as error:  # a table must show who failed
        return {"problem": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}
    seconds, sample = time.process_time() - start, calibration[0][:1]
    return {
        HELD_OUT: 1 - row.agreement_on(model, original, row.held_out(seed)),
        OTHER: 1 - row.agreement_on(model, original, row.other_kind()),
        "accuracy": None if row.labelled is None else row.score(model),
        "macs": macs(model, sample) / macs(original, sample),
        LATENCY: latency_ratio(original, model, lambda network: network(sample)),
        "seconds": round(seconds, 2),
    }


def read(path: Path) -> Results:
    if not path.exists():
        return {}
    lines = map(json.loads, path.read_text("utf-8").splitlines())
    return {(line["row"], line["arm"], line["seed"]): line for line in lines}


def matching(names: Iterable[str], patterns: str) -> list[str]:
    return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns.split(";"))]


def measure(path: Path, rows: list[str], arms: list[str], seeds: int) -> None:
    known = read(path)
    for name in rows:
        row = ROWS[name]
        if row.missing:
            print(f"{name}: left out, {row.package} isn't installed", file=sys.stderr)
            continue
        original = row.build()
        for seed in range(seeds):
            for arm in arms:
                if (name, arm, seed) in known:
                    continue
                try:
                    found = result(row, ALL[arm], original, seed)
                except Missing as reason:
                    if seed == 0:
                        print(f"{name}, {arm}: left out, {reason}", file=sys.stderr)
                    continue
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"row": name, "arm": arm, "seed": seed, **found}) + "\n")
                print(f"{name}, {arm}, seed {seed}: {found}", file=sys.stderr)


def values(known: Results, row: str, arm: str, key: str) -> dict[int, float]:
    """Seed to what was measured."""
    return {
        seed: line[key] for (r, a, seed), line in known.items() if (r, a) == (row, arm) and line.get(key) is not None
    }


def half_width(sample: list[float]) -> float:
    return float(student_t.ppf(0.975, len(sample) - 1)) * statistics.stdev(sample) / len(sample) ** 0.5


def mean(found: dict[int, float], digits: int = 3) -> str:
    sample = list(found.values())
    if len(sample) < 2:
        return f"{sample[0]:.{digits}f}" if sample else ""
    return f"{statistics.mean(sample):.{digits}f} [±{half_width(sample):.{digits}f}]"


def ratio(found: dict[int, float], base: dict[int, float]) -> str:
    """The ratio of the means over the same seeds; its interval is that of ``found - ratio * base``, scaled alike."""
    seeds = found.keys() & base.keys()
    below = statistics.mean(base[seed] for seed in seeds) if seeds else 0.0
    if below <= 0:
        return "–" if seeds else ""
    fraction = statistics.mean(found[seed] for seed in seeds) / below
    if len(seeds) < 2:
        return f"{fraction:.2f}"
    half = half_width([found[seed] - fraction * base[seed] for seed in seeds]) / below
    return f"{fraction:.2f} [{fraction - half:.2f}, {fraction + half:.2f}]"


def best(known: Results, row: str, arms: list[str]) -> str | None:
    """The arm whose loss on held-out samples is least."""
    losses = {arm: values(known, row, arm, HELD_OUT) for arm in arms}
    return min(
        (arm for arm in arms if losses[arm]), key=lambda arm: statistics.mean(losses[arm].values()), default=None
    )


def cells(known: Results, row: str, arm: str, bases: list[str | None]) -> list[str]:
    """A line of a table: losses with their ratios to those of the ``bases``, and the rest."""
    found = {key: values(known, row, arm, key) for key in (HELD_OUT, OTHER, "accuracy", "macs", LATENCY, "seconds")}
    if not found[HELD_OUT]:
        problems = [line["problem"] for (r, a, _), line in known.items() if (r, a) == (row, arm)]
        return [f"fails: {problems[0][:120]}".replace("|", "/"), *[""] * (2 * len(bases) + 6)]
    line = [str(len(found[HELD_OUT]))]
    for key in (HELD_OUT, OTHER):
        line.append(mean(found[key]))
        line += [ratio(found[key], values(known, row, base, key)) if base else "" for base in bases]
    line += [mean(found["accuracy"]), mean(found["macs"]), mean(found[LATENCY], 2)]
    return [*line, f"{statistics.mean(found['seconds'].values()):.1f}"]


def table(known: Results, group: str) -> Iterator[str]:
    """All networks and arms of a group; of torch-pruning's arms the best on each network."""
    arms = [arm for arm in ALL if arm.split(", ")[0] == group]
    rivals = [arm for arm in arms if BY_HAND in arm]
    heads = ["to today's", *(["to torch-pruning's best"] if rivals else [])]
    titles = ["Network", "Arm", "Seeds", "Loss, held-out", *heads, "Loss, other kind", *heads]
    yield f"| {' | '.join([*titles, 'Accuracy', 'MACs', 'Latency', 'CPU (s)'])} |"
    yield "|:--|:--|" + "--:|" * (len(titles) + 2)
    for row in ROWS:
        there = [arm for arm in arms if any(key[:2] == (row, arm) for key in known)]
        rival = best(known, row, rivals)
        bases = [f"{group}, {TODAY}", *([rival] if rivals else [])]
        for arm in there:
            if arm not in rivals or arm == (rival or next(arm for arm in there if arm in rivals)):
                shown = arm.partition(", ")[2] or arm
                yield f"| {' | '.join([row, shown, *cells(known, row, arm, bases)])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="*", help="patterns of rows, with semicolons between them")
    parser.add_argument("--arms", default="*", help="patterns of arms, with semicolons between them")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.list:
        print("\n".join([*ROWS, "", *ALL]))
        return
    if not args.table:
        warnings.simplefilter("ignore")
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        torch.set_num_threads(1)
        measure(args.results, matching(ROWS, args.rows), matching(ALL, args.arms), args.seeds)
    known = read(args.results)
    for group in dict.fromkeys(arm.split(", ")[0] for arm in ALL):
        if any(arm.split(", ")[0] == group for _, arm, _ in known):
            print(f"\n{'Nothing removed' if group == ORIGINAL else group}:\n")
            print("\n".join(table(known, group)))


if __name__ == "__main__":
    main()
