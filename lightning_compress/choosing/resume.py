"""What was evaluated already: a file of JSON lines that each evaluation is appended to, and a resumed run reads."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_compress.errors import CompressionError, in_a_line
from lightning_compress.whole_file import whole_file

Key = tuple[str, str, str]
"""Layer, level, and which measurement."""


class Progress:
    """Remembers measurements by key, in a file where there is one; an interrupted run loses the one that it was at.

    Args:
        path: of the file; None remembers nothing beyond this run.
        settings: that the measurements hold for, as plain data; the file's first line.

    Raises:
        CompressionError: the file holds measurements of other settings, or is none of ours.
    """

    def __init__(self, path: str | Path | None, settings: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.found: dict[Key, dict[str, Any]] = {}
        if self.path is None:
            return
        first, *lines = self._read() or [json.dumps(settings)]
        self._check(first, json.loads(json.dumps(settings)))
        for number, line in enumerate(lines, 2):
            try:
                entry = json.loads(line)
                key, found = (entry["layer"], entry["level"], entry["what"]), entry["found"]
                self.found[key] = {**found}
            except (ValueError, KeyError, TypeError, RecursionError):
                raise self._refused(f"whose line {number} is no measurement") from None
        with whole_file(self.path) as begun:
            begun.write_text("\n".join([first, *lines]) + "\n", "utf-8")

    def _read(self) -> list[str]:
        """Return the whole lines; what has no end was being written, but for the first, with which the file began."""
        assert self.path is not None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = self.path.read_text("utf-8").split("\n") if self.path.exists() else [""]
        except (OSError, UnicodeDecodeError) as error:
            raise self._refused(in_a_line(error)) from error
        return lines[:-1] or [line for line in lines if line]

    def _check(self, line: str, settings: Mapping[str, Any]) -> None:
        try:
            saved = json.loads(line)
            names = [name for name in {**settings, **saved} if not _same(saved.get(name), settings.get(name))]
        except (ValueError, TypeError, AttributeError, RecursionError):
            names = ["first line than such files have"]
        if names:
            raise self._refused(f"with another {', another '.join(names)}")

    def _refused(self, why: str) -> CompressionError:
        return CompressionError(
            f"`path` must hold measurements of this model and these settings. Received: {self.path}, {why}. Give "
            "another path, or delete the file to begin anew."
        )

    def add(self, key: Key, found: dict[str, Any]) -> dict[str, Any]:
        """Remember a measurement."""
        self.found[key] = found
        if self.path is not None:
            layer, level, what = key
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"layer": layer, "level": level, "what": what, "found": found}) + "\n")
        return found


def _same(saved: Any, given: Any) -> bool:
    if isinstance(saved, float) and isinstance(given, float):
        return math.isclose(saved, given, rel_tol=1e-6, abs_tol=1e-9)
    return bool(saved == given)


def digest(model: nn.Module) -> str:
    """Return a digest of all names and values in a model's ``state_dict``."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(name.encode())
        if isinstance(tensor, torch.Tensor):
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
