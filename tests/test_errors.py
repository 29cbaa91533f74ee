from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_compress.errors import CompressionError, MissingExtraError, NoEffectWarning, invalid, nearest


def test_grammar_names_the_argument_the_rule_the_value_and_the_remedy() -> None:
    error = invalid("sparsity", "lie in [0, 1)", 1.5, "Give a fraction.")
    assert str(error) == "`sparsity` must lie in [0, 1). Received: sparsity=1.5. Give a fraction."
    assert str(invalid("scope", "be 'global'", "x")) == "`scope` must be 'global'. Received: scope='x'."


def test_errors_are_value_errors_and_a_missing_extra_is_an_import_error_too() -> None:
    assert issubclass(CompressionError, ValueError)
    assert issubclass(MissingExtraError, CompressionError) and issubclass(MissingExtraError, ImportError)
    assert issubclass(NoEffectWarning, UserWarning)


def test_a_missing_extra_says_what_to_type() -> None:
    message = str(MissingExtraError("The plot", "matplotlib", "plots"))
    assert message == (
        'The plot needs `matplotlib`, which isn\'t installed. Install it: pip install "lightning-compress[plots]"'
    )


@pytest.mark.parametrize(
    "name, known, expected",
    [
        ("int8_statik", ["int8_static", "int8_dynamic", "nf4"], "Nearest: int8_static, int8_dynamic."),
        ("encoder.conv", ["net.conv", "net.head"], "Nearest: net.conv."),
        ("zzz", ["a", "b"], "Known: a, b."),
        ("zzz", [f"layer{i}" for i in range(20)], "Known: layer0, layer1, layer2"),
        ("zzz", [], "There are none."),
    ],
    ids=["typo", "wrong prefix", "nothing near", "many", "nothing at all"],
)
def test_nearest(name: str, known: list[str], expected: str) -> None:
    assert nearest(name, known).startswith(expected)


@given(st.text(min_size=1, max_size=8), st.lists(st.text("abc.", min_size=1, max_size=8), max_size=12))
def test_nearest_names_only_what_exists(name: str, known: list[str]) -> None:
    said = nearest(name, known).rstrip(".")
    if said.startswith("Nearest: "):
        named = nearest(name, known).removeprefix("Nearest: ")[:-1].split(", ")
        assert 1 <= len(named) <= 3
        assert set(named) <= set(known)
    else:
        assert said.startswith(("Known: ", "There are none"))
