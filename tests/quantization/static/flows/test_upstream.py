"""What flows stand on, and what they leave as it was."""

from __future__ import annotations

import ast
import importlib
import logging
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_compress
from lightning_compress import (
    PostTrainingQuantization,
    quantize,
)
from tests.quantization.static.flows.children import REPOSITORY, child, uncompiled
from tests.support.data import TinyData
from tests.support.modules import Classifier, quiet_trainer
from tests.support.zoo import row

# What they stand on, and what they leave as it was.


def imports(file: Path) -> list[tuple[str, str]]:
    """(module, name) of every name that a file imports from an upstream that could go away."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("torch.ao", "torchao")):
            found += [(node.module or "", alias.name) for alias in node.names]
    return found


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torchao's own, where nothing has imported it yet
@pytest.mark.parametrize("name", ["fx", "fx_qparams", "int8_graph", "pt2e"])
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
        f"flows/flow.py) in the place of flows/{name}.py; nothing else knows of it."
    )


def test_only_the_flows_own_files_import_their_upstream() -> None:
    package = REPOSITORY / "lightning_compress"
    users = {str(file.relative_to(package)) for file in package.rglob("*.py") if imports(file)}
    flows = {f"quantization/static/flows/{name}.py" for name in ("fx", "fx_qparams", "int8_graph", "pt2e")}
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
    said = [line for line in globals_run.stderr.splitlines() if line != "quantize:" and "slower than float" not in line]
    assert not said  # but for the time that it takes here


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


def test_lightning_compress_is_imported_from_this_tree() -> None:
    # The subprocesses above test what this process does.
    assert Path(lightning_compress.__file__).parents[1] == REPOSITORY
