"""House rules that stand in the imports and the file names."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightning_compress"
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

# The files that decide when things happen; all others compute on tensors and run without a Trainer.
MAY_IMPORT_LIGHTNING = {
    "callback.py",
    "probe.py",
    "window.py",
    "cli.py",
    "channels/callback.py",
    "pruning/callback.py",
    "quantization/qat.py",
    "quantization/lora/qlora.py",
    "quantization/ptq.py",
    "distillation/callback.py",
    "distillation/module.py",
    "distillation/callback_base.py",
    "report/callback.py",
}
# Other third parties beside torch, each where it belongs and nowhere else.
MAY_ALSO_IMPORT = {
    "__init__.py": {"lazy_loader"},
    "cli.py": {"jsonargparse"},
    "report/plots.py": {"matplotlib"},
    "report/sparsity_plot.py": {"matplotlib"},
    "report/compare.py": {"rich"},
    "report/render.py": {"rich"},
    "report/files.py": {"rich"},
    "distillation/teacher_check.py": {"torchmetrics"},
    "quantization/ptq.py": {"tqdm"},
    "quantization/static/flows/pt2e.py": {"torchao"},
    "quantization/layers/fake_quantizers.py": {"torchao"},
}
DRAWERS = {"utils", "util", "helpers", "helper", "common", "misc"}


def third_parties(source: str) -> set[str]:
    """Top-level names that `source` imports anywhere, less the standard library and this package."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(str(node.module).partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"lightning_compress"}


def allowed(file: str) -> set[str]:
    lightning = {"lightning"} if file in MAY_IMPORT_LIGHTNING else set()
    return {"torch"} | lightning | MAY_ALSO_IMPORT.get(file, set())


@pytest.mark.parametrize("file", FILES)
def test_imports_only_what_its_room_may(file: str) -> None:
    source = (PACKAGE / file).read_text()
    assert third_parties(source) <= allowed(file)


@pytest.mark.parametrize("file", FILES)
def test_no_star_imports(file: str) -> None:
    nodes = ast.walk(ast.parse((PACKAGE / file).read_text()))
    assert [
        alias for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names if alias.name == "*"
    ] == []


@pytest.mark.parametrize("root", ["lightning_compress", "tests", "examples", "benchmarks"])
def test_no_drawers(root: str) -> None:
    paths = [path.relative_to(PACKAGE.parent) for path in (PACKAGE.parent / root).rglob("*.py")]
    assert [path for path in paths if DRAWERS & {part.removesuffix(".py") for part in path.parts}] == []


def test_reads_every_kind_of_import() -> None:
    source = (
        "import os, numpy.linalg as la\ndef f():\n    from lightning.pytorch import Trainer\nfrom . import torchao\n"
    )
    assert third_parties(source) == {"numpy", "lightning"}


@pytest.mark.slow
def test_any_file_can_be_imported_first() -> None:
    """Public names are imported when they are used, in any order: a circle of imports would show only to some."""
    code = """
import os, sys, torch, lightning.pytorch, torchao
for name in sys.argv[1:]:
    child = os.fork()
    if not child:
        __import__(name)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"{name} can't be imported first")
"""
    names = [f"lightning_compress.{file.removesuffix('.py').replace('/', '.')}" for file in FILES]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, *names], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
