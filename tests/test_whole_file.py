"""`whole_file`: a file stands under its name as a whole, or the one before does."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from torch import nn

from lightning_compress import CompressionError, load_compressed, save_compressed
from lightning_compress.whole_file import whole_file
from tests.support.oracles import assert_same_state


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def half_then(fails: Callable[..., None]) -> Callable[..., None]:
    """Stands for `torch.save`: writes half of what it writes, and fails."""
    save = torch.save

    def saves(content: Any, file: IO[bytes]) -> None:
        save(content, file)
        file.truncate(file.tell() // 2)
        file.flush()
        fails()

    return saves


def saved(folder: Path) -> tuple[Path, nn.Module]:
    model = nn.Linear(3, 2)
    save_compressed(model, str(folder / "a.ckpt"))
    return folder / "a.ckpt", model


def test_a_kill_while_it_is_saved_leaves_the_file_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, model = saved(tmp_path)
    monkeypatch.setattr(torch, "save", half_then(die))
    if not (child := os.fork()):
        save_compressed(nn.Linear(3, 2), str(path))
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert_same_state(model, load_compressed(str(path), nn.Linear(3, 2)))
    monkeypatch.undo()
    path, model = saved(tmp_path)  # what the kill left is in nobody's way
    assert_same_state(model, load_compressed(str(path), nn.Linear(3, 2)))
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_file_before_and_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, model = saved(tmp_path)
    monkeypatch.setattr(torch, "save", half_then(full))
    with pytest.raises(CompressionError, match=r"`path` must be a file that can be written.*No space left on device"):
        save_compressed(nn.Linear(3, 2), str(path))
    assert list(tmp_path.iterdir()) == [path]
    assert_same_state(model, load_compressed(str(path), nn.Linear(3, 2)))


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(CompressionError, match="`path` must be a file that can be written.*no/a.ckpt"):
        save_compressed(nn.Linear(3, 2), str(tmp_path / "no" / "a.ckpt"))


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "a.txt") as begun:
        begun.write_text("half")
        _ = 1 / 0
    assert not list(tmp_path.iterdir())
