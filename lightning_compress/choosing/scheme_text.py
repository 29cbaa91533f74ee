"""What a scheme is called in a table, and how YAML says it."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from lightning_compress.quantization.layers.schemes import GPTQ, NF4, WeightOnly
from lightning_compress.quantization.numerics.int8 import StaticInt8
from lightning_compress.quantization.numerics.scheme import Scheme
from lightning_compress.quantization.schemes import SCHEMES, describe


def label_of(scheme: Scheme) -> str:
    """Name a scheme in a table: what codes, in groups of how many, and whether they have zero points.

    Example:
        >>> label_of(WeightOnly(3, group_size=32, symmetric=False)), label_of(WeightOnly(8))
        ('int3 g32 asym', 'int8')
    """
    if not isinstance(scheme, WeightOnly | GPTQ):
        named = (name for name, known in SCHEMES.items() if known == scheme)
        return next(
            named, f"{type(scheme).__name__}({', '.join(f'{key}={at!r}' for key, at in _chosen(scheme).items())})"
        )
    kind = "int" if isinstance(scheme, WeightOnly) else "gptq"
    group = f" g{scheme.group_size}" if scheme.group_size else ""
    ordered = " ordered" if getattr(scheme, "activation_order", False) else ""
    return f"{kind}{scheme.bits}{group}{'' if scheme.symmetric else ' asym'}{ordered}"


def _chosen(scheme: Any) -> dict[str, Any]:
    return {part.name: value for part in fields(scheme) if (value := getattr(scheme, part.name)) != part.default}


def plain(scheme: Scheme) -> Any:
    """Return a scheme as YAML says it: its name, or class and arguments.

    Example:
        >>> plain(WeightOnly(3))
        {'class_path': 'lightning_compress.WeightOnly', 'init_args': {'bits': 3}}
    """
    if (name := next((name for name, known in SCHEMES.items() if known == scheme), None)) is not None:
        return name
    kind = str(describe(scheme)["class"])
    path = f"lightning_compress.{kind}" if type(scheme) in (WeightOnly, NF4, GPTQ, StaticInt8) else kind
    return {"class_path": path, **({"init_args": chosen} if (chosen := _chosen(scheme)) else {})}
