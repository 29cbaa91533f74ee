from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from lightning_compress.errors import CompressionError, MissingExtraError
from lightning_compress.report import compare, plots
from lightning_compress.report.plots import _bars, _saved, plot_report
from lightning_compress.report.storage import LayerMeasurement
from tests.report.test_compare import INT8, LARGE, METRICS, SMALL

PNG = b"\x89PNG"


def layers(count: int, size_bytes: int = 400) -> tuple[LayerMeasurement, ...]:
    names = [f"backbone.stage.with.a.very.long.name.block{index}.convolution" for index in range(count)]
    return tuple(
        LayerMeasurement(name, "Conv2d", 100, 50, size_bytes + index, "float32") for index, name in enumerate(names)
    )


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


def test_many_layers_are_summed_up_as_others() -> None:
    before, after = layers(30), layers(30, 100)
    bars = _bars(before, after)
    assert len(bars) == 18
    assert bars[-1][0] == "13 others"
    assert sum(size for _, size, _ in bars) == sum(layer.size_bytes for layer in before)
    assert sum(layer.size_bytes for _, _, layer in bars) == sum(layer.size_bytes for layer in after)
    assert [name[-12:] for name, _, _ in bars[:2]] == [".convolution"] * 2
    assert all(len(name) <= 30 for name, _, _ in bars)


def test_small_layers_that_vanish_are_one_bar_that_is_gone(tmp_path) -> None:
    # As an int8 network of convolutions and BatchNorms that were folded into them.
    norms = tuple(replace(one, name=f"norm{index}", size_bytes=80) for index, one in enumerate(layers(10)))
    before, after = (*layers(10), *norms), layers(10, 100)
    assert (_bars(before, after)[-1][0], _saved(*_bars(before, after)[-1][1:])) == ("3 others", "gone")
    rows = {"float": replace(LARGE, layers=before), "int8": replace(INT8, layers=after)}
    assert plot_report(compare(rows), tmp_path / "report.png").read_bytes()[:4] == PNG


def test_removed_and_new_layers_are_kept() -> None:
    old, new = layers(2), layers(3)[1:]
    assert [(size, layer and layer.size_bytes) for _, size, layer in _bars(old, new)] == [
        (400, None),
        (401, 401),
        (0, 402),
    ]


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
    with pytest.raises(MissingExtraError, match=r"pip install \"lightning-compress\[plots\]\""):
        plot_report(compare({"large": LARGE}), tmp_path / "report.png")
    assert not list(tmp_path.iterdir())
