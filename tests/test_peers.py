from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_the_page_is_of_the_results(benchmarks: None) -> None:
    lines = import_module("peers").read(BENCHMARKS / "peers.jsonl")
    page = import_module("peers_tables").page(lines)
    assert f"{page}\n" == (BENCHMARKS / "RESULTS.md").read_text("utf-8")
    measured = {line["row"] for line in lines if "row" in line}
    assert {row for row in measured if row not in page} == set() and len(measured) > 10


def test_what_failed_and_what_is_missing_is_said(benchmarks: None) -> None:
    tables = import_module("peers_tables")
    start: dict[str, Any] = {"table": "channels", "network": "cnn-bn", "seed": 0}
    page = tables.page([{**start, "row": "`ChannelPruning`", "error": "CompressionError: too narrow"}])
    assert "`ChannelPruning` failed: CompressionError: too narrow" in page
    assert "torch-pruning by hand wasn't measured: it needs torch_pruning." in page
    assert "all channels wasn't measured." in page and "pretrained wasn't measured: it needs torchcrepe." in page


def test_differences_are_paired_and_their_intervals_are_of_student(benchmarks: None) -> None:
    interval = import_module("peers_tables").interval
    # 4.303 is the 0.975 quantile of two degrees of freedom; the differences' deviation is 1.
    half = 4.303 / 3**0.5
    assert interval([1.0, 2.0, 3.0]) == f"+2.00 [{2 - half:+.2f}, {2 + half:+.2f}]"
    assert interval([4.0, 5.0, 6.0]) == f"**+5.00 [{5 - half:+.2f}, {5 + half:+.2f}]**"
    assert interval([1.0]) == "+1.00"


def user_code(model: Any, data: Any) -> Any:
    """A docstring counts nothing."""
    import json

    # Nor does a comment.
    text = json.dumps(
        [model],
    )
    return text, data


def test_lines_of_code_are_those_of_the_body(benchmarks: None) -> None:
    assert import_module("peers_code").lines_of_code(user_code) == 4
