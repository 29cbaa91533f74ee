"""Measures how far calibrated int8 networks are from their float selves: those of `defaults.py`, trained or pretrained.

Calibrated on at most 256 training samples with nothing but the defaults, compared on the test samples that nothing
else has seen.

Run it with `python benchmarks/int8_agreement.py` (two minutes); a network whose package isn't installed is left out.
"""

from __future__ import annotations

import argparse
import logging
import warnings

import torch
from defaults_rows import TASKS, digits, trained
from torch import nn
from torch.nn import functional

from lightning_compress import quantize

CALIBRATING = 256


@torch.no_grad()
def row(name: str) -> str:
    task = TASKS[name]
    network: nn.Module = task.network().eval()
    if task.data is digits:
        network.load_state_dict(trained(name, 0))
    train, test = (part.tensors for part in task.data(0))
    batches = list(train[0][:CALIBRATING].split(task.batch))
    truth, outputs = network(test[0]), quantize(network, calibration=batches)(test[0])
    scores = [100 * task.score(found, test[1]).item() for found in (truth, outputs)]
    cosine = functional.cosine_similarity(truth.double(), outputs.double())
    same = 100 * (truth.argmax(1) == outputs.argmax(1)).double().mean()
    cells = [f"{scores[0]:.2f}", f"{scores[1] - scores[0]:+.2f}", f"{cosine.mean():.4f}", f"{cosine.min():.4f}"]
    return f"| {name} | {' | '.join(cells)} | {same:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="How far int8 is from float.")
    parser.add_argument("--networks", nargs="+", choices=TASKS, default=list(TASKS))
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    print("| Network | Score in float (%) | Int8 (points) | Mean cosine | Least of a sample | Same largest (%) |")
    print("|:--|--:|--:|--:|--:|--:|")
    for name in arguments.networks:
        if TASKS[name].missing:
            print(f"| {name} | its package isn't installed | | | | |")
        else:
            print(row(name), flush=True)


if __name__ == "__main__":
    main()
