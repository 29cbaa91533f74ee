"""Train a small network for int8 on handwritten digits, and write it as files for other runtimes.

Run it with `python examples/export/train.py`; `run.py` beside it then runs a file without torch and without this
package. Files are written for the runtimes that are installed: onnxruntime (the extra `onnx`), OpenVINO (`openvino`)
and ExecuTorch (`executorch`).
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import lightning as L
import numpy as np
import torch

from lightning_compress import ExportModel, QuantizationAwareTraining, StaticInt8

sys.path.append(str(Path(__file__).parents[1] / "digits"))

from data import Digits
from networks import Classifier, Student

FILES = {"onnxruntime": "digits.onnx", "openvino": "digits_openvino.onnx", "executorch": "digits.pte"}

parser = argparse.ArgumentParser(description="A file of handwritten digits for each runtime that is installed.")
parser.add_argument("--epochs", type=int, default=15)
parser.add_argument("--output", type=Path, default=Path("demo_output/export"), help="folder of the files")
arguments = parser.parse_args()

L.seed_everything(0, verbose=False)
model, data = Classifier(Student()), Digits()
exports = [
    ExportModel(str(arguments.output / name), target)
    for target, name in FILES.items()
    if importlib.util.find_spec(target)
]
trainer = L.Trainer(
    max_epochs=arguments.epochs,
    accelerator="cpu",
    # Rounded where ExecuTorch's kernels want it, which suits onnxruntime and OpenVINO too.
    callbacks=[QuantizationAwareTraining(StaticInt8(target="executorch")), *exports],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(model, data)  # when it ends the files are written, and proven
trainer.test(model, data)  # test_acc is that of the int8 model, onnxruntime/test_acc that of its file

images = torch.cat([images for images, _ in data.test_dataloader()])
with torch.inference_mode():
    classes = model(images).argmax(1)
np.savez(arguments.output / "digits.npz", images=images.numpy(), classes=classes.numpy())
print(f"{len(images)} test digits and the classes that the int8 model gives them: {arguments.output / 'digits.npz'}")
