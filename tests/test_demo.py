"""The demo runs, and each row that it shows is what its name says; figures are its own to measure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

ROOT = Path(__file__).parents[1]
TEACHER, ALONE, DISTILLED, HALVED, INT8 = MODELS = ("teacher", "student alone", "distilled", "half the MACs", "int8")
FILE = "int8 in onnxruntime"


@pytest.mark.slow
def test_demo_shows_each_step(tmp_path: Path) -> None:
    # One test, so that the demo runs once however many processes share the tests.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples/letters/demo.py"), f"--output={tmp_path}"]
    done = subprocess.run(
        [*command, "--epochs=1", "--pictures=640"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    check_what_a_stranger_sees(done.stdout, tmp_path)
    rows = {row["name"]: row for row in json.loads((tmp_path / "report.json").read_text())["rows"]}
    assert list(rows) == [*MODELS, FILE]
    check_half_of_the_macs_and_int8(rows)
    check_the_file_answers(tmp_path / "letters_int8.onnx")


def check_what_a_stranger_sees(shown: str, output: Path) -> None:
    assert all(f"\n{name}  " in shown and f"\n {name} " in shown for name in MODELS)  # a bar, and a row of the table
    assert "The int8 file is " in shown
    path = Path(shown.splitlines()[-1].removeprefix("The report: "))
    assert path.parent == output and path.is_file()
    assert f"| {FILE} |" in (output / "report.md").read_text()
    assert (output / "report.png").read_bytes().startswith(b"\x89PNG")


def check_half_of_the_macs_and_int8(rows: dict[str, Any]) -> None:
    measured = {name: row["measurement"] for name, row in rows.items()}
    assert measured[ALONE]["macs"] == measured[DISTILLED]["macs"]
    assert measured[HALVED]["macs"] == pytest.approx(0.5 * measured[DISTILLED]["macs"], rel=0.05)
    assert {layer["type"]: layer["dtype"] for layer in measured[INT8]["layers"]} == {
        "Conv2d": "int8",
        "Linear": "int8",
        "BatchNorm2d": "float32",
    }


def check_the_file_answers(path: Path) -> None:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    [pictures] = session.get_inputs()
    [logits] = session.run(None, {pictures.name: np.zeros((3, 1, 28, 28), np.float32)})
    assert logits.shape == (3, 26)


@pytest.fixture
def draw(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    from examples.letters.data import draw

    return draw


def test_pictures_come_from_their_seed(draw: Any) -> None:
    (pictures, letters), (again, same) = draw(50, 3), draw(50, 3)
    assert torch.equal(pictures, again) and torch.equal(letters, same)
    assert not torch.equal(pictures, draw(50, 4)[0])
    assert pictures.shape == (50, 1, 28, 28)
    assert 0.8 < pictures.std() < 1.25
    assert set(draw(2000, 0)[1].tolist()) == set(range(26))
