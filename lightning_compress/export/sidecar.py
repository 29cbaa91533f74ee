"""What stands beside a file: what was done to the model, how it is called, and how well the file agrees with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.errors import invalid
from lightning_compress.modules.paths import modules_of
from lightning_compress.modules.routing import form_of

VERSION = 1


_NEEDED = (
    "runtime",
    "inputs",
    "call",
    "parameters",
    "result",
    "batch",
    "max_batch",
    "sha256",
    "weights_sha256",
    "facts_sha256",
)
"""Facts without which a file can't be run, or be told from others."""


def sidecar_of(path: str | Path) -> Path:
    """Return where the facts of a file stand: ``model.onnx.json`` beside ``model.onnx``."""
    return Path(f"{path}.json")


def write_sidecar(path: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write the facts of the file at ``path`` beside it, and return them with its size and checksum."""
    whole = {"version": VERSION, **facts, "bytes": path.stat().st_size, "sha256": file_sha256(path)}
    whole["facts_sha256"] = _facts_sha256(whole)
    sidecar_of(path).write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    return whole


def read_sidecar(path: str | Path) -> dict[str, Any]:
    """Return the facts of a file.

    Raises:
        CompressionError: the file or its facts aren't there, or don't belong together.
    """
    again = "Export the model again."
    if not Path(path).is_file():
        raise invalid("path", "be a file that `export` wrote", str(path), "There is no such file.")
    try:
        facts: dict[str, Any] = json.loads(sidecar_of(path).read_text(encoding="utf-8"))
        version, _ = facts["version"], [facts[key] for key in _NEEDED]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        remedy = f"{sidecar_of(path).name} beside it can't be read ({type(error).__name__}). {again}"
        raise invalid("path", "be a file that `export` wrote", str(path), remedy) from error
    if version != VERSION:
        raise invalid("path", f"be a file with facts of version {VERSION}", version, again)
    if facts["sha256"] != file_sha256(Path(path)):
        must = f"be the file that {sidecar_of(path).name} tells of"
        raise invalid("path", must, str(path), f"It was changed since. {again}")
    if facts["facts_sha256"] != _facts_sha256(facts):
        must = f"be a file whose {sidecar_of(path).name} is as `export` wrote it"
        raise invalid("path", must, str(path), f"It was changed since. {again}")
    return facts


def _facts_sha256(facts: Mapping[str, Any]) -> str:
    """Return the checksum of facts but for this one, whatever the layout of their file."""
    plain = json.loads(json.dumps({key: value for key, value in facts.items() if key != "facts_sha256"}))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_sha256(model: nn.Module) -> str:
    """Return the checksum of what a model computes with: its state dict, and the ranges of its quantized activations.

    Example:
        >>> import copy
        >>> layer = nn.Linear(2, 2)
        >>> weights_sha256(layer) == weights_sha256(copy.deepcopy(layer))
        True
    """
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            values = value.detach().cpu().contiguous().flatten()  # numpy has no bfloat16, but bytes
            digest.update(values.view(torch.uint8).numpy().tobytes() if values.numel() else b"")
    for path, module in modules_of(model).items():
        if (form := form_of(module)) is not None:
            digest.update(f"{path}{form.extra_state()}".encode())
    return digest.hexdigest()
