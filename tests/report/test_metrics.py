from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_compress.report import compare
from lightning_compress.report.metrics import chosen_metric, more_is_better, on_front
from tests.report.test_compare import LARGE, SMALL

POINTS = st.lists(st.tuples(st.integers(0, 5).map(float), st.integers(0, 5).map(float)), max_size=8)


@given(points=POINTS, more=st.booleans())
def test_the_front_is_that_of_the_definition(points: list[tuple[float, float]], more: bool) -> None:
    def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
        better, as_good = (one[1] > other[1], one[1] >= other[1]) if more else (one[1] < other[1], one[1] <= other[1])
        return one[0] <= other[0] and as_good and (one[0] < other[0] or better)

    assert on_front(points, more) == [not any(beats(one, point) for one in points) for point in points]


@pytest.mark.parametrize("name", ["val_acc", "test/MulticlassAccuracy", "acc1", "mAP", "f1", "test_iou", "psnr"])
def test_more_of_these_is_better(name: str) -> None:
    assert more_is_better(name) is True


@pytest.mark.parametrize("name", ["val_loss", "test_mse", "WER", "accuracy_error", "perplexity", "rmse"])
def test_less_of_these_is_better(name: str) -> None:
    assert more_is_better(name) is False


@pytest.mark.parametrize("name", ["layer2", "vaccine", "sparsity", "remaining_macs", "", "score"])
def test_of_these_the_name_says_nothing(name: str) -> None:
    assert more_is_better(name) is None


def test_the_metric_of_most_rows_speaks() -> None:
    metrics = {"large": {"test_acc": 0.9, "test_f": 1.0}, "small": {"test_f": 0.5}}
    assert chosen_metric(compare({"large": LARGE, "small": SMALL}, metrics=metrics).rows) == "test_f"
    metrics["small"]["test_acc"] = 0.8
    assert chosen_metric(compare({"large": LARGE, "small": SMALL}, metrics=metrics).rows) == "test_acc"
    assert chosen_metric(compare({"large": LARGE}, metrics={"large": {"a": float("nan")}}).rows) is None
