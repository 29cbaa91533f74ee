"""Unions of labels against plain union-find."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_compress.channels.tracing.disjoint_sets import FIXED, DisjointSets

Pairs = list[tuple[int, int]]


@given(
    st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=14),
    st.lists(st.integers(1, 11), max_size=3),
    st.lists(st.integers(1, 11), max_size=3),
)
@settings(max_examples=150)
def test_unions_are_resolved_as_by_union_find(pairs: Pairs, frozen: list[int], spans: list[int]) -> None:
    sets = DisjointSets()
    sets.new(11)
    for label, other in pairs:
        sets.union(torch.tensor([label]), torch.tensor([other]))
    for label in frozen:
        sets.freeze(torch.tensor([label]), "frozen")
    for label in spans:
        sets.span(torch.tensor([label]), "spanned")
    parent = list(range(12))

    def root(label: int) -> int:
        return label if parent[label] == label else root(parent[label])

    held = set(frozen)
    for label, other in pairs:
        if FIXED in (label, other):
            held.add(max(label, other))
        else:
            parent[max(root(label), root(other))] = min(root(label), root(other))
    held = {root(label) for label in held} - {FIXED}
    units = sets.resolve()
    assert units.all.tolist() == [root(label) for label in range(12)]
    assert units.of(torch.arange(12)).tolist() == [FIXED if root(label) in held else root(label) for label in range(12)]
    assert set(units.fixed) == held
    assert set(units.spanned) == {root(label) for label in spans}
