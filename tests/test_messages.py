"""Many layers in few words: nothing is lost, nothing is added."""

from __future__ import annotations

import re
from itertools import chain

import hypothesis.strategies as st
from hypothesis import given

from lightning_compress.messages import MOST_LINES, by_reason, in_short, merged, named, they

PARTS = st.one_of(st.sampled_from(["h", "attn", "fc", "00", "7th"]), st.integers(0, 12).map(str))
PATHS = st.lists(st.lists(PARTS, min_size=1, max_size=4).map(".".join), unique=True, max_size=30)


def expanded(pattern: str) -> list[str]:
    """Every path that a merged one stands for."""
    braces = re.search(r"\{([\d,-]+)\}", pattern)
    if braces is None:
        return [pattern]
    ends = [run.split("-") for run in braces[1].split(",")]
    indices = chain.from_iterable(range(int(run[0]), int(run[-1]) + 1) for run in ends)
    return [path for index in indices for path in expanded(pattern.replace(braces[0], str(index), 1))]


@given(PATHS)
def test_merged_paths_stand_for_just_these(paths: list[str]) -> None:
    again = [path for pattern in merged(paths) for path in expanded(pattern)]
    assert sorted(again) == sorted(paths)
    assert len(merged(paths)) <= len(paths)


def test_blocks_within_blocks_are_one_word() -> None:
    paths = [f"layers.{i}.blocks.{j}.fc" for i in range(4) for j in range(6)]
    assert merged(paths) == ["layers.{0-3}.blocks.{0-5}.fc"]


def test_of_very_many_names_only_the_first_are_told() -> None:
    assert named([f"layer_{name}" for name in "abcdefghijk"]).endswith("`layer_h` and 3 more")
    assert they(["a.0", "a.1"], "is", "are") == "`a.{0-1}` are"


WHY = st.sampled_from(["no kernel", "3 of 4", "5 of 4", "5 of 6", ""])
REASONS = st.dictionaries(st.text("ab.01", min_size=1), WHY)


@given(REASONS)
def test_every_path_has_its_reason(reasons: dict[str, str]) -> None:
    groups = by_reason(reasons)
    assert sorted(chain.from_iterable(groups.values())) == sorted(reasons)
    for told, paths in groups.items():
        for path in paths:
            assert re.fullmatch(re.escape(told).replace(r"\*", r"\d+"), reasons[path])


@given(st.lists(st.text(), max_size=30))
def test_a_log_has_ten_lines_at_most(lines: list[str]) -> None:
    shown = in_short(lines)
    assert len(shown) == min(len(lines), MOST_LINES)
    if len(lines) > MOST_LINES:
        assert shown[:-1] == lines[: MOST_LINES - 1]
        assert f"{len(lines) - MOST_LINES + 1} more" in shown[-1]
