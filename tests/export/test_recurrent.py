"""Recurrent layers in files: one operator, which computes what torch's layer does at any length and batch size."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import CompressionError, Targets, quantize
from lightning_compress.export.export import ExportedModel, export
from lightning_compress.export.runtimes import RUNTIMES

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

KINDS = (nn.LSTM, nn.GRU, nn.RNN)


class Many(nn.Module):
    """Runs layers of all kinds and options on sequences, on one of them alone, and with states that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.deep = nn.ModuleList(
            [kind(6, 5, num_layers=2, bidirectional=True, batch_first=True, dropout=0.5) for kind in KINDS]
        )
        self.bare = nn.ModuleList([kind(6, 8, bias=False, batch_first=True) for kind in KINDS])
        self.relu = nn.RNN(6, 8, nonlinearity="relu", bidirectional=True)

    def forward(self, x: Tensor, states: Tensor) -> list[Any]:
        lstm, *others = self.bare
        found = [lstm(x, (states, states.cos())), *(layer(x, states) for layer in others)]
        return [*found, self.relu(x[0]), *(layer(x) for layer in self.deep)]


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(6, 8, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.rnn(packed)[1]


class Tagger(nn.Module):
    """Reads a sequence in two directions, and tells of each step what it is."""

    def __init__(self, kind: type[nn.Module] = nn.LSTM, size: int = 8, **options: Any) -> None:
        super().__init__()
        self.rnn = kind(6, size, batch_first=True, bidirectional=True, **options)
        self.head = nn.Linear(2 * size, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.rnn(x)[0])
        return y


def tensors_of(nest: Any) -> list[Tensor]:
    return [nest] if isinstance(nest, Tensor) else [tensor for part in nest for tensor in tensors_of(part)]


def kinds_of(written: ExportedModel) -> list[str]:
    return [node.op_type for node in onnx.load(written.path).graph.node]


def agrees(model: nn.Module, written: ExportedModel, *calls: tuple[Tensor, ...], tolerance: float = 1e-5) -> None:
    runtime = RUNTIMES[written.facts["runtime"]]
    session = runtime.open(Path(written.path), runtime.levels[-1])
    for call in calls:
        with torch.no_grad():
            torch.testing.assert_close(session(call), tensors_of(model(*call)), rtol=1e-4, atol=tolerance)


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_layers_compute_what_torchs_do_at_any_length_and_batch_size(target: str, tmp_path: Path) -> None:
    pytest.importorskip(target)
    model = Many().eval()
    example = (torch.randn(3, 5, 6), torch.randn(1, 3, 8))
    sizes = {"x": [0, 1], "states": [1]}
    written = export(model, example, tmp_path / "model.onnx", target, dynamic_batch=False, dynamic=sizes)
    kinds = kinds_of(written)
    assert [kinds.count(kind) for kind in ("LSTM", "GRU", "RNN")] == [3, 3, 4]
    agrees(model, written, *((torch.randn(n, t, 6), torch.randn(1, n, 8)) for n, t in ((3, 5), (1, 1), (4, 33))))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_file_of_torchs_own_takes_any_length_too(kind: type[nn.Module], tmp_path: Path) -> None:
    model = Tagger(kind).eval()
    written = export(model, torch.randn(3, 5, 6), tmp_path / "model.pt2", dynamic={"x": [1]})
    names = {str(node.target) for node in torch.export.load(written.path).graph.nodes}
    assert f"aten.{kind.__name__.lower()}.input" in names
    assert not any("lightning_compress" in name for name in names)
    agrees(model, written, (torch.randn(4, 9, 6),), (torch.randn(1, 1, 6),))


INT8 = [(nn.GRU, "onnxruntime"), (nn.GRU, "openvino"), (nn.LSTM, "openvino")]  # an LSTM is int8 in onnxruntime


@pytest.mark.parametrize(("kind", "target"), INT8)
def test_weights_in_int8_stay_so_in_a_file_and_are_computed_with_in_float(
    kind: type[nn.Module], target: str, tmp_path: Path
) -> None:
    pytest.importorskip(target)
    model = Tagger(kind, size=64, num_layers=2).eval()
    quantized = quantize(model, "int8_dynamic", targets=Targets(include=["rnn"]))
    written = export(quantized, torch.randn(3, 5, 6), tmp_path / "model.onnx", target, dynamic={"x": [1]})
    assert kinds_of(written).count(kind.__name__) == 2
    assert written.facts["dequantized"] == ["rnn"]
    stored = [
        tensor for tensor in onnx.load(written.path).graph.initializer if tensor.data_type == onnx.TensorProto.INT8
    ]
    assert len(stored) == 4  # of input and state of two layers
    assert written.facts["parity"]["difference"] < 0.02
    agrees(model, written, (torch.randn(4, 9, 6),), tolerance=0.02)


def test_a_file_does_not_grow_with_the_length_of_its_example(tmp_path: Path) -> None:
    sizes = []
    for length in (4, 40):
        written = export(Tagger(nn.RNN).eval(), torch.randn(2, length, 6), tmp_path / "model.onnx", verify=False)
        sizes.append(os.path.getsize(written.path))
    assert abs(sizes[1] - sizes[0]) < 100


def test_doubles_which_runtimes_have_no_layer_for_are_computed_step_after_step(tmp_path: Path) -> None:
    class Exact(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.RNN(6, 8, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x.double())[0]

    model, x = Exact().eval(), torch.randn(3, 2, 6)
    written = export(model, x, tmp_path / "model.onnx", dynamic_batch=False)
    assert kinds_of(written).count("Tanh") == 3
    agrees(model, written, (x,))


def test_packed_sequences_are_refused_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(CompressionError, match=r"packs sequences.*test_recurrent.py:\d+ .*padded ones"):
        export(Packed().eval(), (torch.randn(3, 5, 6), torch.tensor([5, 2, 3])), tmp_path / "model.onnx")
