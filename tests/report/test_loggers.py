from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, Logger

from lightning_compress.report import compare
from lightning_compress.report.figures import csv_text, figures_of
from lightning_compress.report.loggers import log_report
from tests.report.models import Classifier
from tests.report.test_callback import report, trainer
from tests.report.test_compare import LARGE, METRICS, SMALL
from tests.report.test_failures import fit

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")
ROWS = compare({"large": LARGE, "small": SMALL}, metrics=METRICS).rows


class Recorder:
    """Takes metrics; and pictures as W&B's logger or TensorBoard's experiment do."""

    def __init__(self, pictures: str) -> None:
        self.metrics: dict[str, float] = {}
        self.pictures: dict[str, Any] = {}
        self.experiment = self if pictures == "experiment" else None
        if pictures == "experiment":
            self.add_image = lambda name, pixels, step, dataformats: self.pictures.update({name: (pixels, dataformats)})
        elif pictures == "logger":
            self.log_image = lambda name, images, step: self.pictures.update({name: images})

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.metrics |= metrics


def test_figures_have_names_with_units() -> None:
    assert figures_of(ROWS[1]) == {
        "parameters": 100,
        "nonzeros": 100,
        "sparsity": 0.0,
        "size_bytes": 1000,
        "compressed_bytes": 7200,
        "macs": 5000,
        "parameters_ratio": 10.0,
        "size_ratio": 8.0,
        "macs_ratio": 10.0,
        "latency_ms/batch_1": 0.5,
        "speedup/batch_1": 4.0,
        "latency_ms/batch_32": 2.0,
        "speedup/batch_32": 5.0,
        "metric/test_acc": 0.98,
    }


def test_csv_has_a_line_for_each_row_and_is_empty_where_nothing_was_measured() -> None:
    lines = list(csv.DictReader(csv_text(ROWS).splitlines()))
    assert [line["model"] for line in lines] == ["large", "small"]
    assert (lines[0]["metric/train_loss"], lines[1]["metric/train_loss"]) == ("0.1", "")
    assert float(lines[1]["latency_ms/batch_32"]) == 2.0


@pytest.mark.parametrize("pictures", ["logger", "experiment", ""])
def test_each_logger_gets_what_it_takes(tmp_path: Path, pictures: str) -> None:
    import matplotlib.image

    path = tmp_path / "report.png"
    matplotlib.image.imsave(path, np.full((4, 6, 3), 128, dtype="uint8"))
    recorder = Recorder(pictures)
    log_report([recorder], ROWS, [path], 7)
    assert recorder.metrics["compression/small/size_ratio"] == 8.0
    assert len(recorder.metrics) == sum(len(figures_of(row)) for row in ROWS)
    if pictures == "logger":
        assert recorder.pictures == {"compression/report": [str(path)]}
    elif pictures == "experiment":
        pixels, layout = recorder.pictures["compression/report"]
        assert (pixels.shape, pixels.dtype, layout) == ((4, 6, 4), np.uint8, "HWC")
        assert (pixels[..., :3] == 128).all() and (pixels[..., 3] == 255).all()


def test_a_fit_writes_the_figures_to_its_csv(tmp_path: Path) -> None:
    callback, logger = report(), CSVLogger(tmp_path)
    trainer(tmp_path, callback, logger=logger).fit(Classifier())
    lines = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").read_text().splitlines()))
    assert callback.comparison is not None
    size = callback.comparison["after"].measurement.size_bytes
    assert [line["compression/after/size_bytes"] for line in lines if line["compression/after/size_bytes"]] == [
        str(size)
    ]


def test_a_logger_that_fails_ends_no_run(tmp_path: Path) -> None:
    class Fails(CSVLogger):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            if any(name.startswith("compression/") for name in metrics):
                raise RuntimeError("boom")

    found: list[Logger] = [Fails(tmp_path)]

    class Attach(L.Callback):
        def setup(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
            trainer.loggers = found

    assert fit(tmp_path, report(directory=str(tmp_path)), Attach()) == [
        "CompressionReport: The loggers couldn't take the report: RuntimeError: boom"
    ]
    assert (tmp_path / "report.html").is_file()
