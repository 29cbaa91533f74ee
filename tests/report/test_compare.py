from __future__ import annotations

import io
import json
import math
from dataclasses import replace

import pytest
from rich.console import Console
from torch import nn

from lightning_compress.errors import CompressionError
from lightning_compress.report import Comparison, Measurement, compare, measure
from lightning_compress.report.compare import VERSION
from lightning_compress.report.latency import Latency
from lightning_compress.report.render import shown_metrics
from lightning_compress.report.storage import LayerMeasurement


def latency(median_ms: float, batch_size: int = 1, spread: float = 0.1) -> Latency:
    return Latency(batch_size, median_ms, median_ms * (1 - spread), median_ms * (1 + spread), 100)


LARGE = Measurement(
    parameters=1000,
    nonzeros=1000,
    size_bytes=8000,
    compressed_bytes=7200,
    macs=50_000,
    uncounted=(),
    latency=(latency(2.0), latency(10.0, 32)),
    layers=(LayerMeasurement("net.conv", "Conv2d", 1000, 1000, 4000, "float32"),),
    device="cpu",
    threads=1,
)
SMALL = replace(
    LARGE, parameters=100, nonzeros=100, size_bytes=1000, macs=5000, latency=(latency(0.5), latency(2.0, 32))
)
MASKED = replace(LARGE, nonzeros=100, compressed_bytes=1200)
INT8 = replace(LARGE, size_bytes=2000, layers=(replace(LARGE.layers[0], dtype="qint8"),), latency=(latency(1.0),))
METRICS = {"large": {"test_acc": 0.99, "train_loss": 0.1}, "small": {"test_acc": 0.98}}


def test_ratios_are_baseline_over_row() -> None:
    comparison = compare({"large": LARGE, "small": SMALL}, metrics=METRICS)
    row = comparison["small"]
    assert (row.parameters_ratio, row.size_ratio, row.macs_ratio) == (10, 8, 10)
    assert row.speedup == {1: 4, 32: 5}
    assert row.metric_changes == {"test_acc": pytest.approx(-0.01)}
    assert comparison.notes == ()


def test_any_row_can_be_the_baseline() -> None:
    comparison = compare({"large": LARGE, "small": SMALL}, baseline="small")
    assert comparison["large"].size_ratio == 1 / 8
    assert comparison.notes == (
        "large: larger on disk than small.",
        "large: slower than small at batch 1 and 32.",
    )


def test_zeros_that_bring_nothing_are_said_to_bring_nothing() -> None:
    size, speed = compare({"before": LARGE, "after": MASKED}).notes
    assert "no smaller on disk than before: 90.0% of its parameters are zero" in size
    assert "a compressed file is 6.0x smaller" in size
    assert speed == (
        "after: no measurable difference in speed to before at batch 1 and 32: "
        "zeros in dense kernels are multiplied like any other number."
    )


def test_a_difference_within_the_spread_is_no_speed_up() -> None:
    slightly = replace(SMALL, latency=(latency(1.9), latency(2.0, 32)))
    comparison = compare({"large": LARGE, "small": slightly})
    assert comparison.notes == ("small: no measurable difference in speed to large at batch 1.",)
    assert "(no measurable difference)" in comparison.to_markdown()


def turns(median_ms: float, *rounds_ms: float, key: str = "a") -> Latency:
    return Latency(1, median_ms, min(rounds_ms), max(rounds_ms), 100, rounds_ms, key)


def test_speed_is_the_median_ratio_of_rounds_that_both_took_part_in() -> None:
    # A busy second slows both in half of the rounds; that lifts one row's median twentyfold and no ratio.
    base = replace(LARGE, latency=(turns(21.0, 2.0, 2.1, 2.0, 40.0, 42.0, 41.0, 2.0, 40.0),))
    fast = replace(SMALL, latency=(turns(1.0, 1.0, 1.0, 1.0, 20.0, 20.0, 20.0, 1.0, 20.0),))
    row = compare({"large": base, "small": fast})["small"]
    assert row.speedup == {1: pytest.approx(2.0, abs=0.06)}
    assert row.speedup_range[1] == (pytest.approx(2.0), pytest.approx(2.06, abs=0.05))
    assert "(2.0x faster, 2.0 to 2.1)" in compare({"large": base, "small": fast}).to_markdown()
    # Unpaired, the same times are told apart by nothing but their medians.
    apart = replace(fast, latency=(replace(fast.latency[0], turns="b"),))
    assert compare({"large": base, "small": apart})["small"].speedup == {1: 21.0}
    assert "Rows were timed one after the other." in compare({"large": base, "small": apart}).to_markdown()


def test_ratios_that_scatter_about_one_are_no_difference() -> None:
    base = replace(LARGE, latency=(turns(2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0),))
    same = replace(INT8, latency=(turns(1.9, 1.5, 1.6, 1.8, 1.9, 2.1, 2.1, 2.2, 2.2),))
    comparison = compare({"large": base, "small": same})
    assert comparison.notes == ("small: no measurable difference in speed to large at batch 1.",)
    assert "(no measurable difference)" in comparison.to_markdown()
    slow = replace(INT8, latency=(turns(4.0, 3.9, 4.0, 4.1, 4.0, 1.0, 4.0, 4.0, 4.0),))
    assert "(2.0x slower, 1.99 to 2.0)" in compare({"large": base, "small": slow}).to_markdown()


def test_what_waited_widens_the_range_and_is_said() -> None:
    # On a machine that is three quarters busy calls of 8 ms wait, those of 1 ms don't: 32 ms against 1 ms, but 8 times.
    base = replace(LARGE, latency=(replace(turns(32.0, *[32.0] * 8), waited=0.75),))
    fast = replace(SMALL, latency=(turns(1.0, *[1.0] * 8),))
    comparison = compare({"large": base, "small": fast})
    assert comparison["small"].speedup_range == {1: (pytest.approx(8.0), 32.0)}
    assert comparison.notes[0].startswith("Calls waited for a part of their time (large 75%): the machine was busy")


def test_same_arithmetic_is_not_claimed_of_a_model_that_was_not_counted() -> None:
    still = replace(LARGE, macs=None)
    assert compare({"a": still, "b": still}).notes[1] == "b: no measurable difference in speed to a at batch 1 and 32."


def test_a_larger_compressed_file_is_not_called_smaller() -> None:
    [size, _] = compare({"before": LARGE, "after": replace(MASKED, compressed_bytes=9000)}).notes
    assert "compressed file" not in size


def test_metrics_that_compare_rows_are_shown() -> None:
    def shown(*rows: dict[str, float]) -> list[str]:
        names = "abc"[: len(rows)]
        return shown_metrics(compare(dict.fromkeys(names, LARGE), metrics=dict(zip(names, rows, strict=True))).rows)

    both = {"test_acc": 0.9, "val_acc": 0.8, "train_loss": 0.1}
    assert shown({"train_loss": 0.1}) == ["train_loss"]
    assert shown(both) == shown({}, both) == shown(both, both) == ["test_acc"]
    assert shown({"val_acc": 0.7}, both) == shown({"val_acc": 0.7}, {"test_acc": 0.9}) == ["test_acc", "val_acc"]


def test_origins_are_said_of_the_metrics_that_are_shown() -> None:
    origins = {"large": {"test_acc": "test before fit", "train_loss": "fit"}, "small": {"test_acc": "test"}}
    comparison = compare({"large": LARGE, "small": SMALL}, metrics=METRICS, origins=origins)
    line = "Metrics of large: test before fit (test_acc); small: test (test_acc)."
    assert line in comparison.to_markdown()
    assert Comparison.from_json(comparison.to_json()) == comparison
    with pytest.raises(CompressionError, match=r"`origins` must"):
        compare({"large": LARGE}, origins={"larg": {}})


def test_other_arithmetic_is_not_blamed_on_zeros() -> None:
    slow = replace(INT8, latency=(latency(3.0),), nonzeros=100)
    assert compare({"float": LARGE, "int8": slow}).notes == ("int8: slower than float at batch 1.",)


def test_two_devices_have_no_speed_up() -> None:
    comparison = compare({"large": replace(LARGE, device="cuda"), "small": SMALL})
    assert comparison["small"].speedup == {}
    assert comparison.notes == ("small: measured on cpu, large on cuda: no speed-up is given.",)


def test_a_busy_machine_is_named() -> None:
    comparison = compare({"large": replace(LARGE, latency=(latency(2.0, spread=0.4),))})
    assert "latency at batch 1 varied by more than 50%" in comparison.notes[0]


def test_a_lower_bound_has_no_ratio() -> None:
    comparison = compare({"large": LARGE, "small": replace(SMALL, uncounted=("aten._trilinear",))})
    assert comparison["small"].macs_ratio is None
    assert "≥ 5.00" in comparison.to_markdown()
    assert comparison.notes == ("small: the MACs are a lower bound, not counted: aten._trilinear.",)


def test_json_comes_back_equal() -> None:
    comparison = compare({"large": LARGE, "small": SMALL, "int8": INT8}, metrics=METRICS, notes=["a note"])
    assert Comparison.from_json(comparison.to_json()) == comparison
    machine = json.loads(comparison.to_json())["machine"]
    assert set(machine) == {
        "cpu",
        "cores",
        "threads",
        "quantized_engine",
        "gpu",
        "system",
        "python",
        "torch",
        "packages",
    }


def test_a_metric_that_is_not_finite_is_still_json() -> None:
    comparison = compare({"large": LARGE}, metrics={"large": {"test_acc": math.inf}})
    assert json.loads(comparison.to_json())["rows"][0]["metrics"] == {"test_acc": None}
    assert math.isnan(Comparison.from_json(comparison.to_json())["large"].metrics["test_acc"])


@pytest.mark.parametrize(
    ("version", "remedy"), [(VERSION + 1, "Update lightning_compress."), (VERSION - 1, "measure again.")]
)
def test_another_version_is_refused_with_the_remedy(version: int, remedy: str) -> None:
    plain = {**json.loads(compare({"large": LARGE}).to_json()), "version": version}
    with pytest.raises(CompressionError, match=f"be a report of version {VERSION}. Received: text={version}.*{remedy}"):
        Comparison.from_json(json.dumps(plain))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 99}', '{"version": 1, "rows": [{}]}'])
def test_text_that_is_no_report_is_refused(text: str) -> None:
    with pytest.raises(CompressionError, match="`text` must be"):
        Comparison.from_json(text)


def test_markdown_has_units_ratios_and_a_row_each() -> None:
    lines = (
        compare({"large": LARGE, "a|b": SMALL, "int8": INT8}, metrics={"large": {"acc": 1.0}})
        .to_markdown()
        .splitlines()
    )
    header, rule, *rows = [line for line in lines if line.startswith("|")]
    assert (
        header
        == "| Model | Params | Zeros (%) | Size (KB) | MACs per sample (K) | Batch 1 (ms) | Batch 32 (ms) | acc |"
    )
    assert header.count("|") == rule.count("|") == rows[0].count("|") == rows[2].count("|")
    assert rows[0] == "| large | 1,000 | 0 | 8.00 | 50.0 | 2.00 ± 0.200 | 10.0 ± 1.00 | 1 |"
    assert rows[1].startswith(
        "| a\\|b | 100 (10.0x less) | 0 | 1.00 (8.0x less) | 5.00 (10.0x less) "
        "| 0.500 ± 0.050 (4.0x faster, 3.3 to 4.9) |"
    )
    assert rows[2].endswith("| 1.00 ± 0.100 (2.0x faster, 1.64 to 2.4) | - | - |")


def test_table_shows_every_row_and_the_test_metrics() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(compare({"large": LARGE, "small [x]": SMALL}, metrics={"large": METRICS["large"]}).to_table())
    text = console.export_text()
    for shown in ("large", "small [x]", "÷ 8.0", "× 4.0", "test_", "0.99"):
        assert shown in text
    assert "train" not in text


def test_models_that_were_not_run_have_no_empty_columns() -> None:
    text = compare({"one": measure(nn.Linear(2, 2)), "two": measure(nn.Linear(2, 2))}).to_markdown()
    assert "MACs per" not in text.partition("Compared")[0] and "Batch" not in text


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"measurements": {}}, "measurements"),
        ({"measurements": {"large": LARGE}, "baseline": "larg"}, "baseline"),
        ({"measurements": {"large": LARGE}, "metrics": {"larg": {}}}, "metrics"),
    ],
)
def test_names_that_are_no_rows_are_refused(arguments: dict, name: str) -> None:
    with pytest.raises(CompressionError, match=rf"`{name}` must"):
        compare(**arguments)


def test_an_unknown_row_names_the_nearest() -> None:
    with pytest.raises(CompressionError, match=r"Nearest: large\."):
        compare({"large": LARGE})["larg"]
