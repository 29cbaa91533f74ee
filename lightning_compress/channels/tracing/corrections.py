"""Finds which sizes in a module's code a cut makes wrong, and what they must become, from traced calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_compress.channels.cutting.written import Correction
from lightning_compress.channels.tracing.notes import Factors, Written
from lightning_compress.channels.tracing.tracer import compressed, first_along, varying

Places = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Of labels the groups, -1 for what stays, and their units in these."""
Widths = tuple[tuple[int, Tensor, Tensor], ...]
"""Dimensions with, for each place along them, the group, or -1, and the unit in that."""


@dataclass(frozen=True)
class WrittenSizes:
    """A call whose sizes a module's code may write: see `notes.Written`.

    Attributes:
        path: of the module.
        shape: of the tensor that it takes.
        widths: the dimensions of that which may shrink.
        view: the shape of what comes out of a view, and the dimensions of which the size is known.
        ends: places where parts of a width end.
    """

    path: str
    shape: tuple[int, ...]
    widths: Widths
    view: tuple[tuple[int, ...], Widths] | None
    ends: tuple[int, ...]

    def renumbered(self, place: Tensor) -> WrittenSizes:
        """The same where groups have other numbers, -1 for those that stay."""

        def change(widths: Widths) -> Widths:
            return tuple((dim, place[groups], units) for dim, groups, units in widths)

        view = None if self.view is None else (self.view[0], change(self.view[1]))
        return replace(self, widths=change(self.widths), view=view)

    def numbers(self) -> set[int]:
        """The groups that it concerns."""
        widths = (*self.widths, *(self.view[1] if self.view else ()))
        return {number for _, groups, _ in widths for number in groups.unique().tolist()} - {-1}


def written_sizes(written: Sequence[Written], places: Places) -> tuple[WrittenSizes, ...]:
    """Return calls that name the size of something that has labels, each kind once."""
    found = dict[object, WrittenSizes]()
    for call in written:
        widths = made = _widths(call.factors, places)
        view = None
        if call.view is not None:
            shape, factors = call.view
            sizes = {
                dim: (groups, units) for dim, groups, units in _widths(factors, places) if bool((groups >= 0).any())
            }
            spans = {dim: _period(groups, units) for dim, groups, units in widths}
            for taken, dims in _blocks(call.shape, shape) if math.prod(call.shape) == math.prod(shape) else ():
                left = spans.get(taken[0], 1) if len(taken) == 1 else 1
                for dim in reversed(dims):  # all that a width is split into, but not what it is repeated for
                    left, rest = divmod(left, shape[dim])
                    if rest or not left:
                        break
                    sizes.setdefault(dim, (torch.full((shape[dim],), -1),) * 2)
            made = tuple((dim, *sizes[dim]) for dim in sorted(sizes))
            view = shape, made
        every = [(dim, *groups.tolist(), *units.tolist()) for dim, groups, units in (*widths, *made)]
        if every:
            key = call.path, call.shape, call.ends, view and view[0], *every
            found.setdefault(key, WrittenSizes(call.path, call.shape, widths, view, call.ends))
    return tuple(found.values())


def _widths(factors: Factors, places: Places) -> Widths:
    widths = []
    for factor in factors:
        groups, units = places(factor)
        # What is united needn't differ along all dimensions any more.
        dims = varying(compressed(torch.where(groups < 0, -factor, (groups << 32) + units)))
        if len(dims) == 1:
            widths.append((dims[0], *places(first_along(factor, dims[0]))))
    return tuple(widths)


def _blocks(shape: Sequence[int], other: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Yield which dimensions of a view are made of which; those of size 1 are left out."""
    dims, made = ([dim for dim, size in enumerate(sizes) if size != 1] for sizes in (shape, other))
    while dims or made:
        block: tuple[list[int], list[int]] = [], []
        left = right = 1
        while left != right or left == 1:
            if left <= right:
                block[0].append(dims.pop(0))
                left *= shape[block[0][-1]]
            else:
                block[1].append(made.pop(0))
                right *= other[block[1][-1]]
        yield block


def corrections(old: list[Correction], calls: Sequence[WrittenSizes], keep: Sequence[Tensor]) -> list[Correction]:
    """Return a module's corrections after one more cut; old ones are continued."""
    new = [correction for call in calls if (correction := (_view if call.view else _parts)(call, keep))]
    found = []
    for before in old:
        after = next((correction for correction in new if _continues(before, correction)), None)
        found.append(before if after is None else _together(before, after))
        new = [correction for correction in new if correction != after]
    return found + [correction for place, correction in enumerate(new) if correction not in new[:place]]


def _view(call: WrittenSizes, keep: Sequence[Tensor]) -> Correction:
    assert call.view is not None
    shape, labels = call.view
    taken, made = (
        [[dim, *_alike(groups, units, keep)] for dim, groups, units in dims] for dims in (call.widths, labels)
    )
    lengths = [int(width_kept(groups, units, keep).sum()) for _, groups, units in call.widths]
    taken = [[*row, length] for row, length in zip(taken, lengths, strict=True)]
    return ["view", len(call.shape), taken, len(shape), made]


def _parts(call: WrittenSizes, keep: Sequence[Tensor]) -> Correction | None:
    [(dim, groups, units)] = call.widths
    stays = width_kept(groups, units, keep)
    now = int(stays.sum())
    ends = [[end, int(stays[:end].sum())] for end in call.ends]
    return None if now == len(stays) else ["parts", len(call.shape), [[dim, len(stays), now]], len(ends), ends]


def _alike(groups: Tensor, units: Tensor, keep: Sequence[Tensor]) -> tuple[int, int]:
    """Return a dimension's size before and after; of one part, where it holds several alike (heads of samples)."""
    if bool((groups < 0).all()):
        return len(groups), len(groups)
    period = _period(groups, units)
    return period, int(width_kept(groups, units, keep)[:period].sum())


def _period(groups: Tensor, units: Tensor) -> int:
    """Return the length of what a dimension holds once or several times; 1 where nothing of it can go."""
    size = len(groups)
    return next(
        period
        for period in range(1, size + 1)
        if size % period == 0 and all(torch.equal(side[period:], side[: size - period]) for side in (groups, units))
    )


def _continues(old: Correction, new: Correction) -> bool:
    """Whether the sizes that an old correction leads to are those that a new one starts from."""
    if old[:2] != new[:2] or (old[0] == "view" and old[3] != new[3]):
        return False
    rows = [(row, new_row) for row in old[2] for new_row in new[2] if row[0] == new_row[0]]
    if old[0] == "view":
        rows += [(row, new_row) for row in old[4] for new_row in new[4] if row[0] == new_row[0]]
    return len(rows) > 0 and all(row[2] == new_row[1] for row, new_row in rows)


def _together(old: Correction, new: Correction) -> Correction:
    taken = {row[0]: row for row in old[2]}
    for dim, before, *now in new[2]:
        taken[dim] = [dim, taken[dim][1] if dim in taken else before, *now]
    if old[0] == "parts":
        now_of = dict(map(tuple, new[4]))
        ends = [[end, now_of[place]] for end, place in old[4] if place in now_of]
        return ["parts", old[1], [*taken.values()], len(ends), ends]
    made = {row[0]: row for row in old[4]}
    for dim, before, now in new[4]:
        made[dim] = [dim, made[dim][1] if dim in made else before, now]
    return ["view", old[1], [*taken.values()], old[3], [*made.values()]]


def width_kept(groups: Tensor, units: Tensor, keep: Sequence[Tensor]) -> Tensor:
    """Return for each place of a width whether it stays."""
    stays = torch.ones(len(groups), dtype=torch.bool)
    for number in groups.unique().tolist():
        if number >= 0:
            inside = groups == number
            stays[inside] = keep[number][units[inside]]
    return stays
