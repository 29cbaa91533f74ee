"""Chooses how many units of each group stay, so that a budget of parameters, macs or channels is met."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_compress.channels.tracing.groups import DependencyGroups, Group
from lightning_compress.modules.paths import is_at_or_below
from lightning_compress.targets import Scope


class _Width:
    """Counts how many places of a width stay, by the group of each place, or -1, and its unit in that."""

    def __init__(self, groups: Tensor, units: Tensor) -> None:
        self.size = len(groups)
        self._fixed = int((groups < 0).sum())
        self._alike: list[tuple[int, int]] = []
        self._unlike: list[tuple[int, Tensor]] = []
        for number in groups.unique().tolist():
            if number >= 0:
                places = torch.bincount(units[groups == number])
                if bool((places == places[0]).all()):
                    self._alike.append((number, int(places[0])))
                else:
                    self._unlike.append((number, places))

    def kept(self, keep: Sequence[Tensor], counts: Sequence[int]) -> int:
        """The places that stay, by what stays of each group and how many units that are."""
        total = self._fixed + sum(places * counts[number] for number, places in self._alike)
        return total + sum(int(places[keep[number][: len(places)]].sum()) for number, places in self._unlike)


class Sizes:
    """Counts what a model costs, by what stays of its groups."""

    def __init__(self, groups: DependencyGroups) -> None:
        blocks = {number: group.name for number, group in enumerate(groups.all) if group.skip}
        costs = [
            (
                macs,
                [_Width(*width) for width in widths] + [_block(number) for number in blocks if blocks[number] in path],
            )
            for macs, widths, path in groups.costs
        ]
        self._costs = [(macs, widths) for macs, widths in costs if widths]
        self._fixed_macs = groups.macs - sum(macs for macs, _ in self._costs)
        self._widths = [
            (group.width / group.size, [number for number in blocks if lies_in(group, blocks[number])])
            for group in groups.all
        ]
        members: dict[str, dict[int, list[tuple[int, Tensor]]]] = {}
        inside: dict[str, list[_Width]] = {}
        for number, group in enumerate(groups.all):
            for member in group.members:
                if group.skip:
                    inside.setdefault(member.name, []).append(_block(number))
                else:
                    members.setdefault(member.name, {}).setdefault(member.dim, []).append((number, member.units))
        counted = {name: groups.shapes[name] for name in groups.counted}
        changing = members.keys() | inside.keys()
        self._fixed_params = sum(torch.Size(shape).numel() for name, shape in counted.items() if name not in changing)
        self._params = [
            [_width_of(members.get(name, {}).get(dim, []), size) for dim, size in enumerate(shape)]
            + inside.get(name, [])
            for name, shape in counted.items()
            if name in changing
        ]

    def macs(self, keep: Sequence[Tensor]) -> float:
        """Multiply-accumulates."""
        counts = _counts(keep)
        total = float(self._fixed_macs)
        for macs, widths in self._costs:
            total += macs * math.prod(width.kept(keep, counts) / width.size for width in widths)
        return total

    def params(self, keep: Sequence[Tensor]) -> float:
        """Elements of all parameters; not those that only help in training."""
        counts = _counts(keep)
        return float(
            self._fixed_params + sum(math.prod(width.kept(keep, counts) for width in dims) for dims in self._params)
        )

    def channels(self, keep: Sequence[Tensor]) -> float:
        """Channels of the groups; those of layers in a block leave with it."""
        widths = zip(self._widths, _counts(keep), strict=True)
        return float(
            sum(width * count for (width, blocks), count in widths if all(bool(keep[n].all()) for n in blocks))
        )


def lies_in(group: Group, block: str) -> bool:
    """Whether all layers that make the channels of a group are in the module at a path."""
    return bool(group.layers) and all(is_at_or_below(layer, block) for layer in group.layers)


def _block(number: int) -> _Width:
    """A width of one place, which stays as long as a block does."""
    return _Width(torch.tensor([number]), torch.tensor([0]))


def _counts(keep: Sequence[Tensor]) -> list[int]:
    return [int(mask.sum()) for mask in keep]


def _width_of(parts: list[tuple[int, Tensor]], size: int) -> _Width:
    """The width that several groups have parts of."""
    groups, units = torch.full((size,), -1), torch.full((size,), -1)
    for number, part in parts:
        groups[part >= 0], units[part >= 0] = number, part[part >= 0]
    return _Width(groups, units)


@dataclass(frozen=True)
class Limits:
    """Limits how many units of a group stay: at least so many, in steps, or exactly so many.

    Attributes:
        least: so many stay at least.
        most: so many stay at most: all of them, or, once some have left, a multiple of the step.
        step: the units that stay are a multiple of this, or all.
        exactly: so many stay.
    """

    least: int
    most: int
    step: int
    exactly: int | None = None

    def nearest(self, wanted: float) -> int:
        """The allowed number of units that is nearest to ``wanted``."""
        if self.exactly is not None:
            return self.exactly
        return min(self.most, max(self.least, round(wanted / self.step) * self.step))


def choose(
    ranked: Sequence[Tensor],
    limits: Sequence[Limits],
    cost: Callable[[list[Tensor]], float],
    target: float,
    scope: Scope,
) -> list[Tensor]:
    """Choose what stays of each group, so that ``cost`` comes nearest to ``target``; the least important go first.

    The scope says whether the units of all groups are ranked together, or the same fraction of each group is taken.
    """
    orders = [scores.argsort(stable=True) for scores in ranked]
    ranks = [order.argsort() for order in orders]
    sizes = [len(scores) for scores in ranked]

    def keep(counts: Sequence[int]) -> list[Tensor]:
        return [place >= size - count for place, size, count in zip(ranks, sizes, counts, strict=True)]

    if scope == "global":
        owner = torch.cat([torch.full((size,), number) for number, size in enumerate(sizes)])
        # Ties are broken by the place within the group, so that no group pays for all.
        places = torch.cat([place.double() / len(place) for place in ranks])
        first = places.argsort(stable=True)
        everything = first[torch.cat(list(ranked))[first].argsort(stable=True)]
        owners = owner[everything]

        def counts_at(removed: int) -> list[int]:
            gone = torch.bincount(owners[:removed], minlength=len(sizes)).tolist()
            return [limit.nearest(size - out) for limit, size, out in zip(limits, sizes, gone, strict=True)]

        most = len(owners)
    else:

        def counts_at(removed: int) -> list[int]:
            return [limit.nearest(size * (1 - removed / _STEPS)) for limit, size in zip(limits, sizes, strict=True)]

        most = _STEPS
    low, high = 0, most  # as much as `high` is enough, if anything is
    while low < high:
        middle = (low + high) // 2
        if cost(keep(counts_at(middle))) <= target:
            high = middle
        else:
            low = middle + 1
    counts = counts_at(high)
    if scope == "layer":  # what rounding misses is made up for by a step in some layers, not by many in one
        limits = [
            replace(
                limit,
                least=max(limit.least, math.ceil(count / limit.step - 1) * limit.step),
                most=min(limit.most, count + limit.step),
            )
            for limit, count in zip(limits, counts, strict=True)
        ]
    return keep(_fill(counts, ranked, limits, orders, lambda counts: cost(keep(counts)), target))


_STEPS = 2000
_MOST_MOVES = 200


def _fill(
    counts: list[int],
    ranked: Sequence[Tensor],
    limits: Sequence[Limits],
    orders: Sequence[Tensor],
    cost: Callable[[list[int]], float],
    target: float,
) -> list[int]:
    """Give back, or take, one step at a time as long as that brings the cost nearer to its target."""
    best, distance = counts, abs(cost(counts) - target)
    for _ in range(_MOST_MOVES):
        moves = []
        for number, (count, limit, order) in enumerate(zip(best, limits, orders, strict=True)):
            size = len(order)
            more, less = limit.nearest(count + limit.step), limit.nearest(count - limit.step)
            if more > count:  # the most important first
                moves.append((0, -float(ranked[number][order[size - more]]), number, more))
            if less < count:  # the least important first
                moves.append((1, float(ranked[number][order[size - count]]), number, less))
        for _, _, number, moved in sorted(moves):
            tried = [moved if place == number else count for place, count in enumerate(best)]
            if (off := abs(cost(tried) - target)) < distance:
                best, distance = tried, off
                break
        else:
            break
    return best
