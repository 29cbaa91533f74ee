"""What a reader of `report.html` finds, without a browser; and comparisons that have something of everything."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path

from lightning_compress.report import Comparison, compare
from lightning_compress.report.facts import FileFacts, FileLatency, QuantizedFacts
from lightning_compress.report.latency import Latency
from lightning_compress.report.storage import LayerMeasurement
from tests.report.test_compare import LARGE

VOID = {"meta", "link", "br", "img", "input", "hr"}
HOSTILE = "<script>alert('x')</script>\"&amp;`\x00\x1b\u202e名前" + "y" * 300


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    text: str = ""
    parents: list[str] = field(default_factory=list)


class Page(HTMLParser):
    """Reads a page strictly: every element that is opened is closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[Element] = []
        self._open: list[Element] = []
        self.feed(text)
        self.close()
        assert not self._open, [one.tag for one in self._open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"{tag} has an attribute twice"
        found = Element(tag, {name: value or "" for name, value in attrs}, parents=[one.tag for one in self._open])
        self.elements.append(found)
        if tag not in VOID:
            self._open.append(found)

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open[-1].tag == tag, f"</{tag}> closes nothing"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        for one in self._open:
            one.text += data

    def all(self, *tags: str) -> list[Element]:
        return [one for one in self.elements if one.tag in tags]

    @property
    def text(self) -> str:
        return self.all("body")[0].text


def times(batch_size: int, *rounds_ms: float) -> Latency:
    middle = sorted(rounds_ms)[len(rounds_ms) // 2]
    return Latency(batch_size, middle, min(rounds_ms), max(rounds_ms), 40, rounds_ms, "turns")


def everything(folder: Path, name: str = "net") -> Comparison:
    """Four rows: a float model, a quantized one, a file that is faster, and a file that is slower."""
    layers = tuple(LayerMeasurement(f"{name}.{i}", "Conv2d", 1000 + i, 900, 4000 + i, "float32") for i in range(24))
    before = replace(LARGE, layers=layers, latency=(times(1, *[2.0] * 8), times(32, *[10.0] * 8)))
    int8 = tuple(replace(one, size_bytes=1100, dtype="int8") for one in layers[:-1])
    quantized = QuantizedFacts(
        {f"{name}.23": f"`{name}` is called <twice>"}, {f"{name}.0": 0.0123, f"{name}.1": 0.5}, 0.9987, 0.995, 3
    )
    after = replace(before, size_bytes=2000, layers=int8, latency=(times(1, *[3.0] * 8), times(32, *[4.0] * 8)))
    after = replace(after, quantized=quantized)
    facts = FileFacts(
        target="onnxruntime",
        runtime="onnxruntime",
        versions={"onnxruntime": "1.2.3"},
        int8=(f"{name}.0", f"{name}.1"),
        floats={f"{name}.2": "no kernel takes it"},
        dequantized=(f"{name}.3",),
        parity={"cosine": 0.999991, "same_class": 0.998, "samples": 642, "batch_sizes": [1, 64, 129]},
        latency=(
            FileLatency(1, 0.25, 2.0, "float", 0.125, (0.12, 0.13), 1),
            FileLatency(64, 9.0, 6.0, "float", 1.5, (1.4, 1.6), 1),
        ),
    )
    file = replace(after, size_bytes=1900, layers=(), quantized=None, file=facts, latency=(times(1, *[0.5] * 8),))
    table = folder / "sensitivity.json"
    row = {"layer": f"{name}.0", "level": "int8_static", "drop": 0.0345, "drop_error": 0.0021, "score": 0.2}
    table.write_text(json.dumps({"of": "int8", "metric": 0.91, "rows": [row]}))
    return compare(
        {"before": before, "after": after, "model.onnx": file},
        metrics={"before": {"test_acc": 0.9712}, "after": {"test_acc": 0.9688}, "model.onnx": {"test_acc": 0.9687}},
        origins={"before": {"test_acc": "test"}, "after": {"test_acc": "test"}},
        notes=["`net` was calibrated on 8 batches."],
        settings="trainer:\n  max_epochs: 7\n",
        sensitivity=table,
    )
