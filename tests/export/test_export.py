"""Models leave as files that other runtimes run: what they compute there, what stands in them, what is refused."""

from __future__ import annotations

import copy
import errno
import importlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_compress import (
    CompressionError,
    DistillationModule,
    MissingExtraError,
    export,
    plan_removal,
    prune_,
    quantize,
    remove_channels_,
)
from lightning_compress.export.formats import FORMATS
from lightning_compress.export.runtime_module import RuntimeModule
from lightning_compress.export.runtimes import RUNTIMES
from lightning_compress.modules.written import writing_file
from tests.export.files import TwoHeads, call, exported, network
from tests.quantization.test_other_runtimes import Mixed
from tests.support.onnx_sessions import open_session
from tests.support.oracles import assert_same_state
from tests.support.zoo import row

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
VERB = importlib.import_module("lightning_compress.export.export")


def run_file(path: str, *arrays: Any) -> list[np.ndarray]:
    """Run a file as somebody does who has nothing but onnxruntime."""
    session = open_session(path)
    names = [entry.name for entry in session.get_inputs()]
    return session.run(None, dict(zip(names, arrays, strict=True)))


def test_a_stranger_gets_what_the_model_computes_at_any_batch_size() -> None:
    for size in (1, 3, 17):
        inputs = call(size, seed=size)
        with writing_file(), torch.no_grad():
            expected = network()(**inputs)
        classes, place = run_file(exported().path, inputs["image"].numpy(), inputs["scale"].numpy())
        scale = np.abs(expected["classes"].numpy()).max()
        assert np.abs(classes - expected["classes"].numpy()).max() < 0.02 * scale
        assert (classes.argmax(1) == expected["classes"].numpy().argmax(1)).all()
        assert np.abs(place - expected["more"][0].numpy()).max() < 0.02 * np.abs(expected["more"][0].numpy()).max()


def test_weights_are_stored_once_as_integers() -> None:
    graph = onnx.load(exported().path).graph
    matrices = [tensor for tensor in graph.initializer if len(tensor.dims) > 1]
    assert {tensor.data_type for tensor in matrices} == {onnx.TensorProto.INT8}
    assert sum(int(np.prod(tensor.dims)) for tensor in matrices) == sum(
        parameter.numel() for parameter in TwoHeads().parameters() if parameter.dim() > 1
    )


@pytest.mark.parametrize("scheme", ["int8_weight_only", pytest.param("nf4", marks=pytest.mark.slow)])
def test_no_weight_of_few_bits_is_stored_as_float_however_small(scheme: str, tmp_path: Path) -> None:
    file = export(quantize(Mixed().eval(), scheme), torch.randint(11, (3, 6)), tmp_path / "m.onnx")
    tensors = onnx.load(file.path).graph.initializer
    floats = [int(np.prod(tensor.dims)) for tensor in tensors if tensor.data_type == onnx.TensorProto.FLOAT]
    assert max(floats) < 480  # the elements of the smallest such weight
    assert "kernel" in file.facts["dequantized"] and "smaller, but not faster" in str(file)


def test_names_are_those_of_the_call_and_dimensions_say_what_varies() -> None:
    graph = onnx.load(exported().path).graph
    shapes = {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert shapes == {
        "image": ["batch", 3, 12, 12],
        "scale": ["batch", 1],
        "classes": ["batch", 5],
        "more_0": ["batch", 2],
    }


def test_a_file_tells_nothing_of_the_folders_it_was_made_in() -> None:
    content = Path(exported().path).read_bytes() + Path(exported().path + ".json").read_bytes()
    assert str(Path(__file__).parent).encode() not in content
    assert str(Path(torch.__file__).parents[1]).encode() not in content


def test_the_facts_beside_it_are_enough_for_whoever_has_only_the_file() -> None:
    facts = json.loads(Path(exported().path + ".json").read_text())
    assert facts["target"] == facts["runtime"] == "onnxruntime"
    assert facts["inputs"][0] == {"name": "image", "dtype": "float32", "shape": ["batch", 3, 12, 12]}
    assert facts["bytes"] == os.path.getsize(exported().path)
    assert facts["versions"]["onnxruntime"] == ort.__version__
    assert facts["parity"]["batch_sizes"] == [1, 4, 6, 9] and facts["parity"]["samples"] == 1 + 4 + 9 + 6
    assert facts["parity"]["levels"] == ["disabled", "basic", "extended", "all"]
    assert facts["parity"]["cosine"] > 0.999
    assert "begin.0" in facts["int8"] and not facts["float"]
    assert facts["done"]["quantization"]["scheme"]["class"].endswith("StaticInt8")


def test_the_summary_says_what_a_user_wants_to_know() -> None:
    said = str(exported())
    for words in ("for onnxruntime", "bytes", "in onnxruntime", "of 4 quantized layers", "agrees with the model on"):
        assert words in said


def test_the_model_stays_as_it_is(tmp_path: Path) -> None:
    model = copy.deepcopy(network()).train()
    state, before = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    export(model, call(), tmp_path / "model.onnx")
    assert_same_state(state, model.state_dict())
    assert model.training and torch.equal(before, torch.get_rng_state())
    assert model(**call())["classes"].equal(copy.deepcopy(network()).train()(**call())["classes"])


def test_pruned_and_narrowed_models_are_smaller_in_the_file(tmp_path: Path) -> None:
    model, x = row("residual").build().eval(), row("residual").inputs(0)[0]
    whole = export(model, x, tmp_path / "whole.onnx")
    narrow = copy.deepcopy(model)
    remove_channels_(narrow, plan_removal(narrow, x, params=0.4))
    halved = export(quantize(narrow, calibration=[x]), x, tmp_path / "narrow.onnx")
    weights = [
        sum(int(np.prod(t.dims)) for t in onnx.load(file.path).graph.initializer if len(t.dims) > 1)
        for file in (whole, halved)
    ]
    assert weights[1] < 0.5 * weights[0]
    assert halved.facts["done"].keys() == {"channels", "quantization"}


def test_a_masked_model_says_how_much_of_it_is_zero(tmp_path: Path) -> None:
    model = row("mlp").build().eval()
    prune_(model, 0.8)
    file = export(model, row("mlp").inputs(0)[0], tmp_path / "pruned.onnx")
    assert file.facts["done"]["sparsity"] == pytest.approx(0.8, abs=0.01)


def test_of_a_distillation_module_the_student_leaves_alone(tmp_path: Path) -> None:
    student, teacher = nn.Linear(6, 3), nn.Sequential(nn.Linear(6, 999), nn.Linear(999, 3))
    file = export(DistillationModule(student, teacher), torch.randn(2, 6), tmp_path / "student.onnx")
    assert sum(int(np.prod(tensor.dims)) for tensor in onnx.load(file.path).graph.initializer) == 6 * 3 + 3


ROWS = ["concat"]


@pytest.mark.parametrize(
    "name",
    [
        *ROWS,
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "mlp",
                "tied",
                "attention",
                "lstm",
                "keyword_only",
                "dict",
                "conv_bn_relu",
                "residual",
                "depthwise",
                "grouped",
                "transformer",
                "gru",
                "shared",
                "weight_norm",
                "int_weight",
            )
        ),
    ],
)
def test_the_zoo_leaves_in_int8(name: str, tmp_path: Path) -> None:
    args, kwargs = row(name).inputs(0)
    model = quantize(row(name).build().eval(), calibration=[(kwargs and ({**bound(name, args), **kwargs})) or args])
    file = VERB.export_call(model, [(args, kwargs)], tmp_path / "model.onnx", dynamic={})
    assert file.facts["parity"]["cosine"] > 0.999


def bound(name: str, args: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(("a", "b"), args, strict=False))


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x + 1
        return x - 1


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(4, -1) * 2


class Sorts(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


LINEAR = nn.Linear(3, 2)
BAD = {
    "unknown target": (LINEAR, torch.ones(2, 3), "m.onnx", {"target": "onnxruntim"}, "Nearest: onnxruntime"),
    "unknown suffix": (LINEAR, torch.ones(2, 3), "m.tflite", {}, r"end in \.onnx, \.pt2, \.pte"),
    "suffix of another target": (
        LINEAR,
        torch.ones(2, 3),
        "m.pte",
        {"target": "openvino"},
        r"end in \.onnx for target",
    ),
    "misfit": (LINEAR, torch.ones(2, 4), "m.onnx", {}, "`inputs` must be what the model takes"),
    "no tensor": (LINEAR, {"input": 3}, "m.onnx", {}, "`inputs` must be .* batch as dimension 0"),
    "data-dependent": (Branches(), torch.ones(2, 3), "m.onnx", {}, r"values of tensors, at test_export\.py:\d+ \(if x"),
    "fixed batch": (Fixed(), torch.ones(4, 3), "m.onnx", {}, "dynamic_batch=False"),
    "unknown operator": (Sorts(), torch.ones(4, 3), "m.onnx", {}, "bessel_j0"),
    "unknown input": (LINEAR, torch.ones(2, 3), "m.onnx", {"dynamic": {"inputs": [0]}}, "Nearest: input"),
    "unknown dimension": (LINEAR, torch.ones(2, 3), "m.onnx", {"dynamic": {"input": [2]}}, "which has 2"),
    "other calls": (LINEAR, torch.ones(2, 3), "m.onnx", {"calibration": [{"input": torch.ones(2, 3)}]}, "calls like"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cant_leave_is_refused_and_leaves_nothing(case: str, tmp_path: Path) -> None:
    model, inputs, name, options, words = BAD[case]
    with pytest.raises(CompressionError, match=words):
        export(model, inputs, tmp_path / name, **options)
    assert not list(tmp_path.iterdir())


def test_a_size_that_is_fixed_is_said(tmp_path: Path) -> None:
    file = export(Fixed(), torch.ones(4, 3), tmp_path / "m.onnx", dynamic_batch=False)
    assert file.facts["batch"] == 4 and file.facts["inputs"][0]["shape"] == [4, 3]


def test_further_dimensions_may_vary(tmp_path: Path) -> None:
    model = nn.Conv1d(2, 3, 3)
    file = export(model, torch.randn(2, 2, 16), tmp_path / "m.onnx", dynamic={"input": [2]})
    x = torch.randn(5, 2, 31)
    np.testing.assert_allclose(run_file(file.path, x.numpy())[0], model(x).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_an_example_of_one_leaves_the_batch_open(tmp_path: Path) -> None:
    file = export(LINEAR, torch.ones(1, 3), tmp_path / "m.onnx")
    assert run_file(file.path, np.ones((7, 3), np.float32))[0].shape == (7, 2)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_before_anything_runs(
    package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else found(name))
    with pytest.raises(MissingExtraError, match=rf"`{package}`.*lightning-compress\[onnx\]"):
        export(LINEAR, torch.ones(2, 3), tmp_path / "m.onnx")


def test_a_path_that_cant_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CompressionError, match="`path` must be a file that can be written"):
        export(LINEAR, torch.ones(2, 3), tmp_path / "file" / "m.onnx")


def test_a_full_disk_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(onnx, "save", full)
    with pytest.raises(CompressionError, match="No space left on device"):
        export(LINEAR, torch.ones(2, 3), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_a_file_that_the_runtime_rejects_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"before")
    monkeypatch.setattr(onnx, "save", lambda proto, path: Path(path).write_bytes(b"no protobuf"))
    with pytest.raises(CompressionError, match="be a file that onnxruntime runs"):
        export(LINEAR, torch.ones(2, 3), tmp_path / "m.onnx")
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"before"]


def test_a_target_whose_kernels_cant_take_the_roundings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CompressionError, match=r"StaticInt8\(target='tensorrt'\)"):
        export(network(), call(), tmp_path / "m.onnx", "tensorrt")


def test_without_verification_nothing_is_compared(tmp_path: Path) -> None:
    file = export(LINEAR, torch.ones(2, 3), tmp_path / "m.onnx", verify=False)
    assert file.facts["parity"] is None and "agrees" not in str(file)


def test_every_target_has_a_runtime() -> None:
    assert {known.runtime for known in FORMATS.values()} == set(RUNTIMES)


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.calls


class Drops(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.dropout(x)


@pytest.mark.parametrize("kind", [Remembers, Drops])
def test_what_gives_something_else_when_called_again_is_refused(kind: type[nn.Module], tmp_path: Path) -> None:
    with pytest.raises(CompressionError, match="another `output` in the second call"):
        export(kind(), torch.ones(2, 3), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


class Echoes(nn.Module):
    def forward(self, a: Any, a_0: Tensor) -> dict[str, Any]:
        return {"a_0": a_0, "again": a_0, "x": {"y": a[0] + 1}, "x_y": a[0] * a_0}


def test_names_that_meet_are_numbered(tmp_path: Path) -> None:
    x, y = torch.randn(2, 2, 3)
    file = export(Echoes(), {"a": (x,), "a_0": y}, tmp_path / "m.onnx")
    assert [entry["name"] for entry in file.facts["inputs"]] == ["a_0", "a_0_2"]
    got = RuntimeModule(file.path)(a=(x,), a_0=y)
    assert got["a_0"].equal(y) and got["again"].equal(y) and got["x"]["y"].equal(x + 1) and got["x_y"].equal(x * y)


class Counts(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        return x + 1, x.shape[0]


class Grid(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.ones(4)


@pytest.mark.parametrize(
    ("model", "inputs", "options", "words"),
    [
        (Counts(), torch.ones(2, 3), {}, "^What an exported module.*a number that the sizes of tensors make"),
        (Grid(), torch.ones(2, 4), {"dynamic": {"x": [1]}}, r"vary \(dimension 1 of `x`\)\. Leave that out"),
        (Fixed(), torch.ones(4, 3), {}, r"vary \(dimension 0 of `x`\).*dynamic_batch=False"),
        (
            Counts(),
            torch.ones(2, 3),
            {"dynamic": {"x": 1}},
            r"`dynamic` must hold numbers of dimensions, as {'x': \[1\]}",
        ),
        (LINEAR, torch.ones(2, 3), {"calibration": [torch.ones(2, 4)]}, "`calibration` must be what the model takes"),
        (LINEAR, torch.full((2, 3), torch.nan), {}, "`model` must give finite values"),
        (torch.relu, torch.ones(2, 3), {}, "`model` must be a torch.nn.Module"),
        (nn.Linear(3, 2).bfloat16(), torch.ones(2, 3).bfloat16(), {}, "be a file that onnxruntime runs"),
    ],
)
def test_refusals_say_what_to_change(
    model: nn.Module, inputs: Tensor, options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(CompressionError, match=words):
        export(model, inputs, tmp_path / "m.onnx", **options)
    assert not list(tmp_path.iterdir())


class Pools(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(x, 2)


class Chooses(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 2 if x.shape[0] > 20 else x * 3
        return x + 1 if x.shape[1] > 8 else x


def test_sizes_that_vary_are_compared_at_another_size(tmp_path: Path) -> None:
    with pytest.raises(CompressionError, match="shape"):
        export(Pools(), torch.randn(2, 3, 8, 8), tmp_path / "m.onnx", dynamic={"x": [2, 3]})


def test_sizes_at_which_the_code_changes_are_kept(tmp_path: Path) -> None:
    file, model = export(Chooses(), torch.ones(3, 4), tmp_path / "m.onnx", dynamic={"x": [1]}), Chooses()
    assert file.facts["largest"] == {"batch": 20, "x_1": 8} and "`x_1` of up to 8" in str(file)
    module = RuntimeModule(file.path)
    assert module(torch.ones(20, 8)).equal(model(torch.ones(20, 8)))
    for size, words in (((21, 8), "`batch` must be at most 20"), ((2, 9), "`x_1` must be at most 8")):
        with pytest.raises(CompressionError, match=words):
            module(torch.ones(size))


def test_facts_that_lack_what_a_call_needs_are_refused(tmp_path: Path) -> None:
    file = export(LINEAR, torch.ones(2, 3), tmp_path / "m.onnx", verify=False)
    facts = {name: value for name, value in file.facts.items() if name != "call"}
    (tmp_path / "m.onnx.json").write_text(json.dumps(facts))
    with pytest.raises(CompressionError, match="m.onnx.json beside it can't be read"):
        RuntimeModule(file.path)
