"""Times `plan_removal` at two commits by turns, each time in a process of its own, on one thread, in seconds of CPU.

    python benchmarks/planning_speed.py --before ../another/checkout --rounds 5

The networks are timm's, with random weights, on one picture.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
from pathlib import Path

NETWORKS = {"resnet50": 224, "resnet101": 224, "rdnet_tiny": 64, "mvitv2_tiny": 64, "hiera_tiny_224": 224}
HERE = Path(__file__).parent.parent


def seconds(name: str) -> float:
    import time

    import timm
    import torch

    from lightning_compress import plan_removal

    torch.set_num_threads(1)
    torch.manual_seed(0)
    options = {"img_size": NETWORKS[name]} if name == "mvitv2_tiny" else {}
    model, picture = timm.create_model(name, **options), torch.randn(1, 3, NETWORKS[name], NETWORKS[name])
    with torch.no_grad():
        model(picture)  # what torch does once isn't ours
    start = time.process_time()
    plan_removal(model, picture, macs=0.5)
    return time.process_time() - start


def timed(checkout: Path, name: str) -> float:
    paths = os.pathsep.join(filter(None, (str(checkout), os.environ.get("PYTHONPATH", ""))))
    run = subprocess.run(
        [sys.executable, __file__, "--network", name],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    return float(run.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, default=HERE, help="a checkout of another commit; by default this one")
    parser.add_argument("--only", default=",".join(NETWORKS), help="networks, by commas")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--network", choices=NETWORKS, help="time this one here and now")
    options = parser.parse_args()
    if options.network:
        print(seconds(options.network))
        return
    if importlib.util.find_spec("timm") is None:
        print("left out: timm isn't installed")
        return
    print("| Network | before, s | after, s | after / before, least to greatest |\n|:--|--:|--:|--:|")
    for name in options.only.split(","):
        rounds = [(timed(options.before.resolve(), name), timed(HERE, name)) for _ in range(options.rounds)]
        before, after = (statistics.median(times) for times in zip(*rounds, strict=True))
        ratios = sorted(new / old for old, new in rounds)
        middle = statistics.median(ratios)
        print(
            f"| {name} | {before:.1f} | {after:.1f} | {middle:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |", flush=True
        )


if __name__ == "__main__":
    main()
