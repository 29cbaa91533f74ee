"""Slow and obvious references, and comparisons that name the tensor that differs."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def count_zeros(tensors: Iterable[Tensor]) -> tuple[int, int]:
    """(zeros, elements) over `tensors`, each tensor once however often it is listed, one number at a time."""
    once = {id(tensor): tensor for tensor in tensors}
    numbers = [number for tensor in once.values() for number in tensor.detach().flatten().tolist()]
    return sum(number == 0 for number in numbers), len(numbers)


def flatten(tree: Any, name: str = "") -> dict[str, Any]:
    """Every leaf of a tree of modules, mappings, dataclasses, lists and tuples under its dotted name."""
    if isinstance(tree, nn.Module):
        tree = tree.state_dict()
    elif is_dataclass(tree):
        tree = _fields(tree)
    if isinstance(tree, Mapping):
        items = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, (list, tuple)):
        items = [(str(index), value) for index, value in enumerate(tree)]
    else:
        return {name: tree}
    leaves: dict[str, Any] = {}
    for key, value in items:
        leaves.update(flatten(value, f"{name}.{key}" if name else key))
    return leaves


def described(output: Any) -> Any:
    """An output with shapes in the place of its tensors, and its containers with their types."""
    if isinstance(output, Tensor):
        return tuple(output.shape)
    if isinstance(output, Mapping):
        return type(output), {key: described(value) for key, value in output.items()}
    if isinstance(output, (list, tuple)):
        return type(output), [described(value) for value in output]
    return (type(output), described(_fields(output))) if is_dataclass(output) else output


def _fields(instance: Any) -> dict[str, Any]:
    return {field.name: getattr(instance, field.name) for field in fields(instance)}


def snapshot(tree: Any) -> dict[str, Any]:
    """`flatten`, with every tensor copied, so that later changes in place don't reach it."""
    return {key: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for key, leaf in flatten(tree).items()}


def _bits(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    return tensor.contiguous().flatten().view(torch.uint8)


def _difference(a: Any, b: Any) -> str | None:
    """What tells leaf `a` from leaf `b`, or None."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return None if type(a) is type(b) and a == b else f"{a!r} != {b!r}"
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return f"{a.dtype} {tuple(a.shape)} != {b.dtype} {tuple(b.shape)}"
    if torch.equal(_bits(a), _bits(b)):
        return None
    if a.is_quantized or not a.is_floating_point():
        return "values differ"
    return f"values differ by up to {(a.double() - b.double()).abs().max().item():.3g}"


def differing(a: Any, b: Any) -> dict[str, str]:
    """Name of each leaf that isn't the same in both, bit for bit, with what tells them apart."""
    left, right = flatten(a), flatten(b)
    different = dict.fromkeys(left.keys() - right.keys(), "only in the first")
    different |= dict.fromkeys(right.keys() - left.keys(), "only in the second")
    for key in left.keys() & right.keys():
        if difference := _difference(left[key], right[key]):
            different[key] = difference
    return dict(sorted(different.items()))


def assert_same_state(a: Any, b: Any) -> None:
    """Modules, state dicts, checkpoints or any trees of tensors: equal bit for bit, NaN and -0.0 too."""
    different = differing(a, b)
    if different:
        lines = "\n".join(f"  {name}: {why}" for name, why in different.items())
        raise AssertionError(f"{len(different)} of {len(flatten(a).keys() | flatten(b).keys())} differ:\n{lines}")


def assert_different_state(a: Any, b: Any) -> None:
    """Something moved: the guard against a comparison that passes because nothing happened."""
    if not differing(a, b):
        raise AssertionError(f"All {len(flatten(a))} are the same, bit for bit.")


def assert_float_keys(checkpoint: Mapping[str, Any], module: nn.Module) -> None:
    """`checkpoint["state_dict"]` holds exactly the keys, shapes and dtypes of the plain float `module`."""
    have = {key: (value.dtype, value.shape) for key, value in checkpoint["state_dict"].items()}
    want = {key: (value.dtype, value.shape) for key, value in module.state_dict().items()}
    missing, surplus = sorted(want.keys() - have.keys()), sorted(have.keys() - want.keys())
    changed = sorted(key for key in want.keys() & have.keys() if want[key] != have[key])
    if missing or surplus or changed:
        raise AssertionError(f"Not the module's own keys. missing: {missing}; surplus: {surplus}; changed: {changed}")


def _random_state() -> dict[str, Any]:
    return {
        "random": repr(random.getstate()),
        "numpy": repr(np.random.get_state()),  # 624 numbers, which repr does not shorten
        "torch": torch.get_rng_state().clone(),
    }


@contextmanager
def same_random_state() -> Iterator[None]:
    """Nothing inside may draw from the global generators of Python, numpy or torch."""
    before = _random_state()
    yield
    if drawn := sorted(differing(before, _random_state())):
        raise AssertionError(f"Drawn from the global generator of {', '.join(drawn)}.")


def hooks(module: nn.Module) -> list[str]:
    """Every hook on `module` and its submodules as "path: kind", to see that none is left behind."""
    kinds = [name for name in vars(nn.Module()) if name.endswith("_hooks")]
    return [
        f"{path or '<root>'}: {kind}"
        for path, submodule in module.named_modules()
        for kind in kinds
        for _ in getattr(submodule, kind) or ()
    ]
