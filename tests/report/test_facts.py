from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_compress import CompressionReport, ExportModel, QuantizationAwareTraining, quantize, sensitivity
from lightning_compress.errors import CompressionError
from lightning_compress.report import measure
from lightning_compress.report.facts import FileFacts, Sensitivity
from lightning_compress.report.figures import figures_of
from tests.report.pages import Page
from tests.support.data import TinyData
from tests.support.modules import Classifier, quiet_trainer


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def test_a_float_model_has_no_facts_of_quantization() -> None:
    assert measure(net()).quantized is None


def test_errors_of_static_int8_are_those_of_rounding() -> None:
    """A value that is rounded to a grid is off by its step / sqrt(12) on average."""
    model, x = net(), torch.randn(64, 8)
    facts = measure(quantize(model, calibration=[x])).quantized
    assert facts is not None and facts.floats == {}
    assert set(facts.errors) == {"0", "2"}
    weight = model[0].weight.detach()
    steps = ((x.max() - x.min()) / 255, x), (weight.abs().amax(1, keepdim=True) / 127, weight)
    expected = sum(float((step**2).mean() / 12 / value.square().mean()) for step, value in steps) ** 0.5
    assert facts.errors["0"] == pytest.approx(expected, rel=0.5)
    assert facts.cosine is not None and facts.cosine > 0.999 and facts.batches == 1


def test_what_stays_float_has_its_reason() -> None:
    facts = measure(quantize(net(), "int4_weight_only", calibration=[torch.randn(4, 8)])).quantized
    assert facts is not None
    assert facts.floats == {"2": "last layer, which is left out unless it is named"} and facts.errors == {}


def test_facts_of_a_file_are_those_beside_it(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from lightning_compress import export

    x = torch.randn(8, 8)
    exported = export(quantize(net(), calibration=[x]), x, tmp_path / "model.onnx")
    facts = FileFacts.of(json.loads((tmp_path / "model.onnx.json").read_text()))
    assert facts == FileFacts.of(exported.facts)
    assert facts is not None and facts.int8 == ("0", "2")
    assert facts.parity is not None and facts.parity["batch_sizes"] == [1, 8, 17]
    assert [timed.batch_size for timed in facts.latency] == [1, 8]
    assert FileFacts.of({}) is None


@pytest.mark.filterwarnings("ignore:::lightning")
def test_a_report_of_a_trainer_has_the_facts_of_int8_and_of_the_file(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    path, quick = table(tmp_path), {"batch_sizes": [1, 2], "max_seconds": 0.01, "picture": False}
    callbacks = [
        QuantizationAwareTraining(),
        ExportModel(str(tmp_path / "model.onnx")),
        CompressionReport(str(tmp_path), sensitivity=str(path), **quick),
    ]
    path.unlink()  # what it holds was read
    module, data = Classifier(), TinyData()
    run = quiet_trainer(max_epochs=1, callbacks=callbacks)
    run.fit(module, data)
    run.test(module, data, verbose=False)
    plain = json.loads((tmp_path / "report.json").read_text())
    assert plain["sensitivity"]["of"] == "weights"
    rows = {row["name"]: row["measurement"] for row in plain["rows"]}
    assert rows["before"]["quantized"] is rows["before"]["file"] is rows["model.onnx"]["quantized"] is None
    layers = {layer["name"] for layer in rows["after"]["layers"] if layer["dtype"] == "int8"}
    assert set(rows["after"]["quantized"]["errors"]) == layers != set()
    file = rows["model.onnx"]["file"]
    assert (file["runtime"], set(file["int8"])) == ("onnxruntime", layers)
    page = Page((tmp_path / "report.html").read_text())
    assert "Exported files" in [one.text for one in page.all("h2")]
    assert "lightning_compress.ExportModel" in page.text


def table(folder: Path) -> Path:
    batches = [torch.randn(8, 8) for _ in range(2)]
    found = sensitivity(net(), lambda model: float(model(batches[0]).abs().mean()), batches, "weights")
    return found.save(folder / "table.json")


def test_a_table_of_sensitivity_is_read(tmp_path: Path) -> None:
    path = table(tmp_path)
    rows = json.loads(path.read_text())["rows"]
    found = Sensitivity.load(path)
    assert len(found.layers) == len(rows)
    worst = found.worst()
    measured = [row for row in rows if row["layer"] == "0" and row["drop"] is not None]
    assert worst["0"].drop == max(row["drop"] for row in measured)


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"of": "int8", "metric": 1, "rows": [{}]}'])
def test_what_is_no_table_is_refused_by_the_constructor(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "table.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(CompressionError, match="`sensitivity` must be a table of sensitivities as JSON"):
        CompressionReport(sensitivity=str(path))


def test_figures_have_the_agreement() -> None:
    from lightning_compress.report import compare

    x = torch.randn(8, 8)
    row = compare({"int8": measure(quantize(net(), calibration=[x]), x, max_seconds=0.01)})["int8"]
    assert 0.99 < figures_of(row)["agreement/cosine"] <= 1.0001
