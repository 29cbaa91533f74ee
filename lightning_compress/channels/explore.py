"""Finds what of a model can go: traces it, tries every group, and takes what fails otherwise or leaves it whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations

import torch
from torch import Tensor

from lightning_compress.channels.groups import Attribute, Group, Structure, find_structure
from lightning_compress.channels.remove import modules_of
from lightning_compress.channels.trial import Subject

_MOST_ATTRIBUTES = 5


def explore(subject: Subject) -> Structure:
    """What of a model can go; every group is tried on copies of it.

    Args:
        subject: nothing of the model is changed.
    """
    return _Explorer(subject).explore()


class _Explorer:
    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.model = subject.model
        self.followers: set[tuple[str, str, int]] = set()
        """Class and name of attributes that follow a width, and which of the widths that they may stand for."""
        self.choices: dict[str, int] = {}

    def explore(self) -> Structure:
        structure = self._trace()
        failed: dict[str, str] = {}
        for _ in range(4):
            useful = self._usable(structure, failed)
            if not self._fault(structure, useful):
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
        twin = self.subject.copy(self.model)
        return find_structure(twin, [lambda run=run: run(twin) for run in self.subject.runs], self.choices)  # type: ignore[misc]

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
        reason = self._fault(structure, [group])
        if not reason:
            return ""
        candidates = [one for one in self._attributes(structure, group) if not one.sure]
        kinds = list(dict.fromkeys(self._kind(structure, one) for one in candidates))
        known = set(self.followers)
        for size in range(1, min(len(kinds), _MOST_ATTRIBUTES) + 1):
            for chosen in combinations(kinds, size):
                self.followers = known | set(chosen)
                if not self._fault(structure, [group]):
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
        kind = type(modules_of(self.model)[attribute.path])
        same = [one for one in structure.attributes if (one.path, one.name) == (attribute.path, attribute.name)]
        place = next(place for place, one in enumerate(same) if one is attribute)
        return f"{kind.__module__}.{kind.__qualname__}", attribute.name, place

    def _attributes(self, structure: Structure, group: Group) -> list[Attribute]:
        number = next(place for place, one in enumerate(structure.groups) if one is group)
        return [one for one in structure.attributes if bool((one.groups == number).any())]

    def _follow(self, structure: Structure) -> tuple[Attribute, ...]:
        return tuple(one for one in structure.attributes if one.sure or self._kind(structure, one) in self.followers)

    def _fault(self, found: Structure, groups: Sequence[Group]) -> str:
        """What is wrong without some units of these groups; not the same share of each, which could fit by chance."""
        if not groups:
            return ""
        structure = replace(found, attributes=self._follow(found))
        return self.subject.fault(
            structure, [_some(group, number, groups) for number, group in enumerate(found.groups)]
        )

    def _settled(self, structure: Structure, failed: Mapping[str, str]) -> Structure:
        """The structure with only what passed; reasons for the rest."""
        usable = self._usable(structure, failed)
        numbers = [place for place, group in enumerate(structure.groups) if any(group is one for one in usable)]
        fixed = {**structure.fixed, **failed}
        for group in structure.groups:
            if group.size == 1 and group.layers:
                fixed.setdefault(group.name, "all of it hangs together")
        return replace(structure, attributes=self._follow(structure), fixed=fixed).only(numbers)


def _some(group: Group, number: int, tried: Sequence[Group]) -> Tensor:
    keep = torch.ones(group.size, dtype=torch.bool)
    if any(group is one for one in tried):
        order = torch.randperm(group.size, generator=torch.Generator().manual_seed(number))
        keep[order[: max(1, group.size // (2 + number % 3))]] = False
    return keep
