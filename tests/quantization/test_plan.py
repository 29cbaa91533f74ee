"""What a log says of a plan: each reason once, the innermost module alone, no line that another one contradicts."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_compress import PostTrainingQuantization, QLoRA, QuantizationAwareTraining
from lightning_compress.messages import MOST_LINES
from lightning_compress.quantization.plan import explain, summary
from tests.support.modules import ZooModule, quiet_trainer
from tests.support.wide import WIDE

UNTRACED = "not as a whole: torch.export can't trace its forward (TypeError: no)"


def record(floats: dict[str, str], units: tuple[str, ...] = (), **layers: str) -> dict[str, Any]:
    return {
        "scheme": {"name": "int8_static", "target": "onnxruntime", "engine": "onednn"},
        "units": [{"path": path, "hooked": []} for path in units],
        "layers": [{"path": path, "scheme": {"name": name}} for path, name in layers.items()],
        "floats": floats,
    }


def test_a_reason_is_told_once_and_of_the_innermost_alone() -> None:
    paths = ["", "net", *(f"net.{i}" for i in range(12)), *(f"net.{i}.attn" for i in range(12))]
    units = tuple(f"net.{i}.attn.proj" for i in range(12))
    assert explain(record(dict.fromkeys(paths, UNTRACED), units))[:1] == [
        f"`net.{{0-11}}.attn` are quantized in parts, {UNTRACED}"
    ]
    assert len(explain(record(dict.fromkeys(paths, UNTRACED), units))) == 2  # and the hint that there are many pieces
    assert summary(record({}, units)) == "`net.{0-11}.attn.proj` (int8_static for onnxruntime)"


def test_nothing_is_quantized_in_parts_of_which_no_part_is() -> None:
    floats = {"rnn": "not as a whole: no layer in it can be quantized", "rnn.cell": "no static int8 kernel for GRUCell"}
    assert explain(record(floats, ("head",))) == ["`rnn.cell` stays float: no static int8 kernel for GRUCell"]
    del floats["rnn.cell"]
    assert explain(record(floats, ("head",))) == ["`rnn` stays float: no layer in it can be quantized"]


@pytest.mark.parametrize(
    "callback", [QuantizationAwareTraining(), PostTrainingQuantization(), QLoRA(rank=2)], ids=lambda c: type(c).__name__
)
def test_a_log_of_a_transformer_has_ten_lines(callback: Any, caplog: pytest.LogCaptureFixture) -> None:
    gpt = next(row for row in WIDE if str(row) == "gpt")
    module, trainer = ZooModule(gpt), quiet_trainer(callbacks=[callback])
    with caplog.at_level("INFO"):
        trainer.test(module, verbose=False) if isinstance(callback, PostTrainingQuantization) else trainer.fit(module)
    said = next(text for text in caplog.messages if text.startswith(type(callback).__name__))
    assert len(said.splitlines()) <= MOST_LINES
    reasons = [line.partition(": ")[2] for line in said.splitlines()[1:]]
    assert len(set(reasons)) == len(reasons)
    assert "Error" not in said or "torch.export can't trace its forward (" in said
