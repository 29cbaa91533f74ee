"""The page on the report: its blocks run, and it names every part of the page and every entry of the JSON."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_compress.__main__ import main
from lightning_compress.cli import main as cli
from lightning_compress.report.compare import VERSION
from tests.report.pages import everything
from tests.report.test_html import PARTS
from tests.support.data import TinyData
from tests.support.modules import Classifier
from tests.test_examples import ROOT, blocks

PAGE = ROOT / "docs/report.md"
pytestmark = pytest.mark.filterwarnings("ignore:::lightning")


def execute(source: str, **names: Any) -> dict[str, Any]:
    exec(compile(source, "docs/report.md", "exec"), names)
    return names


def test_python_blocks_run(own_folder: Path) -> None:
    fit, functions, table = blocks("python", "docs/report.md")
    comparison = execute(fit, model=Classifier(), data=TinyData())["report"].comparison
    assert {"before", "after"} == {row.name for row in comparison.rows}
    assert "<!DOCTYPE html>" in (own_folder / "reports/report.html").read_text()
    large, small = nn.Linear(64, 64), nn.Linear(64, 8)
    execute(functions, large=large, small=small, images=torch.randn(4, 64))
    assert "Compared with large, small is" in (own_folder / "report.html").read_text()
    batches = [torch.randn(8, 16) for _ in range(2)]
    names = execute(table, model=Classifier(), evaluate=lambda model: float(model(batches[0]).mean()), batches=batches)
    assert names["report"].sensitivity == "sensitivity.json"


def test_yaml_runs(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [block] = blocks("yaml", "docs/report.md")
    (own_folder / "config.yaml").write_text(block)
    monkeypatch.setattr(sys, "path", [str(own_folder), *sys.path])
    module = ["--model=tests.support.modules.Classifier", "--data=tests.support.data.TinyData"]
    cli(["fit", "--config=config.yaml", *module, "--trainer.max_epochs=1"])
    settings = json.loads((own_folder / "reports/report.json").read_text())["settings"]
    assert "validate_before: true" in settings and "lightning_compress.QuantizationAwareTraining" in settings


def test_the_command_runs(own_folder: Path) -> None:
    _, command = blocks("bash", "docs/report.md")  # test_site.py reads the other one
    for name in ("first", "second"):
        (own_folder / name).mkdir()
        (own_folder / name / "report.json").write_text(everything(own_folder).to_json())
    program, *arguments = shlex.split(command)
    assert program == "lightning-compress"
    main(arguments)
    assert "Compared with first, second brought nothing" in (own_folder / "difference.html").read_text()


def test_every_part_and_every_entry_is_named(tmp_path: Path) -> None:
    text = PAGE.read_text()
    assert [part for part in PARTS if f"| {part} |" not in text] == []
    assert f"`version` is {VERSION}." in text
    plain = json.loads(everything(tmp_path).to_json())
    row = plain["rows"][1]
    file = plain["rows"][2]["measurement"]["file"]
    measurement = row["measurement"]
    nested = (plain, plain["sensitivity"], plain["sensitivity"]["layers"][0], plain["machine"], row, measurement)
    nested += (measurement["latency"][0], measurement["layers"][0], measurement["quantized"], file, file["parity"])
    nested += (file["latency"][0],)
    entries = {name for found in nested for name in found}
    assert sorted(entries - set(re.findall(r"`(\w+)`", text))) == []
    links = re.findall(r"\]\((?!http)([^)#]+)", text)
    assert links and [link for link in links if not (ROOT / "docs" / link).exists()] == []
