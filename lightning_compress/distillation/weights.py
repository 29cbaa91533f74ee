"""How a teacher's weights are found in a Lightning checkpoint or a plain state dict."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_compress.errors import invalid
from lightning_compress.modules.paths import clean_name
from lightning_compress.structure.inert import read_inert

_DEEPEST = 3


def load_weights_(module: nn.Module, path: str) -> None:
    """Load the weights of ``module`` from a Lightning checkpoint or a plain state dict.

    The rule: the file's weights are its ``state_dict`` entry, or else the file itself; ``_orig_mod.`` is left out of
    all names. Then there must be one prefix (``""``, ``model.``, ``student.``, ...) under which *every* key of the
    module stands with its shape; the empty prefix wins. Other keys in the file are ignored.

    Args:
        module: The model whose weights are replaced.
        path: Of the file. No code in it is run; objects that aren't weights are left out.

    Raises:
        CompressionError: If the file can't be read, no prefix fits, several do, or a shape differs. Nothing is
            changed then.

    Example:
        >>> import tempfile, torch
        >>> source, target = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({f"model.{key}": value for key, value in source.state_dict().items()}, f"{folder}/t.pt")
        ...     load_weights_(target, f"{folder}/t.pt")
        >>> torch.equal(source.weight, target.weight)
        True
    """
    content, stored = _read(path)
    wanted = {clean_name(key): key for key in module.state_dict()}
    prefix = _find_prefix(stored, list(wanted), path, content)
    own = module.state_dict()
    chosen = {key: stored[prefix + name] for name, key in wanted.items()}
    for key, value in chosen.items():
        if isinstance(value, Tensor) and isinstance(own[key], Tensor) and value.shape != own[key].shape:
            raise invalid(
                "teacher_checkpoint",
                f"hold `{prefix}{clean_name(key)}` in the teacher's shape {tuple(own[key].shape)}",
                path,
                f"The file has shape {tuple(value.shape)}: is it of another teacher?",
            )
    module.load_state_dict(chosen)


def _read(path: str) -> tuple[Any, dict[str, Any]]:
    """Read the file's content, and the weights in it by the rule."""
    remedy = "Save the teacher's weights alone: torch.save(teacher.state_dict(), path)."
    try:
        content, _ = read_inert(os.fspath(path), "teacher_checkpoint")
    except FileNotFoundError:
        raise invalid("teacher_checkpoint", "be an existing file", path) from None
    except Exception as error:  # torch.load raises a dozen types, by file format
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        must = "be readable as a checkpoint of torch"
        raise invalid("teacher_checkpoint", must, path, f"{reason} {remedy}") from error
    weights = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(weights, Mapping) or not all(isinstance(key, str) for key in weights):
        raise invalid("teacher_checkpoint", "hold a state dict", path, remedy)
    return content, {clean_name(key): value for key, value in weights.items()}


def _find_prefix(stored: Mapping[str, Any], wanted: list[str], path: str, content: Any) -> str:
    if not wanted:
        raise invalid("teacher", "have weights to load", path, "Leave `teacher_checkpoint` out.")
    found = {
        prefix: sum(prefix + name in stored for name in wanted) for prefix in dict.fromkeys(_prefixes(stored, wanted))
    }
    fitting = [prefix for prefix, count in found.items() if count == len(wanted)]
    if "" in fitting:
        return ""
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        remedy = f"All of these fit: {', '.join(sorted(fitting))}. Save the one that you mean in a file of its own."
        raise invalid("teacher_checkpoint", "hold the teacher's weights once", path, remedy)
    if elsewhere := list(_holders(content, wanted)):
        keys = ", ".join("".join(f"[{key!r}]" for key in keys) for keys in elsewhere)
        first = "".join(f"[{key!r}]" for key in elsewhere[0])
        raise invalid(
            "teacher_checkpoint",
            "hold the teacher's weights as its `state_dict`, or as the file itself",
            path,
            f"They stand under {keys}. Save them alone: torch.save(torch.load(path){first}, new_path).",
        )
    best = max(found, key=lambda prefix: found[prefix], default="")
    missing = [best + name for name in wanted if best + name not in stored]
    shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
    raise invalid("teacher_checkpoint", "hold every weight of the teacher", path, f"Missing: {shown}.")


def _prefixes(stored: Iterable[str], wanted: Collection[str]) -> Iterator[str]:
    names = set(wanted)
    for key in stored:
        parts = key.split(".")
        for cut in range(len(parts)):
            if ".".join(parts[cut:]) in names:
                yield "".join(f"{part}." for part in parts[:cut])


def _holders(content: Any, wanted: Collection[str], keys: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Find the keys that lead to mappings, inside the file's own, with all ``wanted`` weights under some prefix."""
    if not isinstance(content, Mapping) or len(keys) > _DEEPEST:
        return
    named = {clean_name(key) for key in content if isinstance(key, str)}
    prefixes = dict.fromkeys(_prefixes(named, wanted)) if keys else {}
    if any(all(prefix + name in named for name in wanted) for prefix in prefixes):
        yield keys
        return
    for key, value in content.items():
        if isinstance(key, str):
            yield from _holders(value, wanted, (*keys, key))
