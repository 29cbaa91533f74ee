"""The pages on files for other runtimes, and the example: each block runs, in the runtimes that are installed."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_compress.cli import main
from lightning_compress.quantization.numerics.int8 import needs_reduced_range
from tests.support.data import TinyData
from tests.support.modules import Classifier
from tests.test_examples import ROOT, blocks

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # Trainers as users write them; executorch warns of itself as it is imported
    pytest.mark.skipif(not find_spec("onnxruntime"), reason="The pages are of it."),
]
needs_openvino = pytest.mark.skipif(not find_spec("openvino"), reason="It is of OpenVINO.")
needs_executorch = pytest.mark.skipif(not find_spec("executorch"), reason="It is of ExecuTorch.")

WITHOUT = (
    "import runpy, sys; sys.modules.update(dict.fromkeys({blocked})); sys.argv = {argv}; runpy.run_path(sys.argv[0])"
)


def test_files_run_in_processes_without_this_package(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained for int8 here; in another process the file's class of every test digit is that of the model."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--epochs", "3"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    runpy.run_path(str(ROOT / "examples/export/train.py"))
    logged = set(re.findall(r"\S*test_acc", capsys.readouterr().out))
    files = sorted(Path("demo_output/export").glob("*.json"))
    assert "digits.onnx.json" in {file.name for file in files}
    for file in files:
        runtime = json.loads(file.read_text())["runtime"]
        assert {"test_acc", f"{runtime}/test_acc"} <= logged
        blocked = ["lightning_compress", *(["torch"] if runtime != "executorch" else [])]
        argv = [str(ROOT / "examples/export/run.py"), str(file.with_suffix(""))]
        command = [sys.executable, "-c", WITHOUT.format(blocked=blocked, argv=argv)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert "for 360 of 360 test digits" in done.stdout, done.stdout + done.stderr[-3000:]
        assert done.returncode == 0


@pytest.fixture
def names(own_folder: Path) -> dict[str, Any]:
    """What the pages take as given: a network of images, batches for it, a LightningModule and its data."""
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten())
    model = network.append(nn.Linear(8 * 49, 64)).append(nn.ReLU()).append(nn.Linear(64, 4)).eval()
    batches = [torch.rand(8, 3, 16, 16) for _ in range(3)]
    return {"model": model, "batches": batches, "module": Classifier(), "data": TinyData()}


@pytest.fixture
def run_page(names: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """Runs blocks of a page one after another, all if none is named; their names."""

    def run_page(page: str, *numbers: int) -> dict[str, Any]:
        found = blocks("python", f"docs/{page}.md")
        for number in numbers or range(len(found)):
            exec(compile(found[number], f"docs/{page}.md", "exec"), names)
        return names

    return run_page


def test_export_page(run_page: Callable[..., dict[str, Any]]) -> None:
    function, callback, module = range(3)
    names = run_page("export", function, callback, module)
    assert {"test_acc", "onnxruntime/test_acc"} <= names["trainer"].callback_metrics.keys()
    exact = names["int8"](names["batches"][0])
    torch.testing.assert_close(names["logits"], exact, rtol=0, atol=0.02 * exact.abs().max().item())


@needs_openvino
@pytest.mark.slow
def test_export_page_has_the_message_of_a_file_that_differs(
    run_page: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    run_page("export", 0, 3)
    [page] = blocks("text", "docs/export.md")
    numbers = r"0\.\d+"
    said = capsys.readouterr().out.splitlines()[-1]
    assert re.sub(numbers, "0", said) == re.sub(numbers, "0", page.strip())


def test_export_page_as_yaml_and_as_a_command(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [config], [command] = blocks("yaml", "docs/export.md"), blocks("bash", "docs/export.md")
    Path("callbacks.yaml").write_text("trainer:\n" + re.sub("^", "  ", config, flags=re.MULTILINE))
    Path("config.yaml").write_text(
        "model: {class_path: tests.support.modules.Classifier}\ndata: {class_path: tests.support.data.TinyData}\n"
        "trainer: {max_epochs: 1, accelerator: cpu, logger: false}\n"
    )
    main(["fit", "--config=config.yaml", "--config=callbacks.yaml"])
    Path("model.onnx").rename("trained.onnx")
    next(Path().rglob("*.ckpt")).rename("best.ckpt")
    main(command.split()[1:])
    assert Path("model.onnx").read_bytes() == Path("trained.onnx").read_bytes()


def test_onnxruntime_page(run_page: Callable[..., dict[str, Any]]) -> None:
    names = run_page("onnxruntime")
    assert names["logits"].shape == (5, 4) and len(names["exported"].int8) == 3


def test_tensorrt_page(run_page: Callable[..., dict[str, Any]]) -> None:
    names = run_page("tensorrt")
    assert names["expected"].shape == (5, 4)
    [command] = blocks("bash", "docs/tensorrt.md")
    profiles = re.findall(r"Shapes=(\w+):", command)
    assert profiles == 3 * ["x"]  # `forward` of a user's module; that of a Sequential calls it otherwise


def test_torch_page(run_page: Callable[..., dict[str, Any]]) -> None:
    names = run_page("torch_export")
    assert names["logits"].shape == (5, 4)


@needs_executorch
def test_executorch_page(run_page: Callable[..., dict[str, Any]]) -> None:
    names = run_page("executorch")
    assert names["logits"].shape == (5, 4) and len(names["exported"].int8) == 3


@needs_openvino
def test_openvino_page(run_page: Callable[..., dict[str, Any]]) -> None:
    if needs_reduced_range():
        pytest.skip("OpenVINO's sums of 8-bit products overflow on this CPU, which the proof finds.")
    names = run_page("openvino")
    assert names["logits"].shape == (5, 4) and len(names["exported"].int8) == 3
    if not shutil.which("g++"):
        pytest.skip("The page's C++ needs a compiler.")
    [source], [commands] = blocks("cpp", "docs/openvino.md"), blocks("bash", "docs/openvino.md")
    Path("run.cpp").write_text(source)
    commands = commands.replace("python -c", f"{sys.executable} -c")
    done = subprocess.run(["bash", "-euc", commands], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    half = names["int8"](torch.full((1, 3, 16, 16), 0.5))
    assert int(done.stdout) == half.argmax()
