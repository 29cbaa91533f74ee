"""The two flows: what each quantizes of the zoo and why not, what they leave alone, and what they export."""

from __future__ import annotations

import ast
import functools
import importlib
import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import lightning_compress
from lightning_compress import (
    CompressionError,
    PostTrainingQuantization,
    Targets,
    load_compressed,
    quantize,
    save_compressed,
)
from lightning_compress.quantization.convert import record_of
from tests.quantization.test_quantize import agreement, batches
from tests.support.data import TinyData
from tests.support.foreign import FOREIGN, foreign
from tests.support.modules import Classifier, ZooModule, quiet_trainer
from tests.support.oracles import assert_same_state, described, same_random_state, snapshot
from tests.support.zoo import ZOO, Row, row

FLOWS = ["fx", "pt2e"]
REPOSITORY = Path(__file__).parents[2]
uncompiled = functools.partial(torch.compiler.set_stance, "force_eager")
"""A new one each time: made, it takes hold at once. Inductor takes ten seconds a model; one slow test is for it."""


def kernel(kind: str, dynamic: bool = False) -> str:
    remedy = " (`overrides` can give it int8_dynamic)" if dynamic else ""
    return f"no static int8 kernel for {kind}{remedy}"


def times(name: str) -> str:
    return f"`{name}` takes it as a weight, for which there is no static int8 kernel"


UNSEEN = "`mixed` computes with it, which torch.fx doesn't see into; flow='pt2e' may"
TIED = "its weight is tied to `embedding`, which stays float"
# Row: what flow fx leaves in float, then what pt2e does; rows that aren't here are int8 as a whole in both.
FLOATS: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "attention": ({"theirs": kernel("MultiheadAttention", True)}, {}),
    "transformer": (
        {"0": kernel("TransformerEncoderLayer", True), "0.self_attn": kernel("MultiheadAttention", True)},
        {},
    ),
    "lstm": ({"rnn": kernel("LSTM", True)}, {"rnn": kernel("LSTM", True)}),
    "gru": ({"rnn": kernel("GRU", True)}, {"rnn": kernel("GRU", True)}),
    "tied": ({"lm_head": TIED, "embedding": kernel("Embedding")},) * 2,
    "auxiliary_head": ({"auxiliary": "the first batch doesn't call it"},) * 2,
    "integers": ({"words": kernel("Embedding"), "places": kernel("Embedding")},) * 2,
    "own_parameters": ({"mixed": times("matmul"), "last": UNSEEN}, {"mixed": times("matmul")}),
}


def resized(inputs: Any, size: int) -> Any:
    """The same inputs with another batch size; the zoo's batches are of four, but for `keyword_only`'s two of them."""

    def resize(leaf: Any) -> Any:
        return torch.cat([leaf] * 3)[:size] if isinstance(leaf, Tensor) and len(leaf) == 4 else leaf

    return pytree.tree_map(resize, inputs)


TABLES = {"windows": {f"blocks.{block}.{name}" for block in (0, 1) for name in ("table", "gamma")}}
"""Float matrices that are no weights: they are added or looked up in."""


def matrices(int8: nn.Module) -> set[str]:
    """Names of the float matrices of an int8 model."""
    return {
        key.removeprefix("_traced_forward.graph.").removeprefix("graph.module.")
        for key, value in int8.state_dict().items()
        if isinstance(value, Tensor) and value.dtype == torch.float32 and value.dim() > 1
    }


def untold(int8: nn.Module) -> set[str]:
    """Names of the float matrices of an int8 model that its record doesn't name."""
    floats = (record_of(int8) or {})["floats"]
    return {name for name in matrices(int8) if not any(f"{name}.".startswith(f"{path}.") for path in floats)}


@pytest.mark.parametrize(
    ("row", "flow"),
    [
        pytest.param(row, flow, id=f"{row}-{flow}")
        for row in (*ZOO, *FOREIGN)
        for flow in ("auto", "pt2e")
        if (row.name, flow) != ("numbers", "pt2e")  # an export can't take it
    ],
)
def test_the_table_of_what_each_flow_quantizes_and_why_not_and_its_files(
    row: Row, flow: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, calibration = row.build(), batches(row, 3)
    before = snapshot(model)
    with uncompiled():
        with caplog.at_level(logging.INFO, "lightning_compress"):
            int8 = quantize(model, calibration=calibration, flow=flow)  # type: ignore[arg-type]
        assert "'pt2e' can" not in caplog.text  # auto takes it where fx can't alone
        record = record_of(int8) or {}
        assert [(unit["path"], unit["flow"]) for unit in record["units"]] == [("", "fx" if flow == "auto" else flow)]
        assert record["floats"] == FLOATS.get(row.name, ({}, {}))[flow == "pt2e"]
        assert record["layers"] == []
        assert untold(int8) == TABLES.get(row.name, set())
        assert_same_state(before, model)
        model.eval(), int8.eval()
        save_compressed(int8, str(tmp_path / "int8.ckpt"))
        loaded = load_compressed(str(tmp_path / "int8.ckpt"), row.build(seed=1)).eval()
        for size in (4, 1, 2, 7):
            args, kwargs = resized(row.inputs(0), size)
            expected, got = model(*args, **kwargs), int8(*args, **kwargs)
            assert_same_state({"output": got}, {"output": loaded(*args, **kwargs)})
            assert described(got) == described(expected)
            assert agreement(expected, got) > 0.98, size


@pytest.mark.parametrize("flow", FLOWS)
def test_what_is_excluded_stays_float_whoever_uses_its_weight(flow: str) -> None:
    # A layer with a forward of its own, a matrix of a module around layers, and weights that are read and computed.
    own, reading = foreign("own_parameters"), foreign("reading")
    computed = foreign("computed_weights")
    with uncompiled():
        for row, exclude in ((computed, ["0", "6"]), (reading, ["qkv", "body"]), (own, ["rest"])):
            targets = Targets(exclude=exclude)
            int8 = quantize(row.build(), calibration=batches(row, 1), targets=targets, flow=flow)  # type: ignore[arg-type]
            floats, left = (record_of(int8) or {})["floats"], matrices(int8)
            assert {path: floats[path] for path in exclude} == dict.fromkeys(exclude, "excluded")
            assert all(any(name.startswith(path) for name in left) for path in exclude)
            args, kwargs = row.inputs(0)
            assert agreement(row.build().eval()(*args, **kwargs), int8(*args, **kwargs)) > 0.98


@pytest.mark.parametrize("flow", FLOWS)
def test_a_flow_draws_nothing_from_the_global_generators(flow: str) -> None:
    model, x = row("mlp").build(), torch.randn(8, 16)
    with uncompiled(), same_random_state():
        quantize(model, calibration=[x], flow=flow)(x)  # type: ignore[arg-type]


class Functional(nn.Module):
    """Reads its layers' weights, calls none of them, and checks its input: fx sees no layer, an export does."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 16:
            raise ValueError("16 features")
        return F.linear(F.linear(x, self.body.weight, self.body.bias).relu(), self.head.weight, self.head.bias)


class FunctionalModule(Classifier):
    def __init__(self) -> None:
        super().__init__()
        del self.body, self.norm, self.head
        self.net = Functional()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_auto_falls_back_to_pt2e_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, x = Functional().eval(), torch.randn(64, 16)
    with uncompiled(), caplog.at_level(logging.INFO, "lightning_compress"):
        int8 = quantize(model, calibration=[x])
        assert agreement(model(x), int8(x)) > 0.99
    assert not torch.equal(model(x), int8(x))
    assert [unit["flow"] for unit in (record_of(int8) or {})["units"]] == ["pt2e"]
    [line] = [entry.getMessage() for entry in caplog.records if entry.name == "lightning_compress"]
    assert "'fx' can quantize nothing here, 'pt2e' can" in line


def test_in_a_trainer_auto_falls_back_too_and_the_float_model_comes_back(caplog: pytest.LogCaptureFixture) -> None:
    module, data = FunctionalModule(), TinyData()
    before = snapshot(module)
    floats = quiet_trainer().test(module, data, verbose=False)[0]["test_loss"]
    ptq = PostTrainingQuantization()
    with uncompiled(), caplog.at_level(logging.INFO, "lightning_compress"):
        loss = quiet_trainer(callbacks=[ptq]).test(module, data, verbose=False)[0]["test_loss"]
    assert loss == pytest.approx(floats, rel=0.05) and loss != floats
    assert "pt2e" in caplog.text
    assert any("compiled by inductor" in note for note in ptq.report_notes())
    assert_same_state(before, module)
    quiet_trainer().fit(module, data)


@pytest.mark.parametrize("inference_mode", [True, False])
def test_the_explicit_flow_pt2e_in_a_trainer(inference_mode: bool) -> None:
    # The last batch of test and calibration is of another size; dropout and BatchNorm stay in evaluation.
    torch.manual_seed(0)
    module, data = Classifier(), TinyData(samples=17)
    quiet_trainer(max_epochs=3).fit(module, TinyData())
    before = snapshot(module)
    floats = quiet_trainer().test(module, data, verbose=False)[0]
    trainer = quiet_trainer(inference_mode=inference_mode, callbacks=[PostTrainingQuantization(flow="pt2e")])
    with uncompiled():
        metrics = trainer.test(module, data, verbose=False)[0]
        assert metrics["test_loss"] == pytest.approx(floats["test_loss"], rel=0.05)
        assert metrics != floats
        assert trainer.test(module, data, verbose=False)[0] == metrics
    assert_same_state(before, module)
    trainer.fit(module, TinyData())
    assert not any(torch.equal(before[name], parameter) for name, parameter in module.named_parameters())


@pytest.mark.parametrize("flow", FLOWS)
def test_calibrated_one_sample_at_a_time(flow: str) -> None:
    model, x = row("conv_bn_relu").build().eval(), torch.randn(8, 3, 8, 8)
    with uncompiled():
        int8 = quantize(model, calibration=list(x.split(1)), flow=flow)  # type: ignore[arg-type]
        assert agreement(model(x), int8(x)) > 0.98
        assert agreement(model(x[:1]), int8(x[:1])) > 0.98


@pytest.mark.parametrize("flow", FLOWS)
def test_images_of_other_sizes_than_the_calibrated(flow: str) -> None:
    model = row("conv_bn_relu").build().eval()
    with uncompiled():
        int8 = quantize(model, calibration=[torch.randn(4, 3, 8, 8)], flow=flow)  # type: ignore[arg-type]
        x = torch.randn(3, 3, 12, 20)
        assert agreement(model(x), int8(x)) > 0.98


@pytest.mark.parametrize("flow", FLOWS)
def test_dropout_stays_off_in_int8_whatever_the_mode(flow: str) -> None:
    # torchao's own train/eval switch resets dropout to p=0.5 and BatchNorm's momentum and eps.
    model = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32, eps=0.1), nn.ReLU(), nn.Dropout(0.9), nn.Linear(32, 4))
    x = torch.randn(64, 16)
    for _ in range(3):
        model(x)
    with uncompiled():
        int8 = quantize(model, calibration=[x], flow=flow)  # type: ignore[arg-type]
        expected = model.eval()(x)
        assert agreement(expected, int8.eval()(x)) > 0.99
        assert torch.equal(int8.eval()(x), int8.train()(x))


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("scheme", ["int8_dynamic", "int8_weight_only"])
@pytest.mark.parametrize("make", [quantize, PostTrainingQuantization], ids=["quantize", "callback"])
def test_a_flow_is_refused_for_schemes_that_work_layer_by_layer(make: Any, scheme: str, flow: str) -> None:
    arguments = (row("mlp").build(),) if make is quantize else ()
    with pytest.raises(CompressionError, match="`flow` must be 'auto' for a scheme that works layer by layer"):
        make(*arguments, scheme, flow=flow)


def test_a_mistyped_flow_lists_the_flows() -> None:
    with pytest.raises(CompressionError, match="`flow` must be one of auto, fx, pt2e.*'pt3e'.*Nearest: pt2e"):
        quantize(row("mlp").build(), calibration=[torch.zeros(4, 16)], flow="pt3e")  # type: ignore[arg-type]


# Files.


def child(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh Python that runs ``script``."""
    paths = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
    )


LOAD = """
import sys, torch
from lightning_compress import load_compressed
from tests.support.modules import ZooModule
from tests.support.oracles import snapshot
from tests.support.zoo import row
torch.set_num_threads(1)
found = {}
with torch.compiler.set_stance("force_eager"):
    for path in sys.argv[2:]:
        name = path.rpartition("/")[2].partition("-")[0]
        module = ZooModule(row(name))
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.fill_(3.0)  # nothing of the fresh module may be left
        module = load_compressed(path, module).eval()
        args, kwargs = row(name).inputs(7)
        found[path] = {"state": snapshot(module), "output": module(*args, **kwargs)}
torch.save(found, sys.argv[1])
"""

FILES = [
    ("conv_bn_relu", "int8_static", "pt2e"),
    ("depthwise", "int8_static", "fx"),
    ("keyword_only", "int8_static", "fx"),
    ("attention", "int8_static", "pt2e"),
    ("lstm", "int8_static", "fx"),
    ("transformer", "int8_dynamic", "auto"),
    ("grouped", "int8_weight_only", "auto"),
]


@pytest.mark.slow
def test_int8_files_load_bit_equal_in_a_fresh_process(tmp_path: Path) -> None:
    # Q23. `load_compressed` reads with weights_only=True.
    expected = {}
    for name, scheme, flow in FILES:
        path, module = tmp_path / f"{name}-{scheme}-{flow}.ckpt", ZooModule(row(name))
        trainer = quiet_trainer(callbacks=[PostTrainingQuantization(scheme, flow=flow, keep=True)])  # type: ignore[arg-type]
        with uncompiled():
            trainer.test(module, verbose=False)
            trainer.save_checkpoint(path)
            args, kwargs = row(name).inputs(7)
            expected[str(path)] = {"state": snapshot(module), "output": module.eval()(*args, **kwargs)}
    run = child(LOAD, str(tmp_path / "found.pt"), *expected)
    assert run.returncode == 0, run.stderr
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of quantized tensors' storages
        found = torch.load(tmp_path / "found.pt", weights_only=False)
    assert found.keys() == expected.keys()
    for path, wanted in expected.items():
        assert_same_state(wanted, found[path])


def test_an_int8_file_of_pt2e_is_tested_with_ckpt_path_and_refuses_to_train(tmp_path: Path) -> None:
    module, data, path = Classifier(), TinyData(), tmp_path / "int8.ckpt"
    trainer = quiet_trainer(callbacks=[PostTrainingQuantization(flow="pt2e", keep=True)])
    with uncompiled():
        expected = trainer.test(module, data, verbose=False)
        trainer.save_checkpoint(path)
        ours = quiet_trainer(callbacks=[PostTrainingQuantization(flow="pt2e")])
        assert ours.test(Classifier(), data, ckpt_path=path, weights_only=True, verbose=False) == expected
        loaded = load_compressed(str(path), Classifier())
        assert quiet_trainer().test(loaded, data, verbose=False) == expected
        with pytest.raises(CompressionError, match="`ckpt_path` must be a float or a prepared checkpoint"):
            quiet_trainer(callbacks=[PostTrainingQuantization()]).fit(
                Classifier(), data, ckpt_path=path, weights_only=True
            )


# What they stand on, and what they leave as it was.


def imports(file: Path) -> list[tuple[str, str]]:
    """(module, name) of every name that a file imports from an upstream that could go away."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("torch.ao", "torchao")):
            found += [(node.module or "", alias.name) for alias in node.names]
    return found


@pytest.mark.parametrize("name", ["fx", "fx_trace", "fused", "int8_graph", "pt2e"])
def test_everything_that_a_flow_takes_from_upstream_is_there(name: str) -> None:
    # Q24. torch.ao ships up to torch 2.15; torchao moves its parts about.
    file = REPOSITORY / "lightning_compress" / "quantization" / "static" / "flows" / f"{name}.py"
    wanted = imports(file)
    assert wanted
    gone = []
    for module, attribute in wanted:
        try:
            if not hasattr(importlib.import_module(module), attribute):
                gone.append(f"{module}.{attribute}")
        except ImportError:
            gone.append(f"{module}.{attribute}")
    assert not gone, (
        f"Upstream has removed {', '.join(gone)}. What replaces it is one file with the functions of `Flow` (see "
        f"flows/__init__.py) in the place of flows/{name}.py; nothing else knows of it."
    )


def test_only_the_flows_own_files_import_their_upstream() -> None:
    package = REPOSITORY / "lightning_compress"
    users = {str(file.relative_to(package)) for file in package.rglob("*.py") if imports(file)}
    flows = {f"quantization/static/flows/{name}.py" for name in ("fx", "fx_trace", "fused", "int8_graph", "pt2e")}
    assert users == flows | {"quantization/layers/fake_quantizers.py"}


REMOVED = """
import sys
sys.modules.update(dict.fromkeys({gone!r}))  # None: importing it is an ImportError
import torch
from torch import nn
import lightning_compress
net, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(6, 8)
try:
    lightning_compress.quantize(net, calibration=[x], flow={flow!r})
except lightning_compress.CompressionError as error:
    assert "`flow` must have its upstream installed" in str(error), error
else:
    raise AssertionError("it isn't gone")
lightning_compress.quantize(net, "int8_dynamic")
with torch.compiler.set_stance("force_eager"):
    lightning_compress.quantize(net, calibration=[x], flow={other!r})
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flow", "other", "gone"),
    [
        ("fx", "pt2e", ["torch.ao.quantization.quantize_fx"]),  # of the rest, torchao itself takes some
        ("pt2e", "fx", ["torchao", "torchao.quantization"]),
    ],
)
def test_without_one_upstream_the_rest_of_the_package_works(flow: str, other: str, gone: list[str]) -> None:
    run = child(REMOVED.format(gone=gone, flow=flow, other=other))
    assert run.returncode == 0, run.stderr


GLOBALS = """
import sys, warnings, logging
import torch, torch._dynamo.config, torch._inductor.config
import lightning  # has filters and loggers of its own

def backends():
    for kind in ("quantized", "mkldnn", "mkl", "nnpack", "openmp", "opt_einsum", "cudnn", "cpu"):
        module = getattr(torch.backends, kind)
        for name in dir(module):
            value = None if name.startswith("_") else getattr(module, name, None)
            if isinstance(value, (bool, int, str)):
                yield f"{kind}.{name}", value

def loggers():
    for name in ("", "lightning.pytorch", "lightning_compress", "torch", "torchao"):
        logger = logging.getLogger(name)
        yield f"logger {name}", (logger.level, logger.propagate, logger.disabled, len(logger.handlers))

def state():
    return {
        **{f"inductor.{key}": value for key, value in torch._inductor.config.get_config_copy().items()},
        **{f"dynamo.{key}": value for key, value in torch._dynamo.config.get_config_copy().items()},
        **dict(backends()), **dict(loggers()),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "filters": list(warnings.filters), "showwarning": warnings.showwarning,
        "threads": torch.get_num_threads(), "dtype": torch.get_default_dtype(), "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(), "autocast": torch.is_autocast_enabled("cpu"),
        "anomaly": torch.is_anomaly_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(), "hook": sys.excepthook,
        "disabled": logging.root.manager.disable,
    }

def compare(what):
    now = state()
    for key in before:
        assert before[key] == now[key], f"{what} changed {key}: {before[key]} -> {now[key]}"

from torch import nn
model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
x = torch.ones(4, 3, 8, 8)
before = state()
import lightning_compress
compare("importing the package")
for flow in ("fx", "pt2e"):
    with torch.compiler.set_stance("force_eager"):
        int8 = lightning_compress.quantize(model, calibration=[x], flow=flow)
        compare(f"quantizing with {flow}")
        int8(x)
        compare(f"running what {flow} made")
"""


@pytest.fixture(scope="module")
def globals_run() -> subprocess.CompletedProcess[str]:
    return child(GLOBALS)


def test_importing_and_using_the_flows_changes_no_global_flags(globals_run: Any) -> None:
    assert globals_run.returncode == 0, globals_run.stderr


def test_importing_and_using_the_flows_says_nothing(globals_run: Any) -> None:
    assert globals_run.stderr == ""


def test_logging_that_the_user_disabled_stays_disabled() -> None:
    before = logging.root.manager.disable
    try:
        logging.disable(logging.INFO)
        with uncompiled():
            quantize(row("mlp").build(), calibration=[torch.randn(4, 16)], flow="pt2e")
        assert logging.root.manager.disable == logging.INFO
    finally:
        logging.disable(before)


def test_what_another_thread_logs_meanwhile_is_not_lost(caplog: pytest.LogCaptureFixture) -> None:
    # Only upstream is to be silenced.
    import threading

    stop, said = threading.Event(), 0

    def speak() -> None:
        nonlocal said
        while not stop.wait(0.005):
            logging.getLogger("a.user").warning("heartbeat")
            said += 1

    thread = threading.Thread(target=speak)
    thread.start()
    try:
        with uncompiled():
            quantize(row("conv_bn_relu").build(), calibration=[torch.randn(4, 3, 8, 8)], flow="pt2e")
    finally:
        stop.set()
        thread.join()
    assert said > 10
    assert [entry.name for entry in caplog.records].count("a.user") == said


NOISE = """
import sys, warnings
# As `-W error::...`, but for what others than torch.ao and torchao are to blame for.
for category in (DeprecationWarning, FutureWarning, UserWarning):
    warnings.simplefilter("error", category)
warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.` is deprecated", FutureWarning)
warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers", UserWarning)
import torch
import lightning_compress as ours
from tests.support.data import TinyData
from tests.support.modules import Classifier, quiet_trainer
way, path, options = sys.argv[1], sys.argv[2], eval(sys.argv[3])
module = Classifier()
with torch.compiler.set_stance("force_eager"):
    if way == "load":
        ours.load_compressed(path, module).eval()(torch.ones(4, 16))
    elif way == "train":
        trainer = quiet_trainer(callbacks=[ours.QuantizationAwareTraining()])
        trainer.fit(module, TinyData())
        trainer.test(module, TinyData(), verbose=False)
    else:
        trainer = quiet_trainer(callbacks=[ours.PostTrainingQuantization(**options, keep=True)])
        trainer.test(module, TinyData(), verbose=False)
        trainer.save_checkpoint(path)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "options"),
    [
        ("train", {}),
        ("test", {"flow": "fx"}),
        ("test", {"flow": "pt2e"}),
        ("load", {"flow": "pt2e"}),
        ("load", {"flow": "fx"}),
        ("test", {"scheme": "int8_dynamic"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value.values()),
)
def test_no_warning_of_upstream_reaches_a_user(way: str, options: dict[str, Any], tmp_path: Path) -> None:
    # In a process of its own each, as many a warning comes only once.
    if way == "load":
        trainer = quiet_trainer(callbacks=[PostTrainingQuantization(**options, keep=True)])
        with uncompiled():
            trainer.test(Classifier(), TinyData(), verbose=False)
            trainer.save_checkpoint(tmp_path / "int8.ckpt")
    run = child(NOISE, way, str(tmp_path / "int8.ckpt"), repr(options))
    assert run.returncode == 0, run.stderr
    said = [line for line in run.stderr.splitlines() if re.search("warning|deprecated|torchao", line, re.IGNORECASE)]
    assert not said, run.stderr


# What leaves the process.

EXPORTED = ["mlp", "conv_bn_relu", "depthwise", "attention", "keyword_only", "dict"]


@pytest.mark.parametrize("name", EXPORTED)
def test_q10_an_export_computes_what_the_int8_module_does(name: str) -> None:
    (args, kwargs), model = row(name).inputs(0), row(name).build().eval()
    with uncompiled():
        int8 = quantize(model, calibration=batches(row(name), 3), flow="pt2e").eval()
        expected = int8(*args, **kwargs)
        exported = torch.export.export(int8, args, kwargs)
        got = exported.module()(*args, **kwargs)
    for a, b in zip(pytree.tree_leaves(expected), pytree.tree_leaves(got), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
    assert torch.int8 in {tensor.dtype for tensor in exported.state_dict.values()}  # not their float values
    assert not [
        name for name, tensor in exported.state_dict.items() if tensor.dtype == torch.float32 and tensor.dim() > 1
    ]


@pytest.mark.parametrize("name", ["conv_bn_relu", "attention", "keyword_only"])
def test_q17_onnxruntime_computes_what_the_int8_module_does(name: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    (args, kwargs), model = row(name).inputs(0), row(name).build().eval()
    with uncompiled():
        int8 = quantize(model, calibration=batches(row(name), 3), flow="pt2e").eval()
        expected = pytree.tree_leaves(int8(*args, **kwargs))
        torch.onnx.export(int8, args, tmp_path / "int8.onnx", kwargs=kwargs, dynamo=True, verbose=False)
    proto = onnx.load(tmp_path / "int8.onnx")
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in proto.graph.node}
    stored = {onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in proto.graph.initializer}
    assert "INT8" in stored
    session = runtime.InferenceSession(tmp_path / "int8.onnx", providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    values = [leaf.numpy() for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    outputs = session.run(None, dict(zip(names, values, strict=True)))
    for a, b in zip(expected, outputs, strict=True):
        torch.testing.assert_close(torch.from_numpy(b), a, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["conv_bn_relu", "attention"])
def test_compiled_by_inductor_it_computes_what_it_does_uncompiled(name: str, tmp_path: Path) -> None:
    torch._dynamo.reset()
    (args, kwargs), model = row(name).inputs(0), row(name).build().eval()
    int8 = quantize(model, calibration=batches(row(name), 3), flow="pt2e").eval()
    with uncompiled():
        expected = int8(*args, **kwargs)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        got = int8(*args, **kwargs)
    assert agreement(expected, got) > 0.999
    called = {event.key for event in profile.key_averages()}
    assert any("qconv" in one or "qlinear" in one for one in called), called
    for size in (1, 7):
        args, kwargs = resized(row(name).inputs(1), size)
        assert agreement(model(*args, **kwargs), int8(*args, **kwargs)) > 0.98
    with torch.inference_mode():
        assert agreement(model(*args, **kwargs), int8(*args, **kwargs)) > 0.98
    assert_same_state(quantize(model, calibration=batches(row(name), 3), flow="pt2e"), int8)


def test_lightning_compress_is_imported_from_this_tree() -> None:
    # The subprocesses above test what this process does.
    assert Path(lightning_compress.__file__).parents[1] == REPOSITORY
