"""Measures what it takes to prune a pretrained network, or to cut its channels, by a calibration: time and memory.

Each is done in a process of its own, on two threads unless told otherwise. Memory is the most that the process held
beyond what it held before, when the network was there and had run its calibration once; the network's size stands
beside it.

    python benchmarks/compensation_cost.py --rounds 3
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from compensation_networks import ROWS, Batches
from torch import nn

from lightning_compress import plan_removal, prune_, remove_channels_

SAMPLES = {"sentences": 192, "pitch, full": 96, "voices": 192}
MEBI = 2**20


def _sparse(scope: str) -> Callable[[nn.Module, Batches], None]:
    def prune(model: nn.Module, batches: Batches) -> None:
        prune_(model, 0.5, "least_squares", scope=scope, calibration=batches)

    return prune


def _narrow(model: nn.Module, batches: Batches) -> None:
    remove_channels_(model, plan_removal(model, macs=0.5, calibration=batches), calibration=batches)


JOBS: dict[str, Callable[[nn.Module, Batches], None]] = {
    "50 %, by layer": _sparse("layer"),
    "50 %, by sensitivity": _sparse("global"),
    "MACs 0.5": _narrow,
}


def measure(name: str, job: str, threads: int, answer: Any) -> None:
    """Send seconds by the clock, of CPU time, MiB beyond the network, and MiB of its parameters."""
    torch.set_num_threads(threads)
    model = ROWS[name].build()
    batches = list(torch.cat(ROWS[name].calibration(0))[: SAMPLES[name]].split(ROWS[name].batch))
    with torch.no_grad():
        for batch in batches:
            copy.deepcopy(model)(batch)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    clock, cpu = time.perf_counter(), time.process_time()
    JOBS[job](model, batches)
    seconds = time.perf_counter() - clock, time.process_time() - cpu
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = sum(parameter.nbytes for parameter in ROWS[name].build().parameters())
    answer.send((*seconds, (most - held) / 1024, size / MEBI))


def in_a_process(name: str, job: str, threads: int) -> tuple[float, ...]:
    context = multiprocessing.get_context("spawn")
    answer, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(name, job, threads, sender))
    process.start()
    sender.close()
    found: tuple[float, ...] = answer.recv()
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    print("| Network, samples | What is done | Seconds | of CPU time | MiB beyond it | MiB of parameters |")
    print("|:--|:--|--:|--:|--:|--:|")
    for name in SAMPLES:
        if ROWS[name].missing:
            print(f"{name}: left out, {ROWS[name].package} isn't installed")
            continue
        for job in JOBS:
            rounds = [in_a_process(name, job, args.threads) for _ in range(args.rounds)]
            clock, cpu, beyond, size = (statistics.median(values) for values in zip(*rounds, strict=True))
            spread = f"{min(r[0] for r in rounds):.0f} to {max(r[0] for r in rounds):.0f}"
            cells = [f"{name}, {SAMPLES[name]}", job, f"{clock:.0f} ({spread})", f"{cpu:.0f}", f"{beyond:.0f}"]
            print(f"| {' | '.join([*cells, f'{size:.0f}'])} |", flush=True)


if __name__ == "__main__":
    main()
