"""Schemes by name: what numbers a quantized layer computes with. Plain, frozen, nameable from YAML and from a file."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from importlib import import_module
from typing import Any

from lightning_compress.errors import CompressionError, invalid, nearest
from lightning_compress.quantization.layers.schemes import GPTQ, NF4, DynamicInt8, WeightOnly
from lightning_compress.quantization.numerics.int8 import StaticInt8
from lightning_compress.quantization.numerics.scheme import Scheme

SCHEMES: dict[str, Scheme] = {
    "int8_static": StaticInt8(),
    "int8_dynamic": DynamicInt8(),
    "int8_weight_only": WeightOnly(bits=8),
    "int4_weight_only": WeightOnly(bits=4, group_size=128),
    "nf4": NF4(),
    "gptq": GPTQ(),
}
"""Schemes by name."""

_CLASSES = {type(scheme).__name__: type(scheme) for scheme in SCHEMES.values()}


def resolve(scheme: str | Scheme) -> Scheme:
    """Find a scheme by its name or the import path of its class; one that is a scheme stays as it is.

    Raises:
        CompressionError: no scheme has this name; the nearest ones are listed. Or a class of your own is none, needs
            arguments, or isn't found by its own import path.

    Example:
        >>> resolve("int8_dynamic")
        DynamicInt8(per_token=None, reduce_range=None)
    """
    if isinstance(scheme, str) and scheme in SCHEMES:
        return SCHEMES[scheme]
    if isinstance(scheme, str) and "." in scheme:
        module, _, name = scheme.rpartition(".")
        try:
            scheme = getattr(import_module(module), name)()
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            must = "be the name of a scheme, or the import path of a class that needs no arguments"
            raise invalid("scheme", must, scheme, f"{error}.") from error
    if not isinstance(scheme, Scheme):
        raise invalid("scheme", "be the name of a scheme", scheme, nearest(str(scheme), SCHEMES))
    if not is_dataclass(scheme) or _known(_class_name(scheme)) is not type(scheme):
        must = "be a dataclass that stands in a module under its own name, so that a file can name it"
        raise invalid("scheme", must, scheme)
    return scheme


def _class_name(scheme: Scheme) -> str:
    """Name what a file calls a scheme's class: one of ours by its name, any other by its import path."""
    kind = type(scheme)
    return kind.__name__ if _CLASSES.get(kind.__name__) is kind else f"{kind.__module__}.{kind.__qualname__}"


def _known(name: str) -> Any:
    """Return the class that a file means, if it has been imported already: reading a file imports nothing."""
    module, _, leaf = name.rpartition(".")
    # Not by `getattr`, which modules that import their parts late would answer by importing.
    found = _CLASSES.get(name) or getattr(sys.modules.get(module), "__dict__", {}).get(leaf)
    return found if isinstance(found, type) and issubclass(found, Scheme) else None


def describe(scheme: Scheme) -> dict[str, Any]:
    """Describe a scheme as plain data, with what was asked of this CPU filled in."""
    fields: dict[str, Any] = asdict(scheme)  # type: ignore[call-overload]
    if fields.get("reduce_range", False) is None:
        fields["reduce_range"] = scheme.reduced
    return {"class": _class_name(scheme), "name": scheme.name, **fields}


def from_description(description: Mapping[str, Any]) -> Scheme:
    """Make the scheme that `describe` described.

    Raises:
        CompressionError: written by a newer version, or a scheme of the user's own whose module wasn't imported yet.

    Example:
        >>> from_description(describe(DynamicInt8(reduce_range=True)))
        DynamicInt8(per_token=None, reduce_range=True)
    """
    fields = {name: value for name, value in description.items() if name not in ("class", "name")}
    kind = str(description["class"])
    if (known := _known(kind)) is None:
        must = "be of a class that was imported before" if "." in kind else "be known to this version"
        module = kind.rpartition(".")[0]
        write = "Define it in your script" if module == "__main__" else f"Write `import {module}`"
        remedy = f"{write} first: a file runs no code." if module else "Update."
        raise CompressionError(f"`scheme` must {must}. Received: {kind!r} in a checkpoint. {remedy}")
    scheme: Scheme = known(**fields)
    return scheme
