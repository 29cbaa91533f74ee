"""Tries a structure on copies of the model: what is cut must compute what the model computes with zeros in its place.

What can't be seen in a trace shows here: sizes that are written in the code, attributes that follow a width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.channels.groups import Attribute, Group, Structure, find_structure
from lightning_compress.channels.remove import cut_, zero_
from lightning_compress.quantization.calls import copy_module
from lightning_compress.targets import clean_name

Run = Callable[[nn.Module], Any]
"""Calls a model, or a copy of it, and returns what it puts out."""

_TOLERANCE = 1e-3
_MOST_ATTRIBUTES = 5


def explore(model: nn.Module, runs: Sequence[Run]) -> Structure:
    """The structure of a model, tried on copies of it.

    Args:
        model: in evaluation or training mode; nothing of it is changed.
        runs: ways to call it; the first one's cost and outputs count.
    """
    return _Explorer(model, runs).explore()


class _Explorer:
    def __init__(self, model: nn.Module, runs: Sequence[Run]) -> None:
        self.model = model
        self.runs = runs
        self.followers: set[tuple[str, str, int]] = set()
        """Class and name of attributes that follow a width, and which of the widths that they may stand for."""
        self.choices: dict[str, int] = {}

    def explore(self) -> Structure:
        structure = self._trace()
        failed: dict[str, str] = {}
        for _ in range(4):
            useful = self._usable(structure, failed)
            if self._passes(structure, useful) is None:
                break
            failing = {group.name: reason for group in useful if (reason := self._try(structure, group))}
            again = self._choose_again(structure, failing)
            failed.update({name: reason for name, reason in failing.items() if name not in again})
            if again:
                structure = self._trace()
        else:
            failed.update({group.name: "it fails with others" for group in self._usable(structure, failed)})
        return self._settled(structure, failed)

    def _trace(self) -> Structure:
        """Trace, and take splits that lead to nothing otherwise."""
        structure = self._look()
        for _ in range(3):
            dead = [key for key, groups in structure.splits.items() if not self._lives(structure, groups)]
            before = len(self._all(structure))
            if not dead:
                break
            kept = dict(self.choices)
            for key in dead:
                self.choices[key] = self.choices.get(key, 0) + 1
            tried = self._look()
            if len(self._all(tried)) <= before:
                self.choices = kept
                break
            structure = tried
        return structure

    def _look(self) -> Structure:
        twin = copy_module(self.model)
        return find_structure(twin, [lambda run=run: run(twin) for run in self.runs], self.choices)  # type: ignore[misc]

    @staticmethod
    def _lives(structure: Structure, groups: Iterable[int]) -> bool:
        return any(structure.groups[group].size > 1 for group in groups)

    @staticmethod
    def _all(structure: Structure) -> list[Group]:
        return [group for group in structure.groups if group.size > 1 and group.layers]

    def _usable(self, structure: Structure, failed: Mapping[str, str]) -> list[Group]:
        return [group for group in self._all(structure) if group.name not in failed]

    def _try(self, structure: Structure, group: Group) -> str:
        """Why a group can't be cut; empty if it can, perhaps with attributes that follow it."""
        reason = self._passes(structure, [group])
        if reason is None:
            return ""
        candidates = [one for one in self._attributes(structure, group) if not one.sure]
        kinds = list(dict.fromkeys(self._kind(structure, one) for one in candidates))
        known = set(self.followers)
        for size in range(1, min(len(kinds), _MOST_ATTRIBUTES) + 1):
            for chosen in combinations(kinds, size):
                self.followers = known | set(chosen)
                if self._passes(structure, [group]) is None:
                    return ""
        self.followers = known
        return reason

    def _choose_again(self, structure: Structure, failing: Mapping[str, str]) -> set[str]:
        """Let the splits of failing groups be taken otherwise, once; returns the groups concerned."""
        again = set()
        for key, numbers in structure.splits.items():
            names = {structure.groups[number].name for number in numbers} & set(failing)
            if names and self.choices.get(key, 0) < 2:
                self.choices[key] = self.choices.get(key, 0) + 1
                again |= names
        return again

    def _kind(self, structure: Structure, attribute: Attribute) -> tuple[str, str, int]:
        kind = type(dict(clean_modules(self.model))[attribute.path])
        same = [one for one in structure.attributes if (one.path, one.name) == (attribute.path, attribute.name)]
        place = next(place for place, one in enumerate(same) if one is attribute)
        return f"{kind.__module__}.{kind.__qualname__}", attribute.name, place

    def _attributes(self, structure: Structure, group: Group) -> list[Attribute]:
        number = next(place for place, one in enumerate(structure.groups) if one is group)
        return [one for one in structure.attributes if bool((one.groups == number).any())]

    def _follow(self, structure: Structure) -> tuple[Attribute, ...]:
        return tuple(one for one in structure.attributes if one.sure or self._kind(structure, one) in self.followers)

    def _passes(self, found: Structure, groups: Sequence[Group]) -> str | None:
        """None if the model runs without some units of these groups as it does with zeros in their place."""
        if not groups:
            return None
        structure = replace(found, attributes=self._follow(found))
        keep = [torch.ones(group.size, dtype=torch.bool) for group in structure.groups]
        for number, group in enumerate(structure.groups):
            if any(group is one for one in groups):
                keep[number][::2] = False  # every other one, so that no order of them could pass by chance
        kept, numbers = kept_slices(structure, keep), followed(structure, keep)
        cut, zeroed = copy_module(self.model), copy_module(self.model)
        try:
            cut_(cut, kept, numbers)
            zero_(zeroed, kept)
            exact = not any(group.spanned for group in groups)
            for run in self.runs:
                one, other = (_leaves(_seeded(run, twin)) for twin in (cut, zeroed))
                if [leaf.shape for leaf in one] != [leaf.shape for leaf in other]:
                    return "its outputs change their shape"
                if exact and not all(map(_close, one, other)):
                    return "what remains computes something else"
        except Exception as error:
            return f"the model doesn't run without some: {type(error).__name__}: {str(error).splitlines()[0][:160]}"
        return None

    def _settled(self, structure: Structure, failed: Mapping[str, str]) -> Structure:
        """The structure with only what passed; reasons for the rest."""
        usable = self._usable(structure, failed)
        numbers = [place for place, group in enumerate(structure.groups) if any(group is one for one in usable)]
        fixed = {**structure.fixed, **failed}
        for group in structure.groups:
            if group.size == 1 and group.layers:
                fixed.setdefault(group.name, "all of it hangs together")
        return replace(structure, attributes=self._follow(structure), fixed=fixed).only(numbers)


def clean_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model by clean path."""
    return ((clean_name(path), module) for path, module in model.named_modules())


def kept_slices(structure: Structure, keep: Sequence[Tensor]) -> dict[str, dict[int, Tensor]]:
    """What stays of each tensor that shrinks, by what stays of each group (bool, ``(size,)``)."""
    stays: dict[tuple[str, int], Tensor] = {}
    for group, kept in zip(structure.groups, keep, strict=True):
        if bool(kept.all()):
            continue
        for member in group.members:
            mine = (member.units < 0) | kept[member.units]
            key = member.name, member.dim
            stays[key] = stays[key] & mine if key in stays else mine
    slices: dict[str, dict[int, Tensor]] = {}
    for (name, dim), mask in stays.items():
        slices.setdefault(name, {})[dim] = mask.nonzero().flatten()
    return slices


def followed(structure: Structure, keep: Sequence[Tensor]) -> dict[str, int]:
    """The new values of the numbers that follow, by what stays of each group."""
    numbers = {}
    for one in structure.attributes:
        stays = width_kept(one.groups, one.units, keep)
        if int(stays.sum()) < len(stays):
            numbers[f"{one.path}.{one.name}".lstrip(".")] = int(stays.sum())
    return numbers


def width_kept(groups: Tensor, units: Tensor, keep: Sequence[Tensor]) -> Tensor:
    """For each place of a width whether it stays."""
    stays = torch.ones(len(groups), dtype=torch.bool)
    for number in groups.unique().tolist():
        if number >= 0:
            mine = groups == number
            stays[mine] = keep[number][units[mine]]
    return stays


def _leaves(out: Any) -> list[Tensor]:
    def opened(leaf: Any) -> Any:
        return list(vars(leaf).values()) if hasattr(leaf, "__dict__") and not isinstance(leaf, Tensor) else leaf

    leaves = pytree.tree_leaves(pytree.tree_map(opened, out))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _seeded(run: Run, model: nn.Module) -> Any:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        return run(model)


def _close(one: Tensor, other: Tensor) -> bool:
    if not one.is_floating_point():
        return bool((one == other).float().mean() > 0.9) if one.numel() else True
    one, other = one.float(), other.float()
    scale = other.abs().max().clamp(min=1e-6) if other.numel() else torch.tensor(1.0)
    return bool(((one - other).abs() <= _TOLERANCE * scale).all()) or not bool(other.isfinite().all())
