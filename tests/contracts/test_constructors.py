"""Every public constructor under fire: whatever YAML can say is taken, or refused in the package's grammar."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import lightning_compress
from lightning_compress import CompressionError, SoftTarget

RESULTS = ("ExportedModel", "RemovalPlan", "SearchResult", "SensitivityTable")
"""What functions return; nobody makes them by hand."""

CLASSES = [
    name
    for name in lightning_compress.__all__
    if inspect.isclass(kind := getattr(lightning_compress, name))
    and not issubclass(kind, BaseException)
    and not inspect.isabstract(kind)
    and name not in RESULTS
]
NEEDED: Mapping[str, Any] = {
    "ScheduledPruning": {"sparsity": 0.5},
    "ChannelPruning": {"macs": 0.5},
    "AccuracyGuard": {"monitor": "val_acc", "max_drop": 0.1},
    "ExportModel": {"path": "model.onnx"},
    "PhaseCheckpoint": {"phase": "dense", "monitor": "val_acc", "mode": "max"},
    "RuntimeModule": {"path": "model.onnx"},
    "ValidationMetric": {"trainer": None, "datamodule": None, "monitor": "val_acc"},
    "Distillation": {"teacher": nn.Linear(2, 2)},
    "DistillationModule": {"student": nn.Linear(2, 2), "teacher": nn.Linear(2, 2), "losses": [SoftTarget()]},
}
CHECKED_LATER = ("Cosine", "Linear", "OneShot", "Snapshot", "Ramp")
"""Have no arguments; or, a `Ramp`, are checked with the losses that they move."""
WORDS = ["", "a", "*", "..x", ".x", "a.b", "int8_static", "inf", "\n", "\0"]
NUMBERS = [0, 1, -1, 0.5, -0.5, 1e308, 10**400, math.nan, math.inf]
NESTS = [[], [1], ["a"], [None], [[]], {}, {"a": 1}, {"a": "int8_dynamic"}, {"head": None}, {1: 2}]
WRONG = [None, True, False, *NUMBERS, *WORDS, *NESTS, b"a", nn.Linear(2, 2), nn.Linear, object()]
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


def attempt(name: str, arguments: Mapping[str, Any]) -> bool:
    """Make one, and tell whether it was refused in the package's grammar; a missing argument is Python's."""
    kind = getattr(lightning_compress, name)
    try:
        inspect.signature(kind).bind(**arguments)
    except TypeError:
        return False
    try:
        kind(**arguments)
    except CompressionError as error:
        assert re.search(r"must|needs", str(error)) and not str(error).strip().count("\n"), error
        return True
    return False


def parameters(name: str) -> list[str]:
    """The names of the arguments that are ours to check, not those of Lightning's class below."""
    kind = getattr(lightning_compress, name)
    theirs = inspect.signature(ModelCheckpoint).parameters if issubclass(kind, ModelCheckpoint) else {}
    known = inspect.signature(kind).parameters.values()
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [each.name for each in known if each.kind not in variadic and each.name not in {*theirs} - {"mode"}]


@pytest.mark.parametrize("name", CLASSES)
def test_an_argument_of_any_kind_is_taken_or_refused_in_one_line(name: str) -> None:
    required = {key: "a" for key in ("student_layer", "teacher_layer", "loss") if key in parameters(name)}
    needed = {**required, **NEEDED.get(name, {})}
    refused = [attempt(name, {**needed, key: value}) for key in parameters(name) for value in WRONG]
    assert any(refused) or name in CHECKED_LATER


@given(data=st.data())
@settings(max_examples=300)
def test_arguments_drawn_at_random_are_taken_or_refused(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(CLASSES))
    chosen = data.draw(st.lists(st.sampled_from(parameters(name) or ["none"]), max_size=4, unique=True))
    attempt(name, {**NEEDED.get(name, {}), **{key: data.draw(values) for key in chosen if key != "none"}})
