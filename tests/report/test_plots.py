from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from lightning_compress.errors import CompressionError, MissingExtraError
from lightning_compress.report import compare, plots
from lightning_compress.report.plots import plot_report
from tests.report.test_compare import INT8, LARGE, METRICS, SMALL

PNG = b"\x89PNG"


@pytest.mark.parametrize("metric", [None, "train_loss"])
@pytest.mark.parametrize("metrics", [METRICS, {"large": {"train_loss": float("nan")}}], ids=["finite", "nan"])
def test_a_picture_is_written(tmp_path, metric, metrics) -> None:
    comparison = compare({"large": LARGE, "small": SMALL, "int8": INT8}, metrics=metrics)
    path = plot_report(comparison, tmp_path / "report.png", metric=metric)
    assert path.read_bytes()[:4] == PNG


def test_without_metrics_and_latency_a_picture_is_written(tmp_path) -> None:
    still = replace(LARGE, macs=None, latency=(), layers=())
    assert plot_report(compare({"one": still}), tmp_path / "one.png").read_bytes()[:4] == PNG


def test_layers_are_those_of_the_last_model_and_not_of_a_file(tmp_path, monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr(plots, "_draw_layers", lambda axes, bars, *names: drawn.append((names, bars)))
    plot_report(compare({"large": LARGE, "small": SMALL, "model.onnx": replace(SMALL, layers=())}), tmp_path / "a.png")
    plot_report(compare({"large": LARGE, "small": SMALL}), tmp_path / "b.png")
    assert drawn[0] == drawn[1] and drawn[0][0] == ("large", "small")


@pytest.mark.parametrize("arguments", [{"metric": "test_ac"}, {"layers_of": ("large", "smal")}])
def test_unknown_names_are_refused_before_writing(tmp_path, arguments) -> None:
    comparison = compare({"large": LARGE, "small": SMALL}, metrics=METRICS)
    with pytest.raises(CompressionError, match="Nearest: "):
        plot_report(comparison, tmp_path / "report.png", **arguments)
    assert not list(tmp_path.iterdir())


def test_a_missing_matplotlib_prints_the_command(tmp_path, monkeypatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"pip install \"lightning_compress\[plots\]\""):
        plot_report(compare({"large": LARGE}), tmp_path / "report.png")
    assert not list(tmp_path.iterdir())
