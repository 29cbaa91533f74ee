"""Which models does a report tell of? They are measured in a run, and timed in turns when it has ended."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_compress.callback import ReportFile
from lightning_compress.deployable import drop_helpers_
from lightning_compress.distillation.calling import call
from lightning_compress.errors import in_a_line
from lightning_compress.modules.copying import copy_module
from lightning_compress.modules.isolation import isolated_inference
from lightning_compress.modules.paths import modules_of
from lightning_compress.report.facts import FileFacts
from lightning_compress.report.inputs import batch_size_of, called_in_turn, resize_batch, to_device
from lightning_compress.report.latency import measure_latency
from lightning_compress.report.measure import Measurement, count
from lightning_compress.report.quantized import with_errors
from lightning_compress.report.ratios import AFTER, BEFORE, TESTED
from lightning_compress.report.storage import measure_layers

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class Rows:
    """What is known of each row.

    Attributes:
        batch_sizes: at which latency is measured.
        max_seconds: for each batch size and row.
        threads: of torch while latency is measured.
        measurements: by name of the row.
        models: structural copies of those that run, to time them; the original's is the last thing that knows it.
        files: rows of files that were written of a model, each a part of ``models`` where it can be timed.
        timed: rows that have been timed together.
        notes: what couldn't be measured, by what it is about.
        inputs: what the models are called with: the calls of their modules at the paths of ``called``.
        no_inputs: why there are none.
    """

    batch_sizes: tuple[int, ...]
    max_seconds: float
    threads: int | None
    measurements: dict[str, Measurement] = field(default_factory=dict)
    models: dict[str, nn.Module] = field(default_factory=dict)
    files: dict[str, ReportFile] = field(default_factory=dict)
    timed: frozenset[str] = frozenset()
    notes: dict[str, str] = field(default_factory=dict)
    inputs: Any = None
    called: tuple[str, ...] = ()
    no_inputs: str = "no batch was seen."

    def take_inputs(self, calls: Mapping[str, Any]) -> None:
        """Keep the first samples on the CPU; a copy, as a step may change its batch in place."""
        inputs, self.called = tuple(calls.values()), tuple(calls)
        most = min(max(self.batch_sizes), batch_size_of(inputs))
        self.inputs = resize_batch(to_device(inputs, torch.device("cpu")), most)

    def of(self, model: nn.Module) -> str | None:
        """Return the last row that has the layers of ``model``."""
        layers = measure_layers(structural_copy(model))
        names = (name for name in reversed(self.measurements) if name not in self.files)
        return next((name for name in names if self.measurements[name].layers == layers), None)

    def add(self, model: nn.Module) -> str:
        """Measure another form of the model; return its row."""
        name = TESTED if AFTER in self.measurements else AFTER
        self.measure(name, model)
        return name

    def add_file(self, file: ReportFile) -> None:
        """Take up a file of the model that was measured last: its parameters and MACs are that model's."""
        written_of = next(name for name in reversed(self.measurements) if name not in self.files)
        model = self.measurements[written_of]
        self.measurements.pop(file.name, None)
        self.measurements[file.name] = replace(
            model,
            size_bytes=file.size_bytes,
            compressed_bytes=None,
            latency=(),
            layers=(),
            device="cpu",
            quantized=None,
            file=FileFacts.of(file.facts),
        )
        self.files[file.name] = file
        self.timed -= {file.name}
        if self.inputs is not None and self.called == (file.path,):
            self.models[file.name] = file.open(self.threads)
        else:
            self.notes[file.name] = f"{file.name}: no latency, as the steps call more than what is in the file."

    def run_before(self, model: nn.Module) -> None:
        """Measure the original once there are inputs: zeros and bytes stay as they were when it was weighed.

        Since then a callback may have pruned what both share.
        """
        weighed = self.measurements.get(BEFORE)
        self.measure(BEFORE, model)
        if weighed is not None:
            run = self.measurements[BEFORE]
            self.measurements[BEFORE] = replace(weighed, macs=run.macs, uncounted=run.uncounted)
        elif not self.measurements[BEFORE].parameters:
            # Its `configure_model` comes after `setup`: there was no model yet.
            del self.measurements[BEFORE]
            self.models.pop(BEFORE, None)

    def measure(self, name: str, model: nn.Module) -> None:
        """Measure all but latency, and keep the model for that if it runs."""
        self.models.pop(name, None)
        self.timed -= {name}
        still = structural_copy(model)
        self.measurements[name] = count(still)
        if self.inputs is None:
            self.notes[name] = f"{name}: no MACs and no latency, there are no example inputs: {self.no_inputs}"
            return
        try:
            with called_in_turn(still, self.called):
                measured = count(still, self.inputs)
            facts = with_errors(measured.quantized, still, self.inputs, self._run)
            self.measurements[name] = replace(measured, quantized=facts)
        except Exception as error:
            # `forward` is the user's and may need what only the steps provide.
            self.notes[name] = (
                f"{name}: no MACs and no latency, `forward` couldn't be run alone ({in_a_line(error)}). "
                "Set `example_input_array`."
            )
            return
        if still is model and name == BEFORE:
            self.notes[name] = f"{name}: no latency, as no copy of {type(model).__name__} can be kept until the end."
        else:
            self.models[name] = still

    def _run(self, model: nn.Module, calls: Any) -> None:
        modules = modules_of(model, every_name=True)
        for path, (args, kwargs) in zip(self.called, calls, strict=True):
            modules[path](*args, **kwargs)

    def time(self) -> None:
        """Time all rows in turns, unless they were all there the last time."""
        if self.timed >= self.models.keys():
            return
        with ExitStack() as stack:
            for name, model in self.models.items():
                stack.enter_context(called_in_turn(model, ("",) if name in self.files else self.called))
            sized: dict[str, dict[int, Any]] = {}
            for size in dict.fromkeys(self.batch_sizes):
                inputs = resize_batch(self.inputs, size)
                for name, model in self.models.items():
                    try:
                        with isolated_inference(model):
                            call(model, inputs)
                        sized.setdefault(name, {})[size] = inputs
                    except Exception as error:
                        self.notes[f"{name} {size}"] = f"{name}: no latency at batch {size} ({in_a_line(error)})."
            slots = {name: (self.models[name], by_size) for name, by_size in sized.items()}
            latency = measure_latency(slots, self.max_seconds, self.threads)
            threads = self.threads or torch.get_num_threads()
            for name, found in latency.items():
                self.measurements[name] = replace(self.measurements[name], latency=found, threads=threads)
            self.timed = frozenset(self.models)


def structural_copy(model: Model) -> Model:
    """Copy modules and their attributes, but share the tensors on the CPU and bring the others there."""
    tensors = (tensor for tensor in (*model.parameters(), *model.buffers()) if not is_lazy(tensor))
    shared = {id(tensor): _on_cpu(tensor) for tensor in tensors}
    try:
        copied = copy_module(model, shared)
    except Exception:
        # Not every module can be copied; measuring it as it stands restores it too, only a later change would show.
        return model
    drop_helpers_(copied)
    return copied


def _on_cpu(tensor: Tensor) -> Tensor:
    # Another object that shares its memory: the original may lose channels before the copy is measured.
    moved = tensor.detach().cpu()
    return nn.Parameter(moved, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved
