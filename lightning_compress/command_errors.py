"""Says in a line what jsonargparse says of a configuration in up to thirty."""

from __future__ import annotations

import re

_SAYS_NOTHING = (
    "Does not validate against any of the Union subtypes",
    "Subtypes: ",
    "Errors:",
    "Given value type: ",
    "Given value: ",
    "Subclass types expect one of:",
    "a class path (str)",
    "a dict with",
    "Not a valid subclass of ",
    "Expected a NoneType",
)
"""How lines begin that list what else would do."""
_GIVEN, _NO_SUBCLASS = "Given value: ", "Not a valid subclass of "


def error_line(message: str) -> str:
    """Bring what a parser says into a line: which key, what is wrong with it, and the innermost value.

    Example:
        >>> print(error_line('''Parser key "trainer.enable_checkpointing":
        ...   Does not validate against any of the Union subtypes
        ...   Subtypes: [<class 'bool'>, <class 'NoneType'>]
        ...   Errors:
        ...     - Expected a <class 'bool'>
        ...     - Expected a <class 'NoneType'>
        ...   Given value type: <class 'str'>
        ...   Given value: many'''))
        Parser key "trainer.enable_checkpointing": Expected a bool. Received: many.
    """
    plain = re.sub(r"<class '([\w.]+)'>", r"\1", message)
    lines = [" ".join(line.split()).removeprefix("- ") for line in plain.splitlines()]
    said = [line for line in lines if line and not line.startswith(_SAYS_NOTHING)]
    if all(line.endswith(":") for line in said):
        said += [line for line in lines if line.startswith(_NO_SUBCLASS)]
    text = _shortened(" ".join(line if line.endswith((":", ".")) else f"{line}." for line in dict.fromkeys(said)), 600)
    given = next((line.removeprefix(_GIVEN) for line in lines if line.startswith(_GIVEN)), "")
    return text if not given or "Got value: " in text else f"{text} Received: {_shortened(given, 100)}."


def _shortened(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[:longest]}..."
