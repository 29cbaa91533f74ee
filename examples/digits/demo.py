"""Show the whole package in one script: a teacher, a student that learns from it, and a report that measures both.

Four models are made on scikit-learn's handwritten digits:

1. a teacher, a residual CNN;
2. a small student, trained alone: what compression has to beat;
3. the same student, taught by the teacher, pruned on a schedule and trained for int8, all in one `fit`;
4. its int8 form, which that `fit` leaves behind.

Run it with `make demo`, or `python examples/digits/demo.py` (add `--epochs 1` for a quick look).
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from functools import partial
from pathlib import Path

import lightning as L
import torch
from data import Digits
from lightning.pytorch.callbacks import ModelCheckpoint
from networks import Classifier, Student, Teacher
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from torch import nn

from lightning_compress import (
    DistillationModule,
    FeatureMSE,
    QuantizationAwareTraining,
    ScheduledPruning,
    SoftTarget,
    compare,
    load_compressed,
)
from lightning_compress.report import measure_in_turns
from lightning_compress.report.compare import Comparison
from lightning_compress.report.plots import plot_report

TEACHER_EPOCHS, STUDENT_EPOCHS = 15, 40
TEACHER, ALONE, PRUNED, INT8 = ROWS = ("teacher", "student alone", "distilled and pruned", "its int8 form")
# A file or a pipe has no width; rich would take 80 and cut columns off.
console = Console() if Console().is_terminal else Console(width=120)


def train_teacher(data: Digits, epochs: int = TEACHER_EPOCHS, progress: bool = True) -> Classifier:
    model = Classifier(Teacher())
    fit(model, data, epochs, "teacher" if progress else "")
    return model


def train_alone(data: Digits, epochs: int = STUDENT_EPOCHS, progress: bool = True) -> Classifier:
    model = Classifier(Student())
    fit(model, data, epochs, "student alone" if progress else "")
    return model


def distil(
    teacher: nn.Module,
    data: Digits,
    epochs: int = STUDENT_EPOCHS,
    callbacks: tuple[L.Callback, ...] = (),
    progress: bool = True,
) -> DistillationModule:
    """Teach a student; pruning and quantization are two more callbacks of the same `fit`."""
    module = DistillationModule(
        student=Student(),
        teacher=teacher,
        task_weight=0.25,
        losses=[
            SoftTarget(temperature=4.0, weight=0.75),
            # 48 channels against 96: a regressor between them is made by itself, and trained along.
            FeatureMSE(student_layer="features", teacher_layer="features", weight=0.25),
        ],
        optimizer=partial(torch.optim.AdamW, lr=3e-3),
        scheduler=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=epochs),
    )
    fit(module, data, epochs, "student distilled, pruned" if progress else "", callbacks)
    return module


def compression() -> tuple[L.Callback, ...]:
    """Zero half of the student's weights on a schedule; train it for int8 and convert it when the fit ends."""
    return ScheduledPruning("l1_unstructured", sparsity=0.5), QuantizationAwareTraining()


def fit(
    model: L.LightningModule, data: Digits, epochs: int, name: str = "", callbacks: tuple[L.Callback, ...] = ()
) -> None:
    shown = (OneLine(name),) if name else ()
    L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[*callbacks, *shown],
        check_val_every_n_epoch=min(5, epochs),
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_model_summary=False,
        enable_progress_bar=False,
    ).fit(model, data)


def test(model: L.LightningModule, data: Digits) -> dict[str, float]:
    """The metrics of `trainer.test`; of the int8 model, if the module was converted."""
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    return dict(trainer.test(model, data, verbose=False)[0])


def float_form(checkpoint: str | Path) -> Student:
    """The distilled and pruned student before int8, out of a checkpoint that was saved while it was trained.

    It holds the student's own keys, although the student was masked and fake-quantized then: plain torch loads it.
    """
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    student = Student()
    prefix = "student."
    student.load_state_dict({key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)})
    return student


def run(output: Path, teacher_epochs: int, student_epochs: int) -> Comparison:
    output.mkdir(parents=True, exist_ok=True)
    L.seed_everything(0, verbose=False)
    data = Digits()

    teacher = train_teacher(data, teacher_epochs)
    alone = train_alone(data, student_epochs)
    keep = ModelCheckpoint(output, filename="student_float", save_on_train_epoch_end=True, enable_version_counter=False)
    distilled = distil(teacher.network, data, student_epochs, (*compression(), keep))
    # What was trained is int8 now. One file keeps it, with what is needed to load it again.
    int8_file = output / "student_int8.ckpt"
    distilled.trainer.save_checkpoint(int8_file, weights_only=True)

    # Each model is tested as it would be used: the last two come from their files, into freshly built modules.
    again = Classifier(float_form(output / "student_float.ckpt"))
    int8 = load_compressed(str(int8_file), DistillationModule(student=Student()))
    models = dict(zip(ROWS, (teacher, alone, again, int8), strict=True))
    console.print("testing and measuring ...")  # no spinner: its thread would be measured too
    metrics = {name: {"test_acc": test(model, data)["test_acc"]} for name, model in models.items()}
    image = torch.zeros(1, 1, 8, 8)
    networks = dict(zip(ROWS, (teacher.network, alone.network, again.network, int8.student), strict=True))
    rows = measure_in_turns(networks, image, threads=1)
    notes = [
        "Zeros make dense kernels no faster and plain files no smaller. After zlib the pruned student takes "
        f"{rows[PRUNED].compressed_bytes / 1e3:.0f} KB, the student alone {rows[ALONE].compressed_bytes / 1e3:.0f} KB.",
        "One point of accuracy is 3.6 of the 360 test images; benchmarks/README.md has five folds, with intervals.",
    ]
    return compare(rows, metrics=metrics, notes=notes)


def write(comparison: Comparison, output: Path) -> None:
    (output / "report.json").write_text(comparison.to_json())
    (output / "report.md").write_text(comparison.to_markdown())
    plot_report(comparison, output / "report.png", layers_of=(ALONE, INT8))
    console.print()
    console.print(comparison.to_table())
    for note in comparison.notes:
        console.print(f"- {note}", highlight=False, soft_wrap=not console.is_terminal)


def verdict(comparison: Comparison) -> str:
    row = comparison[INT8]
    points = 100 * row.metric_changes["test_acc"]
    accuracy = f"{abs(points):.1f} points {'less' if points < 0 else 'more'} accurate" if points else "as accurate"
    return (
        f"The int8 student is {row.size_ratio:.0f} times smaller than the teacher, {row.speedup[1]:.1f} times faster "
        f"at batch 1, and {accuracy} on the test images."
    )


class OneLine(L.Callback):
    """A progress bar for each model, which stays as one line."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.started = time.perf_counter()
        self.progress = Progress(
            TextColumn("{task.description:<26}"), BarColumn(24), TextColumn("{task.fields[state]}"), console=console
        )
        self.task = self.progress.add_task(self.name, total=trainer.max_epochs, state="")
        self.progress.start()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        seconds = time.perf_counter() - self.started
        accuracy = trainer.callback_metrics.get("val_acc")
        state = f"epoch {trainer.current_epoch + 1:2d}/{trainer.max_epochs}  {seconds:3.0f} s"
        state += f"  val_acc {accuracy:.3f}" if accuracy is not None else ""
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
    parser = argparse.ArgumentParser(description="Teacher to int8 student on handwritten digits.")
    parser.add_argument("--epochs", type=int, help="for every model; fewer than by default is a quick look")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder of the report")
    arguments = parser.parse_args()
    quiet()
    # Images of 8x8 are too little work to share: more threads wait for each other.
    torch.set_num_threads(1)

    console.print("Three trainings on 1077 images of handwritten digits, then the report.\n")
    epochs = arguments.epochs
    comparison = run(arguments.output, epochs or TEACHER_EPOCHS, epochs or STUDENT_EPOCHS)
    write(comparison, arguments.output)
    console.print(f"\n[bold]{verdict(comparison)}[/bold]", highlight=False, soft_wrap=True)
    look = f"Look at {arguments.output}/report.png, and at report.md beside it for the numbers with their spread."
    console.print(look, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
