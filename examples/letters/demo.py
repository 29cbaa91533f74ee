"""Show the whole package in one script: a teacher, a student that learns from it, and what each step brings.

Six models read the middle letter in pictures of 28x28 pixels that this script draws:

1. a teacher, a residual CNN;
2. a small student, trained alone: what compression has to beat;
3. the same student, taught by the teacher;
4. that one with half of its multiply-accumulates removed: whole channels are gone;
5. that one trained for int8;
6. the last one as a file, which onnxruntime runs without torch.

Run it with `make demo`, or `python examples/letters/demo.py` (add `--epochs 1 --pictures 500` for a quick look).
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from torch import nn

sys.path.append(str(Path(__file__).parents[2]))  # the clone, as for `lightning-compress`

from examples.digits.networks import Classifier
from examples.letters.data import Letters
from examples.letters.networks import Student, Teacher
from examples.letters.show import BATCH, steps_table, verdict
from lightning_compress import (
    ChannelPruning,
    Distillation,
    ExportModel,
    QuantizationAwareTraining,
    RuntimeModule,
    SoftTarget,
    compare,
    export,
)
from lightning_compress.report import Comparison, Measurement, measure_in_turns
from lightning_compress.report.files import write
from lightning_compress.report.plots import plot_report

TEACHER, ALONE, DISTILLED, HALVED, INT8 = MODELS = ("teacher", "student alone", "distilled", "half the MACs", "int8")
# A file or a pipe has no width; rich would take 80 and cut columns off.
console = Console() if Console().is_terminal else Console(width=120)


class Epochs(NamedTuple):
    """How long is trained: a whole network, after channels have left, and for int8."""

    whole: int = 8
    channels: int = 5
    int8: int = 3


def teaching(teacher: nn.Module) -> Distillation:
    """Return the callback by which whatever is trained learns from the teacher's answers too."""
    return Distillation(teacher, [SoftTarget(temperature=4.0, weight=0.75)], task_weight=0.25)


def fit(network: nn.Module, data: Letters, epochs: int, name: str, *callbacks: L.Callback) -> nn.Module:
    """Train a copy of a network; whatever else happens to it is a callback."""
    model = Classifier(copy.deepcopy(network), lr=2e-3 if name in (HALVED, INT8) else 3e-3)
    make_trainer(max_epochs=epochs, callbacks=[*callbacks, OneLine(name)]).fit(model, data)
    return model.network


def make_trainer(**settings: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        **settings,
    )


def accuracy(network: nn.Module, data: Letters) -> float:
    """The accuracy of `trainer.test`, also of a network that is a file."""
    return make_trainer().test(Classifier(network), data, verbose=False)[0]["test_acc"]


def train_students(teacher: nn.Module, data: Letters, epochs: Epochs, *for_int8: L.Callback) -> dict[str, nn.Module]:
    alone = fit(Student(), data, epochs.whole, ALONE)
    distilled = fit(Student(), data, epochs.whole, DISTILLED, teaching(teacher))
    halved = fit(distilled, data, epochs.channels, HALVED, teaching(teacher), ChannelPruning(macs=0.5))
    int8 = fit(halved, data, epochs.int8, INT8, teaching(teacher), *for_int8)
    return dict(zip(MODELS[1:], (alone, distilled, halved, int8), strict=True))


def measure_all(models: dict[str, nn.Module], data: Letters, file: Path) -> tuple[Comparison, dict[str, Measurement]]:
    """Measure the models in torch, and each as a file in onnxruntime, all in turns; the int8 file is a row too."""
    pictures = next(iter(data.test_dataloader()))[0][:BATCH]
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder, f"{number}.onnx") for number, name in enumerate(models)} | {INT8: file}
        for name in MODELS[:-1]:
            export(models[name], pictures, files[name])
        sessions = {name: RuntimeModule(path, threads=1) for name, path in files.items()}
    console.print("testing and measuring ...")  # no spinner: its thread would be measured too
    slots = models | {in_onnxruntime(name): session for name, session in sessions.items()}
    rows = measure_in_turns(slots, pictures, batch_sizes=[1, BATCH], max_seconds=0.5, threads=1)
    in_runtime = {name: rows[in_onnxruntime(name)] for name in models}
    served = replace(rows[INT8], size_bytes=file.stat().st_size, latency=in_runtime[INT8].latency, layers=())
    shown = {name: rows[name] for name in models} | {in_onnxruntime(INT8): served}
    tested = models | {in_onnxruntime(INT8): sessions[INT8]}
    metrics = {name: {"test_acc": accuracy(network, data)} for name, network in tested.items()}
    return compare(shown, metrics=metrics), in_runtime


def in_onnxruntime(name: str) -> str:
    return f"{name} in onnxruntime"


class OneLine(L.Callback):
    """A progress bar for each model, which stays as one line."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.started = time.perf_counter()
        self.progress = Progress(
            TextColumn("{task.description:<16}"), BarColumn(24), TextColumn("{task.fields[state]}"), console=console
        )
        self.task = self.progress.add_task(self.name, total=trainer.max_epochs, state="")
        self.progress.start()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        seconds = time.perf_counter() - self.started
        state = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {seconds:3.0f} s"
        state += f"  reads {100 * trainer.callback_metrics['val_acc']:.1f} % of the letters"
        self.progress.update(self.task, advance=1, state=state)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.progress.stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.progress.stop()


def quiet() -> None:
    """Lightning's hints for beginners and the deprecations between its dependencies aren't about this script."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for module in ("lightning", "torch"):
        warnings.filterwarnings("ignore", module=rf"{module}\.")


def main() -> None:
    parser = argparse.ArgumentParser(description="From a teacher to an int8 file that reads letters.")
    parser.add_argument("--epochs", type=int, help="for every model; fewer than by default is a quick look")
    parser.add_argument("--pictures", type=int, default=6000, help="to train on")
    parser.add_argument("--seed", type=int, default=0, help="of weights and of the pictures to train on")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder of the report")
    arguments = parser.parse_args()
    quiet()

    output, count = arguments.output, arguments.pictures
    console.print(f"Five networks learn to read the middle letter of {count:,} noisy pictures.\n", highlight=False)
    output.mkdir(parents=True, exist_ok=True)
    L.seed_everything(arguments.seed, verbose=False)
    data = Letters(count, seed=arguments.seed)
    epochs = Epochs() if arguments.epochs is None else Epochs(*[arguments.epochs] * 3)
    file = output / "letters_int8.onnx"
    teacher = fit(Teacher(), data, epochs.whole, TEACHER)
    # The last student is converted when its fit ends, then written, and proven in onnxruntime.
    for_int8 = QuantizationAwareTraining(), ExportModel(str(file))
    models = {TEACHER: teacher, **train_students(teacher, data, epochs, *for_int8)}
    comparison, in_runtime = measure_all(models, data, file)
    write(comparison, output, picture=True, histories=(), failed=console.print)
    plot_report(comparison, output / "report.png", layers_of=(DISTILLED, INT8))
    console.print(steps_table(comparison, in_runtime, data.test))
    for note in comparison.notes:
        console.print(f"- {note}", style="dim", markup=False, highlight=False)
    console.print(f"\n[bold]{verdict(comparison, in_runtime, in_onnxruntime(INT8))}[/bold]", highlight=False)
    page = next(path for name in ("report.html", "report.md") if (path := output / name).is_file())
    console.print(f"The file: {file}\nThe report: {page}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
