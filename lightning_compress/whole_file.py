"""Writes a file as a whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Give a path to write to, whose file takes the place of ``path`` when the block ends.

    A full disk, an exception or a kill within the block leaves what stood at ``path``.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with whole_file(f"{folder}/a.txt") as begun:
        ...         _ = begun.write_text("all of it")
        ...     Path(folder, "a.txt").read_text()
        'all of it'
    """
    begun = Path(path).with_name(f".begun.{Path(path).name}")  # the same suffix, by which writers choose a format
    try:
        yield begun
        os.replace(begun, path)
    finally:
        with suppress(OSError):
            begun.unlink(missing_ok=True)
