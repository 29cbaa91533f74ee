"""Finds what of a model can go: traces it, verifies every group, and takes what fails otherwise or leaves it whole."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from itertools import combinations, islice

import torch
from torch import Tensor

from lightning_compress.channels.cutting.layers import STANDARD
from lightning_compress.channels.cutting.written import WRITTEN
from lightning_compress.channels.tracing.groups import Attribute, DependencyGroups, Group
from lightning_compress.channels.tracing.trace import trace
from lightning_compress.channels.tracing.verify import Subject
from lightning_compress.modules.paths import modules_of

_log = logging.getLogger("lightning_compress")
PATIENCE = 10.0
"""Seconds without a word."""
_MOST_ATTEMPTS = 40
_MOST_TRACES = 6


def find_groups(subject: Subject) -> DependencyGroups:
    """Find the channels of a model that can go; every group is verified on copies of it."""
    return _Finder(subject.emptied().varied()).find_groups()


class _Finder:
    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.modules = modules_of(subject.model)
        self.followers: set[tuple[str, str, int]] = set()
        """Class and name of attributes that follow a width, and which of the widths that they may stand for."""
        self.corrected = {self._class(path) for path, module in self.modules.items() if WRITTEN in vars(module)}
        """Classes whose code writes sizes that are corrected."""
        self.choices: dict[str, int] = {}
        self.futile: set[object] = set()
        """What was tried to no avail: other interpretations of splits, a group with all that may follow it."""
        self.attempts, self._told = 0, time.monotonic()

    def find_groups(self) -> DependencyGroups:
        groups = self._trace()
        failed: dict[str, str] = {}
        while True:
            # Apart: where a norm spans what is cut, outputs say nothing of the others.
            usable = self._usable(groups, failed)
            exact = [group for group in usable if not group.spanned]
            spanned = [group for group in usable if group.spanned]
            found = self._first_failure(groups, exact) or self._first_failure(groups, spanned)
            if found is None:
                break
            group, reason = found
            alone = self._failure(groups, [group])
            known = _signature(group), frozenset(self.followers), frozenset(self.corrected)
            if alone and known not in self.futile:
                if self._find_followers(groups, group) or self._correct(groups, group):
                    continue
                self.futile.add(known)
            if alone and self._choose_again(groups, group):
                groups = self._trace()
            else:
                failed[group.name] = reason
                if alone:
                    failed.update(self._fail_alike(groups, group, usable))
        return self._settled(groups, failed)

    def _first_failure(self, groups: DependencyGroups, cut: Sequence[Group]) -> tuple[Group, str] | None:
        """Find a group that can't be cut, or not with those before it, by halving; return it with the reason."""
        reason = self._failure(groups, cut)
        if not reason:
            return None
        right, wrong = 0, len(cut)  # so many of the first ones can go, and so many can't
        while wrong - right > 1:
            middle = (right + wrong) // 2
            if found := self._failure(groups, cut[:middle]):
                wrong, reason = middle, found
            else:
                right = middle
        return cut[right], reason

    def _fail_alike(self, groups: DependencyGroups, group: Group, usable: Sequence[Group]) -> dict[str, str]:
        """Return those of the groups alike, in other blocks, that fail by themselves too, with the reasons."""
        alike = [other for other in usable if other is not group and _kind(other) == _kind(group)]
        reasons = {other.name: self._failure(groups, [other]) for other in alike}
        return {name: reason for name, reason in reasons.items() if reason}

    def _trace(self) -> DependencyGroups:
        """Trace, and interpret splits anew where nothing can go."""
        groups = self._trace_once()
        for _ in range(3):
            single = {number for number, group in enumerate(groups.all) if group.size == 1}
            dead = [key for key, numbers in groups.splits.items() if numbers <= single]
            better = next(filter(None, (self._otherwise(groups, keys) for keys in self._alike(dead))), None)
            if better is None:
                break
            groups = better
        return groups

    def _alike(self, keys: Sequence[str]) -> list[list[str]]:
        """Group splits by class and kind, as one may depend on another; the last group is all of them."""
        kinds = dict[tuple[str, str], list[str]]()
        for key in keys:
            path, _, what = key.partition(":")
            kinds.setdefault((self._class(path), what), []).append(key)
        few = [*kinds.values()][:_MOST_TRACES]
        return [*few, list(keys)] if len(kinds) > 1 else few

    def _otherwise(self, groups: DependencyGroups, keys: Sequence[str]) -> DependencyGroups | None:
        """Trace with other interpretations of some splits; None if no more can go then."""
        before = dict(self.choices)
        for key in keys:
            self.choices[key] = self.choices.get(key, 0) + 1
        known = frozenset((key, self.choices[key]) for key in keys)
        if known not in self.futile:
            tried = self._trace_once()
            if len(self._usable(tried)) > len(self._usable(groups)):
                return tried
            self.futile.add(known)
        self.choices = before
        return None

    def _trace_once(self) -> DependencyGroups:
        return trace(self.subject.twin(), self.subject.runs, self.choices)

    @staticmethod
    def _usable(groups: DependencyGroups, failed: Container[str] = ()) -> list[Group]:
        candidates = (group for group in groups.all if group.size > 1 and group.layers and not _unread(group))
        return [group for group in candidates if group.name not in failed]

    def _find_followers(self, groups: DependencyGroups, group: Group) -> bool:
        """Try whether the group can be cut if some attributes follow it; they do so from now on."""
        number = groups.all.index(group)
        near = [attribute for attribute in groups.attributes if bool((attribute.groups == number).any())]
        candidates = dict.fromkeys(self._kind(groups, attribute) for attribute in near if not attribute.sure)
        known = set(self.followers)
        kinds = [kind for kind in candidates if kind not in known]
        sets = (chosen for size in (len(kinds), *range(1, len(kinds) + 1)) for chosen in combinations(kinds, size))
        for chosen in islice(sets if kinds else (), _MOST_ATTEMPTS):
            self.followers = known | set(chosen)
            if not self._failure(groups, [group], hasty=True):
                return True
        self.followers = known
        return False

    def _correct(self, groups: DependencyGroups, group: Group) -> bool:
        """Try whether the group can be cut if sizes in some code are corrected; they are from now on."""
        number = groups.all.index(group)
        known = set(self.corrected)
        # Code may compute the sizes of one width from another.
        calls = [call for call in groups.written if not isinstance(self.modules[call.path], STANDARD)]
        near = {self._class(call.path) for call in calls if number in call.numbers()}
        everywhere = {self._class(call.path) for call in calls}
        for kinds in dict.fromkeys((frozenset(near - known), frozenset(everywhere - known))):
            self.corrected = known | kinds
            if kinds and (not self._failure(groups, [group], hasty=True) or self._find_followers(groups, group)):
                for kind in sorted(kinds):
                    self.corrected.remove(kind)
                    if self._failure(groups, [group], hasty=True):
                        self.corrected.add(kind)
                return True
        self.corrected = known
        return False

    def _choose_again(self, groups: DependencyGroups, group: Group) -> bool:
        """Interpret the splits that the group goes through anew, and those alike of groups that come behind it.

        False if there is no other way.
        """
        number = groups.all.index(group)
        keys = [key for key, numbers in groups.splits.items() if number in numbers and self.choices.get(key, 0) < 4]
        kinds = {self._kind_of_split(key) for key in keys}
        behind = [key for key, numbers in groups.splits.items() if min(numbers, default=0) > number]
        for key in [*keys, *(key for key in behind if self._kind_of_split(key) in kinds)]:
            self.choices[key] = self.choices.get(key, 0) + 1
        return bool(keys)

    def _kind_of_split(self, key: str) -> tuple[str, str, int]:
        """Whose code splits how, whatever the sizes, and how often it was taken otherwise."""
        path, _, what = key.partition(":")
        return self._class(path), re.sub(r"\d+", "", what), self.choices.get(key, 0)

    def _kind(self, groups: DependencyGroups, attribute: Attribute) -> tuple[str, str, int]:
        same = [other for other in groups.attributes if (other.path, other.name) == (attribute.path, attribute.name)]
        return self._class(attribute.path), attribute.name, same.index(attribute)

    def _class(self, path: str) -> str:
        kind = type(self.modules[path])
        return f"{kind.__module__}.{kind.__qualname__}"

    def _with_numbers(self, groups: DependencyGroups) -> DependencyGroups:
        """Return the groups with only those attributes and sizes that follow."""
        known = self.followers
        attributes = tuple(held for held in groups.attributes if held.sure or self._kind(groups, held) in known)
        written = tuple(call for call in groups.written if self._class(call.path) in self.corrected)
        return replace(groups, attributes=attributes, written=written)

    def _failure(
        self, groups: DependencyGroups, cut: Sequence[Group], exact: bool | None = None, hasty: bool = False
    ) -> str:
        """Say what fails without some units of these groups: not the same share of each, which could fit by chance."""
        if not cut:
            return ""
        self.attempts += 1
        if time.monotonic() > self._told + PATIENCE:
            self._told = time.monotonic()
            name = type(self.subject.model).__name__
            _log.warning(f"{name}: what can go is still being looked for; cuts tried so far: {self.attempts}")
        return self.subject.failure(self._with_numbers(groups), self._keep(groups, cut), exact, hasty=hasty)

    def _settled(self, groups: DependencyGroups, failed: Mapping[str, str]) -> DependencyGroups:
        """Keep only the groups that passed, with reasons for the rest."""
        usable = self._usable(groups, failed)
        numbers = [number for number, group in enumerate(groups.all) if group in usable]
        fixed = {**groups.fixed, **failed}
        for group in groups.all:
            if group.size == 1 and group.layers:
                fixed.setdefault(group.name, "all of it hangs together")
        settled = replace(self._with_numbers(groups), fixed=fixed).only(numbers)
        return replace(settled, all=tuple(self._exact(groups, group) for group in settled.all))

    def _exact(self, groups: DependencyGroups, group: Group) -> Group:
        """Return the group, not spanned if no output shows what is computed across it."""
        if group.spanned and not group.lasting and not self._failure(groups, [group], exact=True):
            shows = self.subject.shows(groups, self._keep(groups, [group]))
            return replace(group, spanned="") if shows else group
        return group

    @staticmethod
    def _keep(groups: DependencyGroups, cut: Sequence[Group]) -> list[Tensor]:
        return [_some(group, number, group in cut) for number, group in enumerate(groups.all)]


def _unread(group: Group) -> bool:
    """Whether a group is only a part of a bare parameter that the example doesn't reach (places past its length)."""
    return len(group.members) == 1 and not group.spanned and group.members[0].name in group.layers


def _kind(group: Group) -> object:
    return group.size, tuple((re.sub(r"\d+", "", member.name), member.dim) for member in group.members)


def _signature(group: Group) -> object:
    return tuple((member.name, member.dim, *member.units.tolist()) for member in group.members)


def _some(group: Group, number: int, cut: bool) -> Tensor:
    """Return what stays of a group in a trial; of a wide one a multiple of 8, as some kernels take no other number."""
    keep = torch.ones(group.size, dtype=torch.bool)
    if cut:
        order = torch.randperm(group.size, generator=torch.Generator().manual_seed(number))
        gone = max(1, group.size // (2 + number % 3))
        keep[order[: gone - gone % 8 if group.size >= 32 and not group.size % 8 else gone]] = False
    return keep
