"""Exports a network before and after half of its multiply-accumulates leave by a calibration, and compares the files.

Nothing is trained. Each file is proven against the model that it was written from; latency is measured by turns, each
in its runtime, as a ratio to the whole network's file, with the least and the greatest.

    python benchmarks/compensation_files.py --rows "residual;pitch" --threads 1
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import tempfile
import warnings
from pathlib import Path

import torch
from compensation_networks import ROWS, Batches, Row
from torch import Tensor, nn

from lightning_compress import CompressionError, RuntimeModule, export, plan_removal, remove_channels_
from lightning_compress.modules.latency import round_ratios

TARGETS = {"onnxruntime": "model.onnx", "openvino": "model.onnx", "executorch": "model.pte"}
SIZES = (1, 8)


def halved(row: Row, model: nn.Module) -> nn.Module:
    batches = row.calibration(0)
    remove_channels_(model, plan_removal(model, macs=0.5, calibration=batches), calibration=batches)
    return model


def runs(module: nn.Module, batches: Batches) -> Tensor:
    return torch.cat([module(batch) for batch in batches])


def line(row: Row, models: dict[str, nn.Module], target: str, folder: Path) -> str:
    """A row of the table: sizes, the loss of agreement in the runtime, and the latency."""
    files = {}
    for name, model in models.items():
        (folder / name).mkdir(exist_ok=True)
        sample = row.calibration(0)[0][:2]
        files[name] = Path(export(model, (sample,), folder / name / TARGETS[target], target=target).path)
    whole, half = (RuntimeModule(str(files[name])) for name in models)
    held_out = row.held_out(0)
    loss = 1 - row.agreement(runs(half, held_out), runs(whole, held_out))
    stored = [sum(part.stat().st_size for part in path.parent.iterdir()) / 1e6 for path in files.values()]
    cells = [row.name, target, f"{stored[0]:.2f}", f"{stored[1]:.2f}", f"{loss:.3f}"]
    for size in SIZES:
        sample = held_out[0][:size]
        ratios = round_ratios(whole, half, lambda module, x=sample: module(x), max_seconds=4.0, max_rounds=200)
        cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="residual")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(args.threads)
    print("| Network | Runtime | MB, whole | MB, half | Loss, held-out | Latency, batch 1 | batch 8 |")
    print("|:--|:--|--:|--:|--:|--:|--:|")
    for name in args.rows.split(";"):
        row = ROWS[name]
        if row.missing:
            print(f"{name}: left out, {row.package} isn't installed")
            continue
        whole = row.build()
        models = {"whole": whole, "half": halved(row, copy.deepcopy(whole))}
        for target in TARGETS:
            try:
                with tempfile.TemporaryDirectory() as folder:
                    print(line(row, models, target, Path(folder)), flush=True)
            except CompressionError as error:  # the runtime isn't installed, or refuses
                print(f"{name}, {target}: {error}")


if __name__ == "__main__":
    main()
