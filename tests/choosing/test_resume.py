"""`Progress`: what a file of measurements may hold, and that no other file is written over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_compress import CompressionError
from lightning_compress.choosing.resume import Progress

SETTINGS: dict[str, Any] = {"of": "int8", "metric": 0.5}


def begun(path: Path) -> list[str]:
    progress = Progress(path, SETTINGS)
    for layer in ("body", "head"):
        progress.add((layer, "int8", "drop"), {"drop": 0.25})
    return path.read_text("utf-8").splitlines()


@pytest.mark.parametrize("end", [1, 7, 60])
def test_of_a_line_that_was_being_written_nothing_is_left(end: int, tmp_path: Path) -> None:
    lines = begun(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text("\n".join(lines)[:-end])
    progress = Progress(tmp_path / "a.jsonl", SETTINGS)
    assert progress.found == {("body", "int8", "drop"): {"drop": 0.25}}
    assert (tmp_path / "a.jsonl").read_text() == "\n".join(lines[:2]) + "\n"


FOREIGN = {
    "text without an end of line": b"my diary",
    "JSON without an end of line": b"{}",
    "zeros": bytes(20),
    "bytes": b"\xff\xfe\n",
    "brackets": b"[" * 100_000 + b"\n",
    "null": b"null\n",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_of_others_is_refused_and_stays(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(FOREIGN[name])
    with pytest.raises(CompressionError, match="`path` must hold measurements of this model.*Give another path"):
        Progress(path, SETTINGS)
    assert path.read_bytes() == FOREIGN[name]


@pytest.mark.parametrize("line", ["7", "[]", "null", "{}", '{"layer": 1}', "{", "", json.dumps(
    {"layer": [], "level": "int8", "what": "drop", "found": {}}), json.dumps(
    {"layer": "a", "level": "int8", "what": "drop", "found": 7})])  # fmt: skip
def test_a_damaged_line_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = begun(path)
    path.write_text("\n".join([lines[0], lines[1], line, lines[2]]) + "\n")
    with pytest.raises(CompressionError, match="whose line 3 is no measurement"):
        Progress(path, SETTINGS)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CompressionError, match="IsADirectoryError"):
        Progress(tmp_path, SETTINGS)
