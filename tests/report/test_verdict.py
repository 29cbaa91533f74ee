from __future__ import annotations

import math
from dataclasses import replace

import pytest

from lightning_compress.report import Comparison, Measurement, compare
from lightning_compress.report.facts import FileFacts
from lightning_compress.report.verdict import judged, verdict
from tests.report.pages import times
from tests.report.test_compare import LARGE, SMALL

BASE = replace(LARGE, latency=(times(1, *[2.0] * 8), times(32, *[10.0] * 8)))
SMALLER = replace(BASE, size_bytes=2000)


def timed(measurement: Measurement, first: float, second: float) -> Measurement:
    return replace(measurement, latency=(times(1, *[first] * 8), times(32, *[second] * 8)))


def said(after: Measurement, metrics: dict[str, float] | None = None, **options: dict) -> str:
    found = {"before": {"test_acc": 0.97}, "after": metrics or {}}
    comparison = compare({"before": BASE, "after": after}, metrics=found, **options)
    return verdict(comparison.rows, comparison.baseline)


UNKNOWN = "what it costs was not measured"


@pytest.mark.parametrize(
    ("after", "sentence"),
    [
        (
            timed(SMALLER, 1.0, 4.0),
            f"The compressed model is 4.0 times smaller, 2.0 times faster at batch 1 and 2.5 times faster at batch 32; "
            f"{UNKNOWN}.",
        ),
        (
            timed(SMALLER, 1.0, 5.0),
            f"The compressed model is 4.0 times smaller and 2.0 times faster at batch 1 and 32; {UNKNOWN}.",
        ),
        (
            timed(SMALLER, 3.0, 4.0),
            "The compressed model is 4.0 times smaller and 2.5 times faster at batch 32, but 1.50 times slower at "
            f"batch 1; {UNKNOWN}.",
        ),
        (
            SMALLER,
            f"The compressed model is 4.0 times smaller, but not measurably faster at batch 1 and 32; {UNKNOWN}.",
        ),
        (
            timed(BASE, 1.0, 5.0),
            f"The compressed model is 2.0 times faster at batch 1 and 32, but no smaller on disk; {UNKNOWN}.",
        ),
        (
            BASE,
            "Compression brought nothing: the model is no smaller on disk and not measurably faster at batch 1 and 32; "
            f"{UNKNOWN}.",
        ),
        (
            timed(replace(BASE, size_bytes=16_000), 4.0, 20.0),
            "Compression brought nothing: the model is 2.0 times larger and 2.0 times slower at batch 1 and 32; "
            f"{UNKNOWN}.",
        ),
        (
            replace(SMALLER, latency=()),
            "The compressed model is 4.0 times smaller; speed and metrics were not compared.",
        ),
    ],
    ids=["faster", "equally faster", "mixed", "smaller only", "faster only", "nothing", "worse", "unknown"],
)
def test_what_it_brought(after: Measurement, sentence: str) -> None:
    assert said(after) == sentence


def test_three_batch_sizes_are_a_range() -> None:
    sizes = (1, 8, 32)
    base, after = (
        replace(BASE, latency=tuple(times(size, *[at] * 8) for size, at in zip(sizes, found, strict=True)))
        for found in ((2.0, 3.0, 10.0), (1.0, 1.0, 4.0))
    )
    rows = compare({"before": base, "after": after}).rows
    assert "2.0 to 3.0 times faster at batch 1, 8 and 32" in verdict(rows, "before")


@pytest.mark.parametrize(
    ("value", "cost"),
    [
        (0.96, "test_acc falls from 0.97 to 0.96"),
        (0.98, "test_acc rises from 0.97 to 0.98"),
        (0.97000001, "test_acc stays at 0.97"),
        (math.nan, "test_acc is nan, and was 0.97"),
    ],
)
def test_what_it_cost(value: float, cost: str) -> None:
    assert said(SMALLER, {"test_acc": value}).endswith(f"; {cost}.")


def test_a_metric_of_an_untrained_model_is_no_cost() -> None:
    origins = {"before": {"test_acc": "test before fit, untrained"}}
    sentence = said(SMALLER, {"test_acc": 0.96}, origins=origins)
    assert sentence.endswith("; test_acc is 0.96, and was not measured before compression on trained weights.")


def test_a_metric_of_another_form_is_said_to_be_one() -> None:
    origins = {"after": {"test_acc": "last validation of fit, prepared and not yet converted"}}
    assert said(SMALLER, {"test_acc": 0.96}, origins=origins).endswith(
        "to 0.96, measured before the model was converted."
    )


def test_rows_of_a_user_have_their_names() -> None:
    rows = compare({"teacher": BASE, "student": timed(SMALL, 0.5, 2.0)}).rows
    assert verdict(rows, "teacher").startswith(
        "Compared with teacher, student is 8.0 times smaller, 4.0 times faster at"
    )
    rows = compare({"teacher": BASE, "twin": BASE}).rows
    assert verdict(rows, "teacher").startswith("Compared with teacher, twin brought nothing: it is no smaller on disk")


def file_of(comparison: Measurement) -> Measurement:
    facts = FileFacts("onnxruntime", "onnxruntime", {}, (), {}, (), None, ())
    return replace(comparison, layers=(), file=facts)


def test_the_last_model_is_judged_and_else_the_last_file() -> None:
    def of(**rows: Measurement) -> Comparison:
        return compare(rows)

    models = of(before=BASE, after=SMALLER, tested=SMALL, model=file_of(SMALL))
    row = judged(models.rows, "before")
    assert row is not None and row.name == "tested"
    files = of(before=BASE, model=file_of(SMALL))
    row = judged(files.rows, "before")
    assert row is not None and row.name == "model"
    alone = of(before=BASE)
    assert verdict(alone.rows, "before") == "Only before was measured: there is nothing to compare it with."
