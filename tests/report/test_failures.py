"""What goes wrong in a report ends no run: it is a note and a warning of one line, and what can be written is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_compress import CompressionReport
from lightning_compress.errors import CompressionError
from lightning_compress.report import files, latency, macs, rows
from tests.report.models import CONV_NET_PARAMETERS, Classifier
from tests.report.test_callback import report, trainer
from tests.report.test_callback import rows as written_rows

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    # Networks at the edge train nothing.
    pytest.mark.filterwarnings("ignore:.*(configure_optimizers|training_step)` returned `None`"),
]

TEXTS = [f"report.{kind}" for kind in ("csv", "html", "json", "md")]
BOOM = RuntimeError("boom\nand a second line")


def fails(*args: Any, **kwargs: Any) -> Any:
    raise BOOM


class Talks(L.Callback):
    def report_notes(self) -> list[str]:
        raise BOOM


def fit(folder: Path, *callbacks: L.Callback, model: Classifier | None = None) -> list[str]:
    """The one-line warnings of a fit that ends as it should."""
    run = trainer(folder, *callbacks)
    with pytest.warns(UserWarning, match="^CompressionReport: ") as caught:
        run.fit(model or Classifier())
    assert run.state.finished
    messages = [str(one.message) for one in caught if str(one.message).startswith("CompressionReport")]
    assert not [message for message in messages if "\n" in message or "second line" in message]
    return messages


FAILURES: dict[str, tuple[Any, str, str]] = {
    "the picture": (files, "plot_report", "report.png couldn't be written (RuntimeError: boom)."),
    "the timing": (rows, "measure_latency", "No latency: RuntimeError: boom"),
    "the terminal": (files, "origins_of", "The report failed: RuntimeError: boom"),
    "the machine": (files, "legend", "The report failed: RuntimeError: boom"),
}


@pytest.mark.parametrize("where", FAILURES)
def test_a_failure_is_a_note_and_a_warning_of_one_line(tmp_path, monkeypatch, where: str) -> None:
    module, name, words = FAILURES[where]
    monkeypatch.setattr(module, name, fails)
    callback = report(picture=True)
    assert [f"CompressionReport: {words}"] == fit(tmp_path, callback)
    assert written_rows(tmp_path)["after"]["measurement"]["parameters"] == CONV_NET_PARAMETERS
    if where in ("the picture", "the timing"):
        assert words in json.loads((tmp_path / "report.json").read_text())["notes"]
        assert "boom" in (tmp_path / "report.md").read_text()


def test_the_files_are_there_before_any_picture_is_drawn(tmp_path, monkeypatch) -> None:
    def draws(comparison: Any, path: Path) -> None:
        assert sorted(one.name for one in path.parent.iterdir()) == TEXTS
        path.touch()

    monkeypatch.setattr(files, "plot_report", draws)
    trainer(tmp_path, report(picture=True)).fit(Classifier())
    assert sorted(one.name for one in tmp_path.iterdir()) == [*TEXTS, "report.png"]


def test_a_folder_that_is_a_file_is_a_warning_and_the_numbers_are_printed(tmp_path, capsys) -> None:
    (tmp_path / "taken").write_text("mine")
    callback = report(directory=str(tmp_path / "taken"), picture=True)
    assert len(fit(tmp_path, callback)) == 5, "one for each file"
    assert "Compression report" in capsys.readouterr().out
    assert (tmp_path / "taken").read_text() == "mine"
    assert callback.comparison is not None and "report.html couldn't be written" in callback.comparison.notes[-5]


def test_a_full_disk_leaves_the_report_before_whole(tmp_path, monkeypatch) -> None:
    (tmp_path / "report.json").write_text("before")
    write_text = Path.write_text

    def half(path: Path, text: str, **kwargs: Any) -> int:
        write_text(path, text[:10], **kwargs)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    warned = fit(tmp_path, report())
    assert warned[1].endswith("report.json couldn't be written (OSError: [Errno 28] No space left on device).")
    assert [one.name for one in tmp_path.iterdir()] == ["report.json"]
    assert (tmp_path / "report.json").read_text() == "before"


def test_notes_that_another_callback_cannot_give_are_left_out(tmp_path) -> None:
    [warned] = fit(tmp_path, report(), Talks())
    assert warned == "CompressionReport: The notes of Talks couldn't be taken: RuntimeError: boom"
    assert list(written_rows(tmp_path)) == ["before", "after"]


def test_a_hundred_notes_are_ten_on_the_terminal_and_all_in_the_file(tmp_path, capsys) -> None:
    class Chatty(L.Callback):
        def report_notes(self) -> list[str]:
            return [f"note {number}" for number in range(100)]

    trainer(tmp_path, report(), Chatty()).fit(Classifier())
    printed = capsys.readouterr().out
    assert sum(line.startswith("- ") for line in printed.splitlines()) == 11
    assert "more notes in report.md" in printed
    assert all(f"- note {number}\n" in (tmp_path / "report.md").read_text() for number in range(100))


def test_an_operator_whose_count_fails_is_named_and_costs_no_latency(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(macs.flop_registry, torch.ops.aten.convolution, fails)
    trainer(tmp_path, report()).fit(Classifier())
    for row in written_rows(tmp_path).values():
        assert row["measurement"]["uncounted"] == ["aten.convolution"]
        assert len(row["measurement"]["latency"]) == 2


def test_a_batch_size_that_does_not_run_costs_the_others_nothing(tmp_path) -> None:
    class Small(Classifier):
        def forward(self, image: Tensor) -> Tensor:
            if torch.is_inference_mode_enabled() and len(image) == 3:
                raise RuntimeError("too large")
            return super().forward(image)

    trainer(tmp_path, report(batch_sizes=(1, 2, 3))).fit(Small())
    for name, row in written_rows(tmp_path).items():
        assert [one["batch_size"] for one in row["measurement"]["latency"]] == [1, 2]
        note = f"{name}: no latency at batch 3 (RuntimeError: too large)."
        assert note in (tmp_path / "report.md").read_text()


def test_a_model_that_cannot_be_copied_has_no_latency_before_and_a_reason(tmp_path) -> None:
    class Single(Classifier):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("there is one")

    trainer(tmp_path, report()).fit(Single())
    found = written_rows(tmp_path)
    assert [len(found[name]["measurement"]["latency"]) for name in ("before", "after")] == [0, 2]
    assert "before: no latency, as no copy of Single can be kept" in (tmp_path / "report.md").read_text()


def test_a_layer_that_has_no_shape_yet_is_measured_after_the_first_batch(tmp_path) -> None:
    class Lazy(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net.head = nn.LazyLinear(4)  # type: ignore[union-attr]

        def configure_optimizers(self) -> None: ...

    trainer(tmp_path, report()).fit(Lazy())
    found = written_rows(tmp_path)
    assert [found[name]["measurement"]["parameters"] for name in ("before", "after")] == [CONV_NET_PARAMETERS] * 2


EDGES: dict[str, Callable[[], nn.Module]] = {
    "no parameters": lambda: nn.Sequential(nn.Flatten(), nn.ReLU()),
    "one layer": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 4)),
    "all zeros": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 4).apply(lambda one: nn.init.zeros_(one.weight))),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("edge", EDGES)
def test_networks_at_the_edge_have_a_report(tmp_path, edge: str, frozen: bool) -> None:
    class Edge(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net = EDGES[edge]().requires_grad_(not frozen)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
            loss = self(batch[0]).square().mean()
            return loss if loss.requires_grad else None

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters()) if any(True for _ in self.parameters()) else None

    trainer(tmp_path, report(picture=True)).fit(Edge())
    assert list(written_rows(tmp_path)) == ["before", "after"]
    assert (tmp_path / "report.png").exists()


@pytest.mark.parametrize("directory", [5, ["here"]])
def test_a_directory_that_is_no_path_is_refused_in_the_constructor(directory: Any) -> None:
    with pytest.raises(CompressionError, match="`directory` must be a path or None. Received: directory="):
        CompressionReport(directory)


def test_clocks_that_stand_still_give_no_speed(monkeypatch) -> None:
    monkeypatch.setattr(latency.time, "perf_counter", lambda: 0.0)
    model = nn.Linear(2, 2)
    slots = {name: (model, {1: torch.ones(1, 2)}) for name in ("a", "b")}
    timed = latency.measure_latency(slots, 0.01)
    assert latency.speedup_range(timed["a"][0], timed["b"][0]) is None
