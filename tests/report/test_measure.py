from __future__ import annotations

import copy
import gc
import json
import random
import warnings

import numpy
import pytest
import torch
from torch import Tensor, nn

from lightning_compress import quantize
from lightning_compress.errors import CompressionError
from lightning_compress.report import Measurement, measure
from lightning_compress.report.inputs import resize_batch
from lightning_compress.report.macs import count_macs
from tests.report.models import CONV_NET_MACS, CONV_NET_PARAMETERS, ConvNet, int8

FAST = {"batch_sizes": (1, 3), "max_seconds": 0.01, "threads": 1}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.output = nn.Linear(5, 7, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, token: Tensor) -> Tensor:
        return self.output(self.embedding(token))


class Caching(nn.Module):
    """A forward that changes everything that it can reach."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("grown", torch.zeros(0))
        self.register_buffer("replaced", torch.zeros(2))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        self.grown.resize_(4).fill_(1)
        self.replaced = self.replaced + 1
        self.calls += 1
        self.cache = self.linear(x)
        noise = torch.rand(()) + random.random() + numpy.random.rand()
        return self.cache + noise


def on_disk(model: nn.Module, folder) -> int:
    # Every record in the file repeats the file's name; torch takes "archive" where there is no file.
    torch.save(model.state_dict(), folder / "archive.pt")
    return (folder / "archive.pt").stat().st_size


@pytest.mark.parametrize(
    ("model", "inputs", "expected"),
    [
        (nn.Linear(10, 5), torch.ones(1, 10), 50),
        (nn.Linear(10, 5, bias=False), torch.ones(1, 7, 10), 7 * 50),
        (nn.Conv2d(3, 8, 3), torch.ones(1, 3, 8, 8), 8 * 36 * 27),
        (nn.Conv2d(8, 8, 3, groups=8), torch.ones(1, 8, 8, 8), 8 * 36 * 9),
        (nn.Conv2d(8, 4, 3, stride=2, groups=2), torch.ones(1, 8, 9, 9), 4 * 16 * 4 * 9),
        (nn.ConvTranspose2d(4, 6, 3), torch.ones(1, 4, 5, 5), 4 * 25 * 6 * 9),
        (nn.Conv1d(4, 6, 3), torch.ones(1, 4, 10), 6 * 8 * 4 * 3),
        (nn.LSTM(4, 5), torch.ones(3, 1, 4), 3 * (4 * 5 * 4 + 4 * 5 * 5)),
        (nn.BatchNorm1d(4), torch.ones(1, 4), 0),
        # in and out projections, the two products of attention for 2 heads, the two layers behind
        (
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
            torch.ones(1, 3, 8),
            3 * (8 * 24 + 8 * 8 + 2 * 8 * 16) + 2 * 2 * 3 * 3 * 4,
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
@pytest.mark.parametrize("training", [True, False])
def test_macs_are_those_counted_by_hand(model: nn.Module, inputs: Tensor, expected: int, training: bool) -> None:
    assert count_macs(model.train(training), inputs) == (expected, ())


def test_macs_are_counted_under_inference_mode_too() -> None:
    with torch.inference_mode():
        assert count_macs(nn.Linear(10, 5), torch.ones(1, 10)) == (50, ())


def test_macs_of_an_operator_without_formula_are_unknown_and_named() -> None:
    measurement = measure(nn.Bilinear(2, 3, 4), (torch.ones(1, 2), torch.ones(1, 3)), **FAST)
    assert measurement.macs is None
    assert measurement.uncounted == ("aten._trilinear",)


def test_int8_model_counts_what_its_float_form_counts(tmp_path) -> None:
    example = torch.randn(2, 3, 8, 8)
    model = ConvNet().eval()
    converted = int8(copy.deepcopy(model), example)
    before, after = measure(model, example, **FAST), measure(converted, example, **FAST)
    assert before.parameters == CONV_NET_PARAMETERS
    assert after.parameters == CONV_NET_PARAMETERS - 16, "only the folded BatchNorm leaves"
    assert before.macs == after.macs == CONV_NET_MACS
    assert after.size_bytes == on_disk(converted, tmp_path)
    assert [(layer.name, layer.dtype) for layer in after.layers] == [
        ("conv", "qint8"),
        ("depthwise", "qint8"),
        ("head", "qint8"),
    ]
    # int8 weights, float biases, and for each channel a float64 scale and an int64 zero point
    assert after.layers[0].size_bytes == 8 * 27 + 8 * 4 + 8 * 16


@pytest.mark.parametrize(("scheme", "dtype", "scale"), [("int8_static", "int8", 4), ("int8_weight_only", "8 bits", 2)])
def test_a_quantized_model_has_the_layers_of_its_float_form(scheme: str, dtype: str, scale: int, tmp_path) -> None:
    example = torch.randn(2, 3, 8, 8)
    model = ConvNet().eval()
    converted = quantize(model, scheme, calibration=[example])
    before, after = measure(model, example, **FAST), measure(converted, example, **FAST)
    assert after.parameters == before.parameters == CONV_NET_PARAMETERS and after.macs == before.macs
    assert after.size_bytes == on_disk(converted, tmp_path)
    assert [(row.name, row.type, row.parameters) for row in after.layers] == [
        (row.name, row.type, row.parameters) for row in before.layers
    ]
    assert (after.layers[0].dtype, after.layers[1].dtype) == (dtype, "float32")
    # codes, float32 biases and a scale for each channel
    assert after.layers[0].size_bytes == 8 * 27 + 8 * 4 + 8 * scale


def test_dynamic_int8_counts_linear_and_recurrent_layers() -> None:
    from torch.ao.quantization import quantize_dynamic

    linear = quantize_dynamic(nn.Sequential(nn.Linear(10, 5)), {nn.Linear})
    assert (measure(linear).parameters, count_macs(linear, torch.ones(1, 10))) == (55, (50, ()))
    lstm = quantize_dynamic(nn.Sequential(nn.LSTM(4, 5)), {nn.LSTM})
    assert measure(lstm).parameters == sum(parameter.numel() for parameter in nn.LSTM(4, 5).parameters())
    assert count_macs(lstm, torch.ones(3, 1, 4)) == (3 * 180, ())


def test_size_is_that_of_the_file(tmp_path) -> None:
    model = ConvNet()
    measurement = measure(model)
    assert measurement.size_bytes == on_disk(model, tmp_path)
    assert 0 < sum(layer.size_bytes for layer in measurement.layers) < measurement.size_bytes


# The first torch.compile of a process imports parts of torch that script themselves.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_layers_keep_their_names_inside_of_wrappers() -> None:
    inner = nn.Sequential(nn.Linear(2, 2))
    assert [layer.name for layer in measure(nn.ModuleDict({"net": torch.compile(inner)})).layers] == ["net.0"]


def test_zeros_pay_in_the_compressed_file_only() -> None:
    model = nn.Linear(200, 200)
    before = measure(model)
    with torch.no_grad():
        model.weight[:180] = 0
    after = measure(model)
    assert after.size_bytes == before.size_bytes
    assert before.compressed_bytes is not None and after.compressed_bytes is not None
    assert after.compressed_bytes < before.compressed_bytes / 4
    assert after.nonzeros == int((model.weight != 0).sum() + (model.bias != 0).sum())
    assert after.sparsity == pytest.approx(1 - after.nonzeros / 40200)


def test_tied_weights_count_once(tmp_path) -> None:
    model = Tied()
    measurement = measure(model, torch.tensor([[1, 2]]), **FAST)
    assert measurement.parameters == 35
    assert [layer.name for layer in measurement.layers] == ["embedding"]
    assert measurement.size_bytes == on_disk(model, tmp_path)


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("build", [ConvNet, Caching])
def test_measuring_leaves_no_trace(build: type[nn.Module], inference: bool) -> None:
    model = build().train()
    next(model.children()).eval()
    flags = {name: module.training for name, module in model.named_modules()}
    state = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    torch.manual_seed(1), random.seed(1), numpy.random.seed(1)
    expected = torch.rand(()), random.random(), numpy.random.rand()
    torch.manual_seed(1), random.seed(1), numpy.random.seed(1)
    shape = (2, 3, 8, 8) if isinstance(model, ConvNet) else (2, 3)
    with torch.inference_mode(inference):
        measure(model, torch.ones(shape), **FAST)
    assert (torch.rand(()), random.random(), numpy.random.rand()) == expected
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is state[name][0], name
        assert torch.equal(tensor, state[name][1]), name
    assert getattr(model, "calls", 0) == 0
    model.train()(torch.ones(shape)).sum().backward()


def test_the_flag_of_a_scripted_module_is_put_back() -> None:
    with warnings.catch_warnings():
        # torch deprecates its own scripting, and models that were scripted are still about.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)  # as torch 2.14 has it
        model = torch.jit.script(nn.Sequential(nn.Linear(3, 2), nn.Dropout())).train()
        measure(model, torch.ones(2, 3), **FAST)
    assert model.training and all(child.training for child in model.children())


def test_an_error_in_forward_leaves_no_trace() -> None:
    class Failing(Caching):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise RuntimeError("boom")

    model = Failing().train()
    with pytest.raises(RuntimeError, match="boom"):
        measure(model, torch.ones(1, 3), **FAST)
    assert model.training and model.calls == 0 and float(model.steps) == 0


def test_latency_has_a_row_for_each_batch_size() -> None:
    seen: list[int] = []
    collecting: list[bool] = []

    class Recording(nn.Module):
        def forward(self, x: Tensor, *, scale: float) -> Tensor:
            seen.append(len(x))
            collecting.append(gc.isenabled())
            assert (torch.is_inference_mode_enabled() and not self.training) or len(seen) == 1
            return x * scale

    measurement = measure(Recording(), {"x": torch.ones(2, 3), "scale": 2.0}, **FAST)
    assert [one.batch_size for one in measurement.latency] == [1, 3]
    assert set(seen) == {1, 3}
    assert collecting.count(True) == 1, "only the counting of MACs runs beside the garbage collector"
    assert gc.isenabled()
    for one in measurement.latency:
        assert one.runs >= 5
        assert 0 < one.lower_ms <= one.median_ms <= one.upper_ms
    assert set(measurement.latency_ms) == {1, 3}


def test_calls_that_something_came_in_between_do_not_count(monkeypatch) -> None:
    from lightning_compress.report import latency

    now = {"wall": 0.0, "process": 0.0}
    monkeypatch.setattr(latency.time, "perf_counter", lambda: now["wall"])
    monkeypatch.setattr(latency.time, "process_time", lambda: now["process"])

    class Preempted(nn.Module):
        def __init__(self, every: int) -> None:
            super().__init__()
            self.every, self.calls = every, []

        def forward(self, x: Tensor) -> Tensor:
            self.calls.append(x)
            now["process"] += 0.001
            # The machine does something else for 50 ms within every second call, or within each.
            now["wall"] += 0.051 if len(self.calls) % self.every == 0 else 0.001
            return x

    for every, median_ms, waited in ((2, 1.0, 0.0), (1, 51.0, 50 / 51)):
        timed = latency.measure_latency({"": (Preempted(every), {1: torch.ones(1)})}, 2.0)[""][0]
        assert (timed.median_ms, timed.waited) == (pytest.approx(median_ms), pytest.approx(waited, abs=1e-3))


def test_without_inputs_the_model_is_not_run() -> None:
    class Never(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            raise AssertionError

    measurement = measure(Never(3, 2))
    assert (measurement.parameters, measurement.macs, measurement.latency) == (8, None, ())


def test_measurement_goes_through_json() -> None:
    measurement = measure(ConvNet(), torch.ones(1, 3, 8, 8), **FAST)
    assert Measurement.from_dict(json.loads(json.dumps(measurement.as_dict()))) == measurement


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert measure(nn.Linear(2, 2), torch.ones(1, 2), **FAST).threads == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"batch_sizes": ()}, "batch_sizes"),
        ({"batch_sizes": (0,)}, "batch_sizes"),
        ({"batch_sizes": (True,)}, "batch_sizes"),
        ({"max_seconds": 0.0}, "max_seconds"),
        ({"max_seconds": float("nan")}, "max_seconds"),
        ({"threads": 0}, "threads"),
    ],
)
def test_bad_settings_are_named(settings: dict, name: str) -> None:
    with pytest.raises(CompressionError, match=rf"`{name}` must .* Received: {name}="):
        measure(nn.Linear(2, 2), torch.ones(1, 2), **settings)


@pytest.mark.parametrize("inputs", ["text", {}, torch.tensor(1.0), torch.ones(0, 2)])
def test_inputs_without_a_batch_are_refused(inputs) -> None:
    with pytest.raises(CompressionError, match="`example_inputs` must"):
        measure(nn.Linear(2, 2), inputs)


def test_lazy_layers_are_refused() -> None:
    with pytest.raises(CompressionError, match="`model` must have a shape"):
        measure(nn.LazyLinear(2))


def test_resize_batch_keeps_what_is_no_batch() -> None:
    table, flag = torch.ones(5, 5), "mean"
    x, (kept, same), scalar = resize_batch((torch.arange(2), [table, flag], torch.tensor(3)), 5)
    assert x.tolist() == [0, 1, 0, 1, 0]
    assert kept is table and same is flag and scalar.item() == 3
