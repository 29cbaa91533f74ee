from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_compress.__main__ import main
from lightning_compress.errors import CompressionError
from lightning_compress.report import Comparison, compare
from lightning_compress.report.runs import compare_runs
from tests.report.pages import everything, times
from tests.report.test_compare import LARGE, SMALL
from tests.report.test_html import check


@pytest.fixture
def first() -> Comparison:
    after = replace(LARGE, size_bytes=3000, latency=(times(1, *[4.0] * 8),))
    metrics = {"before": {"test_acc": 0.97}, "after": {"test_acc": 0.95}}
    return compare({"before": LARGE, "after": after}, metrics=metrics, settings="trainer:\n  max_epochs: 3\n")


@pytest.fixture
def second(tmp_path: Path) -> Comparison:
    return everything(tmp_path)


def test_the_ends_of_two_runs_stand_side_by_side(first: Comparison, second: Comparison) -> None:
    compared = compare_runs(first, second, ("a", "b"))
    assert [row.name for row in compared.rows] == ["a", "b", "b: model.onnx"]
    assert compared.baseline == "a"
    assert compared["a"].measurement == first["after"].measurement
    assert compared["b"].measurement == second["after"].measurement
    assert compared["b"].size_ratio == 1.5
    assert compared["b"].metric_changes == {"test_acc": pytest.approx(0.0188)}
    assert "b: `net` was calibrated on 8 batches." in compared.notes
    assert "-  max_epochs: 3\n+  max_epochs: 7" in compared.settings
    assert compared.sensitivity == second.sensitivity
    found = check(compared.to_html())
    assert found.all("h1")[0].text.startswith(
        "Compared with a, b is 1.50 times smaller and 1.33 times faster at batch 1"
    )


def test_equal_settings_stand_there_as_they_are(second: Comparison) -> None:
    assert compare_runs(second, second, ("a", "b")).settings == second.settings


def test_other_machines_give_no_speed_up(first: Comparison, second: Comparison) -> None:
    other = replace(first, machine={**first.machine, "cpu": "another"})
    compared = compare_runs(other, second, ("a", "b"))
    assert compared["b"].speedup == compared["b"].speedup_range == {}
    assert compared.notes[0] == "The runs were measured with another cpu: no speed-up is given."
    check(compared.to_html())


def test_a_run_of_one_row_ends_with_it() -> None:
    alone = compare({"before": LARGE})
    assert [row.name for row in compare_runs(alone, compare({"x": SMALL}), ("a", "b")).rows] == ["a", "b"]


def test_runs_need_two_names(first: Comparison) -> None:
    with pytest.raises(CompressionError, match="`names` must be two different ones"):
        compare_runs(first, first, ("a", "a"))


@pytest.fixture
def written(tmp_path: Path, first: Comparison, second: Comparison) -> Path:
    for name, comparison in (("a", first), ("b", second)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(comparison.to_json())
    return tmp_path


def test_the_command_draws_one_run_again(written: Path, second: Comparison, capsys: pytest.CaptureFixture[str]) -> None:
    output = written / "new" / "again.html"
    main(["report", str(written / "b" / "report.json"), f"--output={output}"])
    assert output.read_text() == second.to_html()
    assert capsys.readouterr().out == f"Report: {output}\n"


@pytest.mark.parametrize("ending", ["html", "md", "csv"])
def test_the_command_compares_two_runs_named_by_their_folders(written: Path, ending: str) -> None:
    output = written / f"difference.{ending}"
    main(["report", *(str(written / name / "report.json") for name in "ab"), "--output", str(output)])
    assert "b: model.onnx" in output.read_text()


WRONG = {
    "`output` must end in .html, .md, .csv": ["a/report.json", "--output=x.pdf"],
    "`runs` must be files that can be read": ["nowhere.json"],
    "`text` must be the JSON of a report": ["broken.json"],
    "`runs` must be one report.json or two": ["a/report.json"] * 3,
    "`runs` must be reports as CompressionReport wrote them": ["damaged.json"],
}


@pytest.mark.parametrize("message", WRONG)
def test_the_command_says_in_a_line_what_is_wrong(
    written: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], message: str
) -> None:
    monkeypatch.chdir(written)
    (written / "broken.json").write_text("{")
    damaged = json.loads((written / "a" / "report.json").read_text())
    damaged["rows"][0]["measurement"]["parameters"] = "many"
    (written / "damaged.json").write_text(json.dumps(damaged))
    before = sorted(written.rglob("*"))
    with pytest.raises(SystemExit) as raised:
        main(["report", *WRONG[message]])
    assert raised.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"lightning-compress report: error: {message}") and said.count("\n") == 1
    assert sorted(written.rglob("*")) == before
