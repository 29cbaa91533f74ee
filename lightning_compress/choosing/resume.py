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

from lightning_compress.errors import CompressionError

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
        lines = self.path.read_text("utf-8").split("\n") if self.path.exists() else []
        whole = lines[:-1]  # what has no end was being written
        if not whole:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(settings) + "\n", "utf-8")
            return
        self._check(whole[0], json.loads(json.dumps(settings)))
        for line in whole[1:]:
            entry = json.loads(line)
            self.found[entry["layer"], entry["level"], entry["what"]] = entry["found"]
        self.path.write_text("\n".join(whole) + "\n", "utf-8")

    def _check(self, line: str, settings: Mapping[str, Any]) -> None:
        try:
            saved = json.loads(line)
            names = [name for name in {**settings, **saved} if not _same(saved.get(name), settings.get(name))]
        except (ValueError, TypeError, AttributeError):
            names = ["a first line that this isn't"]
        if names:
            raise CompressionError(
                f"`path` must hold measurements of this model and these settings. Received: {self.path}, with another "
                f"{', another '.join(names)}. Give another path, or delete the file to begin anew."
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
