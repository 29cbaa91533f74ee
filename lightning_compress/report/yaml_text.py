"""Plain data as YAML for a configuration: outer mappings in blocks, what is deeper in a line each."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

_PLAIN = re.compile(r"[A-Za-z_][\w.]*")
_WORDS = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}


def as_yaml(plain: Mapping[str, Any], depth: int = 2) -> str:
    """Return plain data as YAML, in its own order.

    Args:
        plain: mappings of strings, lists, numbers and strings.
        depth: so many levels of mappings, and of lists of them, are blocks.

    Example:
        >>> print(as_yaml({"scheme": "nf4", "overrides": {"0": {"class_path": "WeightOnly"}}}), end="")
        scheme: nf4
        overrides:
          "0": {class_path: WeightOnly}
    """
    lines = list[str]()
    for key, value in plain.items():
        if isinstance(value, Mapping) and value and depth > 1:
            lines.append(f"{_word(key)}:\n")
            lines += [f"  {line}\n" for line in as_yaml(value, depth - 1).splitlines()]
        elif isinstance(value, list) and value and depth > 1 and all(isinstance(item, Mapping) for item in value):
            lines.append(f"{_word(key)}:\n")
            for item in value:
                block = as_yaml(item, depth - 1).splitlines()
                lines += [f"  {'  ' if index else '- '}{line}\n" for index, line in enumerate(block)]
        else:
            lines.append(f"{_word(key)}: {_in_line(value)}\n")
    return "".join(lines)


def _in_line(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_word(key)}: {_in_line(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_in_line, value)) + "]"
    return _word(value) if isinstance(value, str) else json.dumps(value)


def _word(text: str) -> str:
    return text if _PLAIN.fullmatch(text) and text.lower() not in _WORDS else json.dumps(text)
