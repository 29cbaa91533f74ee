"""Draws docs/runtimes.png from the tables of runtimes.md: how many times as fast as eager float32 each file is."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import matplotlib.pyplot as plt

TABLES = Path(__file__).with_name("runtimes.md")
PICTURE = TABLES.parents[1] / "docs/runtimes.png"
NETWORKS = {
    "resnet18": "ResNet-18",
    "mobilenet_v2": "MobileNetV2",
    "sentences": "sentence encoder",
    "pitch": "1-D convolutions",
    "lstm": "LSTM",
}
BARS = {
    ("float32", "onnxruntime"): "#c9d3db",
    ("float32", "OpenVINO"): "#8fa3b3",
    ("int8", "onnxruntime"): "#6baed6",
    ("int8", "OpenVINO"): "#1f77b4",
}


def speeds(network: str) -> list[float]:
    """Read the speeds of a network's files at batch 1, in the order of `BARS`; an LSTM's int8 is the dynamic one."""
    table = re.search(rf"^\| {network} \| Runtime .*?(?=\n\n)", TABLES.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert table is not None
    int8 = "ours, dynamic" if network == "lstm" else "ours, static"
    names = [(int8 if kind == "int8" else kind, runtime) for kind, runtime in BARS]
    rows = [re.search(rf"\| {kind} \| {runtime} \| [\d.]+ \| ([\d.]+)x ", table[0]) for kind, runtime in names]
    return [float(row[1]) for row in rows if row]


def draw(path: Path) -> None:
    figure, axis = plt.subplots(figsize=(8, 4.4), layout="constrained")
    for number, ((kind, runtime), color) in enumerate(BARS.items()):
        values = [speeds(network)[number] for network in NETWORKS]
        places = [place + 0.2 * number for place in range(len(NETWORKS))]
        bars = axis.barh(places, values, height=0.19, color=color, label=f"{kind}, {runtime}")
        axis.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
    axis.axvline(1, color="#555555", linewidth=0.8, linestyle=":")
    axis.set_yticks([place + 0.3 for place in range(len(NETWORKS))], list(NETWORKS.values()))
    axis.invert_yaxis()
    axis.set_xlabel("times as fast as float32 in torch, batch 1, one thread")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE)
