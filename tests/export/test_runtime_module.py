"""`RuntimeModule`: called as the model was, it gives what the model gives."""

from __future__ import annotations

import copy
import json
import pickle
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from lightning_compress.errors import CompressionError
from lightning_compress.export.export import export_call
from lightning_compress.export.runtime_module import RuntimeModule
from lightning_compress.export.sidecar import write_sidecar

Points = namedtuple("Points", ["near", "far"])


def write_file(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: Path, batch: bool = True) -> None:
    """Without the proof, which has tests of its own."""
    export_call(model, [(args, kwargs)], path, dynamic_batch=batch, dynamic={}, verify=False)


class Nested(nn.Module):
    """Dicts and tuples in and out, a keyword with a default, and a constant among the arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(
        self, features: dict[str, Tensor], pair: tuple[Tensor, Tensor], scale: float = 1.0, mask: Tensor | None = None
    ) -> Any:
        mixed = self.first(features["a"]) * scale + features["b"][:, None]
        both = self.second(pair[0] - pair[1])
        if mask is not None:
            mixed = mixed * mask
        return {"mixed": mixed, "points": Points(both, both.relu()), "no": None, "size": (mixed.sum(1), 2)}


def nested_call(samples: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    a, b = torch.randn(samples, 4), torch.randn(samples)
    return ({"a": a, "b": b}, (torch.randn(samples, 4), torch.randn(samples, 4))), {"scale": 2.0}


@pytest.fixture(scope="module")
def nested(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    torch.manual_seed(3)
    model = Nested().eval()
    path = tmp_path_factory.mktemp("nested") / "nested.onnx"
    write_file(model, *nested_call(3), path)
    return model, path


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A file of a linear layer of 4 to 2 with all ones, for a batch of a fixed size or any."""
    folder = tmp_path_factory.mktemp("linear")

    def write(batch: int | None = None) -> Path:
        path = folder / f"{batch}.onnx"
        if not path.exists():
            layer = nn.Linear(4, 2)
            nn.init.ones_(layer.weight), nn.init.zeros_(layer.bias)
            write_file(layer, (torch.ones(batch or 2, 4),), {}, path, batch=batch is None)
        return path

    return write


def assert_same(expected: Any, got: Any) -> None:
    assert list(got) == list(expected)
    torch.testing.assert_close(got["mixed"], expected["mixed"])
    for name in Points._fields:
        torch.testing.assert_close(got["points"][name], getattr(expected["points"], name))
    assert got["no"] is None and got["size"][1] == 2 and isinstance(got["size"], tuple)
    torch.testing.assert_close(got["size"][0], expected["size"][0])


@torch.no_grad()
@pytest.mark.parametrize("samples", [1, 3, 8])
def test_gives_what_the_model_gives_in_the_same_containers(nested: tuple[nn.Module, Path], samples: int) -> None:
    model, path = nested
    (features, pair), options = nested_call(samples)
    module = RuntimeModule(path)
    expected = model(features, pair, **options)
    assert_same(expected, module(features, pair, **options))
    assert_same(expected, module(pair=pair, scale=2.0, features=dict(reversed(features.items()))))
    assert_same(expected, module(features, list(pair), 2.0, mask=None))


def test_has_no_parameters_and_gives_no_gradients(linear: Callable[..., Path]) -> None:
    module = RuntimeModule(linear())
    output = module(torch.ones(3, 4, requires_grad=True))
    assert not output.requires_grad and output.equal(torch.full((3, 2), 4.0))
    assert list(module.parameters()) == [] and module.state_dict() == {}


@pytest.mark.parametrize("samples", [1, 3, 6, 7])
def test_a_fixed_batch_takes_any_size(linear: Callable[..., Path], samples: int) -> None:
    x = torch.randn(samples, 4)
    torch.testing.assert_close(RuntimeModule(linear(3))(x), x.sum(1, keepdim=True).expand(-1, 2))


def test_a_largest_batch_is_never_exceeded(linear: Callable[..., Path], tmp_path: Path) -> None:
    path = copied(linear(), tmp_path, max_batch=4)
    module, sizes = RuntimeModule(path), list[int]()
    session: Any = module._session

    def watched(tensors: Any) -> Any:
        sizes.append(len(tensors[0]))
        return session(tensors)

    module._session = watched
    x = torch.randn(10, 4)
    torch.testing.assert_close(module(x), x.sum(1, keepdim=True).expand(-1, 2))
    assert sizes == [4, 4, 2]


def copied(path: Path, folder: Path, **facts: Any) -> Path:
    """A copy of a file with other facts."""
    other = folder / path.name
    other.write_bytes(path.read_bytes())
    write_sidecar(other, {**json.loads(Path(f"{path}.json").read_text()), **facts})
    return other


def test_a_value_of_the_whole_batch_is_refused_in_chunks(tmp_path: Path) -> None:
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x * 2, x.mean()

    path = tmp_path / "mean.onnx"
    write_file(Mean(), (torch.ones(2, 3),), {}, path, batch=False)
    module = RuntimeModule(path)
    doubled, mean = module(torch.ones(5, 3))  # where all chunks have the same
    assert doubled.shape == (5, 3) and mean.item() == 1
    with pytest.raises(CompressionError, match="must run at once, since `output_1` is a value of the whole batch"):
        module(torch.randn(5, 3))


def test_copies_and_pickles_open_the_file_again(linear: Callable[..., Path], tmp_path: Path) -> None:
    path, x = copied(linear(), tmp_path), torch.randn(3, 4)
    module = RuntimeModule(path)
    expected = module(x)
    held = nn.Sequential(nn.Identity(), module)
    for twin in (copy.deepcopy(held), pickle.loads(pickle.dumps(held))):
        assert twin[1]._session is None
        assert twin(x).equal(expected)
    assert "runtime='onnxruntime'" in repr(module)
    stale = copy.deepcopy(module)
    path.write_bytes(path.read_bytes() + b"\x00")
    with pytest.raises(CompressionError, match="It was changed since"):
        stale(x)


def test_a_copy_opens_its_file_wherever_the_process_is(
    linear: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copied(linear(), tmp_path)
    monkeypatch.chdir(path.parent)
    twin = copy.deepcopy(RuntimeModule(path.name))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert twin(torch.ones(1, 4)).tolist() == [[4.0, 4.0]]


def test_threads_reach_the_runtime(linear: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[int]()

    class Session(onnxruntime.InferenceSession):  # type: ignore[misc]
        def __init__(self, path: str, options: Any, **more: Any) -> None:
            seen.append(options.intra_op_num_threads)
            super().__init__(path, options, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    RuntimeModule(linear(), threads=3)
    assert seen == [3]


X = torch.ones(2, 4)


@pytest.mark.parametrize(
    ("args", "kwargs", "words"),
    [
        ((), {}, "`forward` must get `input`. Received: nothing."),
        ((), {"inputs": X}, "`forward` must take input. Received: forward='inputs'. Nearest: input."),
        ((X, X), {}, "`forward` must take input. Received: forward='argument 1'"),
        ((X.double(),), {}, "`input` must be of torch.float32. Received: torch.float64. Convert it: input.to"),
        ((torch.ones(2, 5),), {}, r"`input` must have the shape \('batch', 4\). Received: \(2, 5\)."),
        ((torch.ones(4),), {}, r"Received: \(4,\)"),
        (([X],), {}, "`input` must be a tensor, as in the file. Received: a list."),
        ((3,), {}, "`input` must be a tensor, as in the file. Received: 3."),
        ((nn.ReLU(),), {}, "Received: a ReLU"),
    ],
)
def test_calls_that_do_not_fit(linear: Callable[..., Path], args: Any, kwargs: Any, words: str) -> None:
    with pytest.raises(CompressionError, match=words):
        RuntimeModule(linear())(*args, **kwargs)


def test_nests_and_constants_that_do_not_fit(nested: tuple[nn.Module, Path]) -> None:
    module = RuntimeModule(nested[1])
    (features, pair), options = nested_call(2)
    with pytest.raises(CompressionError, match="`features` must hold a, b. Received: a."):
        module({"a": features["a"]}, pair, **options)
    with pytest.raises(CompressionError, match="`scale` must be 2.0, as in the file. Received: 3.0."):
        module(features, pair, 3.0)
    with pytest.raises(CompressionError, match="`forward` must get `scale`. Received: features, pair."):
        module(features, pair)
    with pytest.raises(CompressionError, match=r"`features_b` must have the shape \('batch',\). Received: \(3,\)"):
        module({**features, "b": torch.ones(3)}, pair, **options)


def test_files_that_do_not_fit(linear: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(CompressionError, match="There is no such file"):
        RuntimeModule(tmp_path / "no.onnx")
    with pytest.raises(CompressionError, match="`runtime` must be one of onnxruntime, openvino for None.onnx"):
        RuntimeModule(linear(), "executorch")
    path = copied(linear(), tmp_path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CompressionError, match="It was changed since"):
        RuntimeModule(path)


@pytest.mark.parametrize("damage", ["cut", "value", "missing", "nested"])
def test_facts_that_were_changed_are_refused(damage: str, linear: Callable[..., Path], tmp_path: Path) -> None:
    path = copied(linear(), tmp_path)
    beside = Path(f"{path}.json")
    facts = json.loads(beside.read_text())
    changed = {
        "cut": beside.read_text()[:-20],
        "value": json.dumps({**facts, "call": {"tuple": 7}}),
        "missing": json.dumps({key: value for key, value in facts.items() if key != "outputs"}),
        "nested": "[" * 100_000,
    }[damage]
    beside.write_text(changed)
    with pytest.raises(CompressionError, match="`path` must be a file .*Export the model again"):
        RuntimeModule(path)
    beside.write_text(json.dumps(dict(sorted(facts.items()))))  # the layout is free
    RuntimeModule(path)
