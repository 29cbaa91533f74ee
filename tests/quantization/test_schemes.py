from __future__ import annotations

from typing import Any

import pytest

from lightning_compress import (
    CompressionError,
    DynamicInt8,
    PostTrainingQuantization,
    QuantizationAwareTraining,
    StaticInt8,
)
from lightning_compress.quantization.numerics.int8 import needs_reduced_range
from lightning_compress.quantization.schemes import SCHEMES, describe, from_description, resolve


@pytest.mark.parametrize("name", SCHEMES)
def test_a_name_is_a_scheme_and_a_scheme_is_plain_data(name: str) -> None:
    scheme = resolve(name)
    assert scheme.name == name and scheme is SCHEMES[name]
    assert resolve(scheme) is scheme
    plain = describe(scheme)
    assert all(isinstance(value, (str, bool, int, float, type(None))) for value in plain.values())
    assert describe(from_description(plain)) == plain
    with pytest.raises(AttributeError):  # frozen
        scheme.bits = 3  # type: ignore[attr-defined]


def test_what_is_asked_of_this_cpu_is_written_down() -> None:
    # Weights that were trained for one CPU's range must not be read with another's.
    assert describe(DynamicInt8())["reduce_range"] == needs_reduced_range()
    assert describe(DynamicInt8(reduce_range=not needs_reduced_range()))["reduce_range"] == (not needs_reduced_range())
    assert describe(StaticInt8())["reduce_range"] is False  # whatever CPU this is: its codes go elsewhere


@pytest.mark.parametrize("make", [resolve, PostTrainingQuantization, QuantizationAwareTraining])
def test_a_mistyped_name_lists_the_nearest(make: Any) -> None:
    with pytest.raises(
        CompressionError,
        match=r"`scheme` must be the name of a scheme.*\. Received: scheme='int8_statik'\. Nearest: int8_static",
    ):
        make("int8_statik")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StaticInt8(engine="x68"), "`engine` must be one of .*Received: engine='x68'.*onednn"),
        (lambda: PostTrainingQuantization(calibration_batches=0), "`calibration_batches` must be at least 1"),
        (lambda: PostTrainingQuantization(flow="pt3e"), "`flow` must be"),  # type: ignore[arg-type]
        (lambda: QuantizationAwareTraining(flow="pt3e"), "`flow` must be"),  # type: ignore[arg-type]
        (lambda: QuantizationAwareTraining("int8_dynamic"), "`scheme` must be int8_static.*Use 'int8_static'"),
        (lambda: QuantizationAwareTraining(DynamicInt8()), "`scheme` must be int8_static"),
        (lambda: QuantizationAwareTraining(freeze_observers=0.0), r"`freeze_observers` must lie in \(0, 1\]"),
        (lambda: QuantizationAwareTraining(freeze_batchnorm=1.5), r"`freeze_batchnorm` must lie in \(0, 1\]"),
        (lambda: QuantizationAwareTraining(freeze_observers=float("nan")), "`freeze_observers` must"),
        (lambda: from_description({"class": "Int2"}), "'Int2' in a checkpoint"),
    ],
)
def test_errors(make: Any, message: str) -> None:
    with pytest.raises(CompressionError, match=message):
        make()


@pytest.mark.parametrize("scheme", [None, 8, StaticInt8])
def test_something_that_is_no_scheme_is_refused_clearly(scheme: Any) -> None:
    with pytest.raises(CompressionError, match="`scheme` must be"):
        resolve(scheme)
