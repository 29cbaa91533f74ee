"""Finds what of a model can go: traces it, tries every group, and takes what fails otherwise or leaves it whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain, combinations, islice

import torch
from torch import Tensor

from lightning_compress.channels.cutting.cut import modules_of
from lightning_compress.channels.cutting.layers import STANDARD
from lightning_compress.channels.cutting.written import WRITTEN
from lightning_compress.channels.tracing.groups import Attribute, DependencyGroups, Group, find_structure
from lightning_compress.channels.tracing.verify import Subject

_MOST_TRIALS = 40
_MOST_TRACES = 6


def find_groups(subject: Subject) -> DependencyGroups:
    """What of a model can go; every group is tried on copies of it.

    Args:
        subject: nothing of the model is changed.
    """
    return _Explorer(subject.emptied().enlivened()).find_groups()


class _Explorer:
    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.model = subject.model
        self.followers: set[tuple[str, str, int]] = set()
        """Class and name of attributes that follow a width, and which of the widths that they may stand for."""
        self.corrected = {self._class(path) for path, one in modules_of(self.model).items() if WRITTEN in vars(one)}
        """Classes whose code writes sizes that are corrected."""
        self.choices: dict[str, int] = {}

    def find_groups(self) -> DependencyGroups:
        structure = self._trace()
        failed: dict[str, str] = {}
        while True:
            # Apart: where a norm spans what is cut, outputs say nothing of the others.
            exact = [group for group in self._usable(structure, failed) if not group.spanned]
            spanned = [group for group in self._usable(structure, failed) if group.spanned]
            found = self._one_fault(structure, exact) or self._one_fault(structure, spanned)
            if found is None:
                break
            group, reason = found
            alone = self._fault(structure, [group])
            if alone and (self._find_followers(structure, group) or self._correct(structure, group)):
                continue
            if alone and self._choose_again(structure, group):
                structure = self._trace()
            else:
                failed[group.name] = reason
        return self._settled(structure, failed)

    def _one_fault(self, structure: DependencyGroups, groups: Sequence[Group]) -> tuple[Group, str] | None:
        """A group that can't be cut, or not with those before it, with the reason; found by halving."""
        reason = self._fault(structure, groups)
        if not reason:
            return None
        right, wrong = 0, len(groups)  # so many of the first ones can go, and so many can't
        while wrong - right > 1:
            middle = (right + wrong) // 2
            if found := self._fault(structure, groups[:middle]):
                wrong, reason = middle, found
            else:
                right = middle
        return groups[right], reason

    def _trace(self) -> DependencyGroups:
        """Trace, and take splits that lead to nothing otherwise."""
        structure = self._look()
        for _ in range(3):
            dead = [key for key, groups in structure.splits.items() if not self._lives(structure, groups)]
            better = next(filter(None, (self._otherwise(structure, keys) for keys in self._alike(dead))), None)
            if better is None:
                break
            structure = better
        return structure

    def _alike(self, keys: Sequence[str]) -> list[list[str]]:
        """Some splits by class and kind, as what one is to be can hang on another; then all of them."""
        kinds = dict[tuple[str, str], list[str]]()
        for key in keys:
            path, _, what = key.partition(":")
            kinds.setdefault((self._class(path), what), []).append(key)
        few = [*kinds.values()][:_MOST_TRACES]
        return [*few, list(keys)] if len(kinds) > 1 else few

    def _otherwise(self, structure: DependencyGroups, keys: Sequence[str]) -> DependencyGroups | None:
        """What the model can lose if some splits are taken otherwise; None if that is no more."""
        kept = dict(self.choices)
        for key in keys:
            self.choices[key] = self.choices.get(key, 0) + 1
        tried = self._look()
        if len(self._all(tried)) > len(self._all(structure)):
            return tried
        self.choices = kept
        return None

    def _look(self) -> DependencyGroups:
        twin = self.subject.copy(self.model)
        return find_structure(twin, self.subject.runs, self.choices)

    @staticmethod
    def _lives(structure: DependencyGroups, groups: Iterable[int]) -> bool:
        return any(structure.groups[group].size > 1 for group in groups)

    @staticmethod
    def _all(structure: DependencyGroups) -> list[Group]:
        return [group for group in structure.groups if group.size > 1 and group.layers and not _unread(group)]

    def _usable(self, structure: DependencyGroups, failed: Mapping[str, str]) -> list[Group]:
        return [group for group in self._all(structure) if group.name not in failed]

    def _find_followers(self, structure: DependencyGroups, group: Group) -> bool:
        """Whether the group can be cut once some attributes follow it; they do so from now on."""
        candidates = [one for one in self._attributes(structure, group) if not one.sure]
        kinds = list(dict.fromkeys(self._kind(structure, one) for one in candidates))
        kinds = [kind for kind in kinds if kind not in self.followers]
        known = set(self.followers)
        sets = (chosen for size in range(1, len(kinds) + 1) for chosen in combinations(kinds, size))
        for chosen in islice(chain([tuple(kinds)] if kinds else [], sets), _MOST_TRIALS):
            self.followers = known | set(chosen)
            if not self._fault(structure, [group]):
                return True
        self.followers = known
        return False

    def _correct(self, structure: DependencyGroups, group: Group) -> bool:
        """Whether the group can be cut once sizes that some code writes are corrected; they are from now on."""
        number = next(place for place, one in enumerate(structure.groups) if one is group)
        known = set(self.corrected)
        # Code may compute the sizes of one width from another.
        modules = modules_of(self.model)
        calls = [one for one in structure.written if not isinstance(modules[one.path], STANDARD)]
        near = {self._class(one.path) for one in calls if number in one.numbers()}
        everywhere = {self._class(one.path) for one in calls}
        for kinds in dict.fromkeys((frozenset(near - known), frozenset(everywhere - known))):
            self.corrected = known | kinds
            if kinds and (not self._fault(structure, [group]) or self._find_followers(structure, group)):
                for kind in sorted(kinds):
                    self.corrected.remove(kind)
                    if self._fault(structure, [group]):
                        self.corrected.add(kind)
                return True
        self.corrected = known
        return False

    def _choose_again(self, structure: DependencyGroups, group: Group) -> bool:
        """Let the splits that the group goes through be taken otherwise, if there is another way."""
        number = next(place for place, one in enumerate(structure.groups) if one is group)
        keys = [key for key, numbers in structure.splits.items() if number in numbers and self.choices.get(key, 0) < 4]
        for key in keys:
            self.choices[key] = self.choices.get(key, 0) + 1
        return bool(keys)

    def _kind(self, structure: DependencyGroups, attribute: Attribute) -> tuple[str, str, int]:
        same = [one for one in structure.attributes if (one.path, one.name) == (attribute.path, attribute.name)]
        place = next(place for place, one in enumerate(same) if one is attribute)
        return self._class(attribute.path), attribute.name, place

    def _class(self, path: str) -> str:
        kind = type(modules_of(self.model)[path])
        return f"{kind.__module__}.{kind.__qualname__}"

    def _attributes(self, structure: DependencyGroups, group: Group) -> list[Attribute]:
        number = next(place for place, one in enumerate(structure.groups) if one is group)
        return [one for one in structure.attributes if bool((one.groups == number).any())]

    def _with_numbers(self, structure: DependencyGroups) -> DependencyGroups:
        """The structure with only the numbers that follow."""
        attributes = [one for one in structure.attributes if one.sure or self._kind(structure, one) in self.followers]
        written = [one for one in structure.written if self._class(one.path) in self.corrected]
        return replace(structure, attributes=tuple(attributes), written=tuple(written))

    def _fault(self, found: DependencyGroups, groups: Sequence[Group], exact: bool | None = None) -> str:
        """What is wrong without some units of these groups; not the same share of each, which could fit by chance."""
        if not groups:
            return ""
        return self.subject.fault(self._with_numbers(found), self._keep(found, groups), exact)

    def _settled(self, structure: DependencyGroups, failed: Mapping[str, str]) -> DependencyGroups:
        """The structure with only what passed; reasons for the rest."""
        usable = self._usable(structure, failed)
        numbers = [place for place, group in enumerate(structure.groups) if any(group is one for one in usable)]
        fixed = {**structure.fixed, **failed}
        for group in structure.groups:
            if group.size == 1 and group.layers:
                fixed.setdefault(group.name, "all of it hangs together")
        settled = replace(self._with_numbers(structure), fixed=fixed).only(numbers)
        groups = [self._exact(structure, group) for group in settled.groups]
        return replace(settled, groups=tuple(groups))

    def _exact(self, structure: DependencyGroups, group: Group) -> Group:
        """The group, not spanned if what runs across it is read by nobody."""
        if group.spanned and not group.lasting and not self._fault(structure, [group], exact=True):
            shows = self.subject.shows(structure, self._keep(structure, [group]))
            return replace(group, spanned="") if shows else group
        return group

    @staticmethod
    def _keep(structure: DependencyGroups, groups: Sequence[Group]) -> list[Tensor]:
        return [_some(group, number, groups) for number, group in enumerate(structure.groups)]


def _unread(group: Group) -> bool:
    """Whether it is but a part of a bare parameter that the example doesn't reach, such as places beyond its length."""
    return len(group.members) == 1 and not group.spanned and group.members[0].name in group.layers


def _some(group: Group, number: int, tried: Sequence[Group]) -> Tensor:
    keep = torch.ones(group.size, dtype=torch.bool)
    if any(group is one for one in tried):
        order = torch.randperm(group.size, generator=torch.Generator().manual_seed(number))
        keep[order[: max(1, group.size // (2 + number % 3))]] = False
    return keep
