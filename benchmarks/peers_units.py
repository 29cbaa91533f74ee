"""Measures the rows of a table for a network and a seed: all of them side by side, so that their files take turns."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gzip
import importlib
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "digits"))  # the examples are no package

import int8_speed
import lightning as L
import peers_code as code
import torch
from compensation_arms import macs
from defaults_rows import TASKS, Data, Module, Task
from int8_speed import in_turns, typical_ms
from networks import Teacher
from peers_rows import EAGER, TABLES, Row
from runtimes_files import bind, file_bytes, write_float
from torch import Tensor, nn
from torch.utils.data import TensorDataset

BATCH, ROUNDS, SECONDS = 16, 9, 0.05
RATE, TUNING_RATE, PRETRAINED_RATE = 2e-3, 5e-4, 1e-4


@dataclasses.dataclass
class Served:
    """What answers: a file in its runtime, or a module in torch."""

    row: Row
    network: nn.Module
    path: Path

    def bind(self, x: Tensor) -> Any:
        if self.row.runtime == EAGER:
            return partial(self.network, x)
        return bind(self.row.runtime, self.path, x, 1)

    def outputs(self, inputs: Tensor) -> Tensor:
        return torch.cat([self.bind(part)().clone() for part in inputs.split(BATCH)])


def module(task: Task, network: nn.Module, rate: float, seed: int) -> Module:
    L.seed_everything(2000 + seed, verbose=False)  # what a fit draws
    return Module(network.train(), task, rate, cosine=True)


def fresh(task: Task, seed: int) -> nn.Module:
    L.seed_everything(1000 + seed, verbose=False)
    return task.network()


@functools.cache
def trained(name: str, seed: int) -> nn.Module:
    """The network of a task after the fit of the row `dense`, or as its package brings it."""
    task = TASKS[name]
    network = fresh(task, seed)
    return (network if task.package else code.plain(module(task, network, RATE, seed), Data(task, seed))).eval()


@functools.cache
def teacher(seed: int) -> nn.Module:
    task = dataclasses.replace(TASKS["cnn-bn"], network=Teacher)
    return code.plain_tuning(module(task, fresh(task, seed), RATE, seed), Data(task, seed)).eval()


def few(task: Task) -> Task:
    """The same with fewer of its training samples."""

    def data(seed: int) -> tuple[TensorDataset, TensorDataset]:
        train, test = task.data(seed)
        return TensorDataset(*train[: code.LABELLED]), test

    return dataclasses.replace(task, data=data)


def calibration(task: Task, seed: int, count: int = 64) -> list[Tensor]:
    inputs = task.data(seed)[0].tensors[0]
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    return list(inputs[order[:count]].split(BATCH))


def make(table: str, name: str, seed: int, row: Row, folder: Path) -> tuple[Served, dict[str, Any]]:
    """The outcome of a row, and what it took."""
    task = few(TASKS[name]) if table == "distillation" else TASKS[name]
    arguments: list[Any]
    if table == "int8":
        arguments = [copy.deepcopy(trained(name, seed)), calibration(task, seed), folder]
    elif table == "channels":
        rate = PRETRAINED_RATE if task.package else TUNING_RATE
        arguments = [module(task, copy.deepcopy(trained(name, seed)), rate, seed), Data(task, seed)]
    else:
        arguments = [module(task, fresh(task, seed), RATE, seed), Data(task, seed)]
        arguments += [copy.deepcopy(teacher(seed))] if table == "distillation" else []
    for package in row.packages:
        importlib.import_module(package)  # which takes long, once
    wall, cpu = time.perf_counter(), time.process_time()
    made = row.code(*arguments)
    took = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    x = task.data(seed)[1].tensors[0][:BATCH]
    if table == "int8":
        network, path = made if row.runtime == EAGER else (trained(name, seed), made)
    else:
        network, path = made.eval(), write_float(made.eval(), x, folder / "float.onnx")
    return Served(row, network, path), took


def counts(table: str, name: str, seed: int, served: Served) -> dict[str, Any]:
    """What a network's file and arithmetic come to, and how good its answers are."""
    task = TASKS[name]
    inputs, target = (part[: len(part) // BATCH * BATCH] for part in task.data(seed)[1].tensors)
    arithmetic = trained(name, seed) if table == "int8" else served.network
    found = {
        "score": 100 * float(task.score(served.outputs(inputs), target)),
        "bytes": file_bytes(served.path),
        "macs": macs(arithmetic, inputs[:1]),
    }
    if table == "sparsity":
        layers = [layer for layer in served.network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
        weights = torch.cat([layer.weight.flatten() for layer in layers])
        found |= {"zeros": float((weights == 0).float().mean()), "gzip": len(gzip.compress(served.path.read_bytes()))}
    return found


def missing(row: Row) -> list[str]:
    return [package for package in row.packages if importlib.util.find_spec(package) is None]


def measure(table: str, name: str, seed: int) -> Iterator[dict[str, Any]]:
    """The rows of a table, those with all they need; one that fails says how."""
    entries: dict[str, tuple[Served, dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as place:
        for number, row in enumerate(TABLES[table].rows):
            if missing(row):
                continue
            (folder := Path(place, str(number))).mkdir()
            try:
                served, took = make(table, name, seed, row, folder)
                with torch.no_grad():
                    entries[row.name] = served, took | counts(table, name, seed, served)
            except Exception as error:
                yield {"row": row.name, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        x = TASKS[name].data(seed)[1].tensors[0][:BATCH]
        with torch.no_grad():
            turns = {key: partial(typical_ms, served.bind(x), SECONDS) for key, (served, _) in entries.items()}
            int8_speed.now = time.process_time
            times = in_turns(turns, ROUNDS, 0.0)
    for key, (served, found) in entries.items():
        bases = times.get(served.row.base or key)
        ratios = [value / base for value, base in zip(times[key], bases, strict=True)] if bases else []
        latency = {"ms": statistics.median(times[key])} | ({"ratio": statistics.median(ratios)} if ratios else {})
        yield {"row": key} | found | latency
