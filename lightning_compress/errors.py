"""The errors of the package, and the grammar that all of them follow.

An error says what the argument must be, what was received, and then the remedy::

    `sparsity` must lie in [0, 1). Received: sparsity=1.5. Give a fraction, not a percentage.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import TypeGuard


class CompressionError(ValueError):
    """Raised for input that can't be honoured, before anything is changed."""


class MissingExtraError(CompressionError, ImportError):
    """Raised when a feature needs an optional dependency that isn't installed."""

    def __init__(self, feature: str, package: str, extra: str) -> None:
        super().__init__(
            f"{feature} needs `{package}`, which isn't installed. "
            f'Install it: pip install "lightning-compress[{extra}]"'
        )


class NoEffectWarning(UserWarning):
    """Warns that what was asked for made nothing smaller, faster or sparser."""


def invalid(name: str, must: str, received: object, remedy: str = "") -> CompressionError:
    """Build the error of an argument: what ``name`` ``must`` do, and what was ``received``.

    Example:
        >>> str(invalid("sparsity", "lie in [0, 1)", 1.5))
        '`sparsity` must lie in [0, 1). Received: sparsity=1.5.'
    """
    message = f"`{name}` must {must}. Received: {name}={received!r}."
    return CompressionError(f"{message} {remedy}" if remedy else message)


def is_number(value: object) -> TypeGuard[float]:
    """Tell whether a value is a finite number, and no True or False.

    Example:
        >>> is_number(1), is_number(0.5), is_number(True), is_number("1"), is_number(float("nan"))
        (True, True, False, False, False)
    """
    return isinstance(value, Real) and not isinstance(value, bool) and -math.inf < value < math.inf  # type: ignore[operator]


def is_count(value: object) -> TypeGuard[int]:
    """Tell whether a value is a whole number, at least 1.

    Example:
        >>> is_count(1), is_count(0), is_count(1.0), is_count(True)
        (True, False, False, False)
    """
    return isinstance(value, Integral) and is_number(value) and value >= 1


def in_a_line(error: BaseException, longest: int = 160) -> str:
    """Say an error in a line: with its type if it isn't a CompressionError, whose message is enough.

    Example:
        >>> in_a_line(KeyError("a")), in_a_line(CompressionError("it is empty"))
        ("KeyError: 'a'", 'it is empty')
    """
    text = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, CompressionError):
        return text  # in full, since the remedy stands at the end
    text = text[:longest]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """Build the remedy for a mistyped ``name``: the ``known`` names that are nearest to it.

    Example:
        >>> nearest("int8_statik", ["int8_static", "int8_dynamic", "nf4"])
        'Nearest: int8_static, int8_dynamic.'
    """
    candidates = list(dict.fromkeys(known))
    # A layer is often right in its last part and wrong in its prefix, so both whole names and tails are compared.
    close = [known for known in candidates if name and known.startswith(name)][:count]
    close += [known for known in difflib.get_close_matches(name, candidates, n=count, cutoff=0.5) if known not in close]
    tail = name.rpartition(".")[2]
    close += [known for known in candidates if known.rpartition(".")[2] == tail and known not in close]
    if close:
        return f"Nearest: {', '.join(close[:count])}."
    shown = ", ".join(candidates[:8]) + (", ..." if len(candidates) > 8 else "")
    return f"Known: {shown}." if shown else "There are none."
