"""Sentences about many layers: paths that differ in an index are merged, and layers with one reason share a line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

MOST_LINES = 10
_MOST_NAMES = 8
_ANY = frozenset[int]()
_NUMBER = re.compile(r"\d+")


_Row = tuple[str | frozenset[int], ...]


def merged(paths: Iterable[str]) -> list[str]:
    """Merge paths that differ in one index, and keep the order: ``h.{0-3,7}.attn`` stands for exactly five.

    Example:
        >>> merged(["h.0.fc1", "h.0.fc2", "h.1.fc1", "h.1.fc2", "h.3.fc1", "head"])
        ['h.{0-1,3}.fc1', 'h.{0-1}.fc2', 'head']
    """
    rows: list[_Row] = [tuple(map(_part, path.split("."))) for path in paths]
    for place in reversed(range(max(map(len, rows), default=0))):
        indices: dict[_Row, frozenset[int]] = {}
        for row in rows:
            index = row[place] if place < len(row) else ""
            if isinstance(index, frozenset):
                row, found = (*row[:place], _ANY, *row[place + 1 :]), index
            else:
                found = frozenset()
            indices[row] = indices.get(row, frozenset()) | found
        rows = [tuple(found if part is _ANY else part for part in row) for row, found in indices.items()]
    return [".".join(part if isinstance(part, str) else _ranges(part) for part in row) for row in rows]


def _part(part: str) -> str | frozenset[int]:
    return frozenset([int(part)]) if re.fullmatch("0|[1-9][0-9]*", part) else part


def _ranges(indices: frozenset[int]) -> str:
    if len(indices) == 1:
        return str(*indices)
    numbered = enumerate(sorted(indices))
    runs = [[index for _, index in run] for _, run in groupby(numbered, lambda pair: pair[1] - pair[0])]
    return f"{{{','.join(str(run[0]) if len(run) == 1 else f'{run[0]}-{run[-1]}' for run in runs)}}}"


def named(paths: Iterable[str]) -> str:
    """List paths for a sentence, the root as "the module"; of very many only the first.

    Example:
        >>> named(["h.0.fc1", "h.1.fc1", ""])
        '`h.{0-1}.fc1`, the module'
    """
    names = [f"`{path}`" if path else "the module" for path in merged(paths)]
    rest = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def they(paths: Sequence[str], singular: str, plural: str) -> str:
    """Begin a sentence about paths, with its verb.

    Example:
        >>> they(["a"], "stays", "stay"), they(["a", "b"], "stays", "stay")
        ('`a` stays', '`a`, `b` stay')
    """
    return f"{named(paths)} {singular if len(paths) == 1 else plural}"


def by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    """Group paths by reason. Reasons that differ in numbers alone become one, with ``*`` for the numbers.

    Example:
        >>> by_reason({"a": "no kernel", "b": "size 3 of 4", "c": "no kernel", "d": "size 5 of 4"})
        {'no kernel': ['a', 'c'], 'size * of 4': ['b', 'd']}
    """
    groups: dict[str, dict[str, str]] = {}
    for path, reason in reasons.items():
        groups.setdefault(_NUMBER.sub("*", reason), {})[path] = reason
    return {_in_common(list(group.values())): list(group) for group in groups.values()}


def _in_common(reasons: Sequence[str]) -> str:
    """Merge texts that differ in numbers alone."""
    texts, numbers = _NUMBER.split(reasons[0]), zip(*map(_NUMBER.findall, reasons), strict=True)
    shown = [found[0] if len(set(found)) == 1 else "*" for found in numbers]
    return "".join(text + number for text, number in zip(texts, [*shown, ""], strict=True))


def in_short(lines: Sequence[str], most: int = MOST_LINES) -> list[str]:
    """Cut ``lines`` to ``most``; the last one then says how many are missing."""
    if len(lines) <= most:
        return list(lines)
    return [*lines[: most - 1], f"... and {len(lines) - most + 1} more lines, which a CompressionReport has"]
