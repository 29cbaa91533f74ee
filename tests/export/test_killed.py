"""An export that is killed or interrupted leaves what stood under its names, or all of the new file."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_compress import CompressionError, RuntimeModule, export

exporting = import_module("lightning_compress.export.export")  # whose function has its name
INPUTS = torch.zeros(2, 3)


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def half_then(fails: Callable[..., None]) -> Callable[..., None]:
    """Stands for a writer: leaves half of a file, and fails."""
    save = torch.export.save

    def saves(program: Any, path: Path) -> None:
        save(program, path)
        os.truncate(path, path.stat().st_size // 2)
        fails()

    return saves


def second_time(replace: Callable[..., None], fails: Callable[..., None]) -> Callable[..., None]:
    calls = list[Any]()

    def replaces(*paths: Any) -> None:
        calls.append(paths)
        (fails if len(calls) == 2 else replace)(*paths)

    return replaces


MOMENTS: dict[str, Callable[[pytest.MonkeyPatch, Callable[..., None]], None]] = {
    "writing": lambda patch, fails: patch.setattr(torch.export, "save", half_then(fails)),
    "comparing": lambda patch, fails: patch.setattr(exporting, "prove", fails),
    "timing": lambda patch, fails: patch.setattr(exporting, "latency_of", fails),
    "telling": lambda patch, fails: patch.setattr(exporting, "write_sidecar", fails),
    "moving": lambda patch, fails: patch.setattr(os, "replace", fails),
    "between both files": lambda patch, fails: patch.setattr(os, "replace", second_time(os.replace, fails)),
}


def model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(3, 2)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def loads(path: Path, expected: nn.Module) -> None:
    x = torch.randn(4, 3)
    torch.testing.assert_close(torch.export.load(path).module()(x)[0], expected(x))


@pytest.mark.parametrize("how", [die, interrupt], ids=["kill", "ctrl-c"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_no_half_file_stands_under_the_name(
    moment: str, how: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.pt2"
    export(model(0), INPUTS, path)
    before = contents(tmp_path)
    MOMENTS[moment](monkeypatch, how)
    if how is die:
        if not (child := os.fork()):
            export(model(1), INPUTS, path)
            os._exit(1)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    else:
        with pytest.raises(KeyboardInterrupt):
            export(model(1), INPUTS, path)
    monkeypatch.undo()
    if moment == "between both files":
        loads(path, model(1))  # a whole one, whose facts are of another: nothing of ours takes it for proven
        with pytest.raises(CompressionError, match="be the file that model.pt2.json tells of.*Export the model again"):
            RuntimeModule(str(path))
    else:
        assert contents(tmp_path) == before
        loads(path, model(0))
    export(model(2), INPUTS, path)  # what was left is in nobody's way
    loads(path, model(2))
    assert len([*tmp_path.iterdir()]) == 2 + (how is die)  # a killed process can't take its folder away
