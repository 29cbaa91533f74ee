"""The rules of the house that stand in the imports and in the names of files."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_compress"
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

# From the ground up. A file imports from its own room and from the floors below it.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "messages", "whole_file"),
    ("modules", "schedules", "window", "saved_state"),
    ("targets", "structure", "compensation", "settings"),
    ("silent_copy", "twin", "probe", "calibration", "callback_order", "callback", "windowed_callback"),
    ("pruning", "channels", "quantization"),
    ("distillation",),
    ("deployable",),
    ("report",),
    ("export",),
    ("choosing",),
    ("cli", "commands", "command_errors", "__init__", "__main__"),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Where rooms of one floor may import each other. The techniques, on floor 4, may not. Nowhere do folders form a circle.
BESIDE = {1, 2, 3, FLOOR["cli"]}
# The imports that stand in a function.
INSIDE = {
    ("__main__.py", "report/command.py"),
    ("__main__.py", "cli.py"),  # Lightning takes seconds to import, and `--help` is answered before that
}
# The files that import what a string names.
BY_NAME = {
    "structure/change.py",  # the changes of structure, whose rooms stand above
    "pruning/recipe.py",  # a user's own pruning method
    "channels/planning/importance.py",  # a user's own importance
    "quantization/schemes.py",  # a user's own scheme
    "export/runtimes.py",  # runtimes and their tools, which extras install
    "export/onnx_file.py",
    "export/executorch_file.py",
    "export/tensorrt_rules.py",
}

# The files that decide when things happen; all others compute on tensors and run without a Trainer.
MAY_IMPORT_LIGHTNING = {
    "calibration.py",
    "callback.py",
    "callback_order.py",
    "commands.py",
    "silent_copy.py",
    "probe.py",
    "window.py",
    "windowed_callback.py",
    "cli.py",
    "channels/callback.py",
    "pruning/callback.py",
    "pruning/masking.py",
    "pruning/post_training.py",
    "pruning/trainer.py",
    "quantization/qat.py",
    "quantization/qlora.py",
    "quantization/ptq.py",
    "quantization/trainer.py",
    "quantization/guarded.py",
    "distillation/callback.py",
    "distillation/module.py",
    "distillation/callback_base.py",
    "report/callback.py",
    "export/callback.py",
    "choosing/validation.py",
    "choosing/commands.py",
    "choosing/guard.py",
    "choosing/phases.py",
}
# Third parties other than torch and `typing_extensions`, each where it belongs and nowhere else.
MAY_ALSO_IMPORT = {
    "__init__.py": {"lazy_loader"},
    "cli.py": {"jsonargparse"},
    "report/plots.py": {"matplotlib"},
    "report/sparsity_plot.py": {"matplotlib"},
    "report/compare.py": {"rich"},
    "report/render.py": {"rich"},
    "report/files.py": {"rich"},
    "report/loggers.py": {"matplotlib"},
    "distillation/teacher_check.py": {"torchmetrics"},
    "calibration.py": {"tqdm"},
    "choosing/sensitivity.py": {"tqdm"},
    "choosing/plots.py": {"matplotlib"},
    "quantization/layers/fake_quantizers.py": {"torchao"},
}
DRAWERS = {"utils", "util", "helpers", "helper", "common", "misc"}


def statements(node: ast.AST, inside: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Yield all statements below `node`, each with whether it stands in a function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):
            yield child, inside
            yield from statements(child, inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))


def imports(source: str, file: str) -> Iterator[tuple[str, bool]]:
    """Yield the dotted names that `source` imports anywhere, each with whether that is in a function."""
    folders = ["lightning_compress", *file.split("/")[:-1]]
    for node, inside in statements(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = folders[: len(folders) + 1 - node.level] if node.level else []
            module = ".".join([*start, *filter(None, [node.module])])
            yield from ((f"{module}.{alias.name}", inside) for alias in node.names)


@cache
def imports_of(file: str) -> tuple[tuple[str, bool], ...]:
    return tuple(imports((PACKAGE / file).read_text(), file))


def own_file(name: str) -> str:
    """The file of this package that a dotted name stands for or comes from; empty for a name of somebody else."""
    parts = name.split(".")
    if parts[0] != "lightning_compress":
        return ""
    paths = ("/".join(parts[1:end]) for end in range(len(parts), 0, -1))
    return next(
        file
        for path in paths
        for file in (f"{path}.py", f"{path}/__init__.py".lstrip("/"))
        if (PACKAGE / file).exists()
    )


def own_imports() -> dict[tuple[str, str], bool]:
    """The arrows from file to file, each with whether it stands in a function."""
    arrows: dict[tuple[str, str], bool] = {}
    for file in FILES:
        for name, inside in imports_of(file):
            if imported := own_file(name):
                arrows[file, imported] = inside or arrows.get((file, imported), False)
    return arrows


def room(file: str) -> str:
    return file.split("/")[0].removesuffix(".py")


def folder(file: str) -> str:
    """The folder of a file; a file of the package's root stands for itself."""
    return file.rpartition("/")[0] or file


def reached(arrows: Iterable[tuple[str, str]]) -> Mapping[str, set[str]]:
    """For each start of an arrow all that it leads to, by way of others too."""
    found: dict[str, set[str]] = defaultdict(set)
    for start, end in arrows:
        found[start].add(end)
    for start in list(found):
        ahead = list(found[start])
        while ahead:
            new = found.get(ahead.pop(), set()) - found[start]
            found[start] |= new
            ahead += new
    return found


def faults(arrows: Mapping[tuple[str, str], bool]) -> dict[tuple[str, str], str]:
    """The arrows that break a rule, each with the rule."""
    files = reached(arrow for arrow in arrows if arrow not in INSIDE)
    folders = reached((folder(file), folder(imported)) for file, imported in arrows if folder(file) != folder(imported))
    broken = {}
    for (file, imported), inside in arrows.items():
        here, there = room(file), room(imported)
        if FLOOR[there] > FLOOR[here]:
            broken[file, imported] = "goes up"
        elif here != there and FLOOR[there] == FLOOR[here] and FLOOR[here] not in BESIDE:
            broken[file, imported] = "goes beside"
        elif folder(file) != folder(imported) and folder(file) in folders.get(folder(imported), ()):
            broken[file, imported] = "is in a circle of folders"
        elif file in files.get(imported, ()) and (file, imported) not in INSIDE:
            broken[file, imported] = "is in a circle of files"
        elif inside and (file, imported) not in INSIDE:
            broken[file, imported] = "stands in a function"
    return broken


def third_parties(imported: Iterable[tuple[str, bool]]) -> set[str]:
    """Top-level names of what is imported, less the standard library and this package."""
    names = {name.partition(".")[0] for name, _ in imported}
    return names - set(sys.stdlib_module_names) - {"lightning_compress"}


def test_every_room_has_its_floor() -> None:
    assert {room(file) for file in FILES} == set(FLOOR)


def test_contributing_has_every_room_on_its_floor() -> None:
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE)
    told = {name: int(floor) for floor, names in rows for name in re.findall(r"`(\w+)/?`", names)}
    assert told == {name: FLOOR[name] for name in map(room, FILES)}


def test_no_arrow_goes_up_and_none_goes_in_a_circle() -> None:
    assert faults(own_imports()) == {}


def test_what_is_allowed_inside_a_function_stands_there() -> None:
    arrows = own_imports()
    assert {arrow for arrow in INSIDE if arrows.get(arrow)} == INSIDE


def test_what_is_imported_by_its_name_is_listed() -> None:
    callers = {file for file in FILES if re.search(r"\b(import_module|__import__)\(", (PACKAGE / file).read_text())}
    assert callers == BY_NAME


def test_imports_what_the_tables_say() -> None:
    found = {file: third_parties(imports_of(file)) - {"torch", "typing_extensions"} for file in FILES}
    lightning = {file: MAY_ALSO_IMPORT.get(file, set()) | {"lightning"} for file in MAY_IMPORT_LIGHTNING}
    assert {file: names for file, names in found.items() if names} == MAY_ALSO_IMPORT | lightning


def test_no_star_imports() -> None:
    stars = [file for file in FILES for name, _ in imports_of(file) if name.endswith(".*")]
    assert stars == []


@pytest.mark.parametrize("root", ["lightning_compress", "tests", "examples", "benchmarks"])
def test_no_drawers(root: str) -> None:
    paths = [path.relative_to(PACKAGE.parent) for path in (PACKAGE.parent / root).rglob("*.py")]
    assert [path for path in paths if DRAWERS & {part.removesuffix(".py") for part in path.parts}] == []


def test_reads_every_kind_of_import() -> None:
    source = """
import os, numpy.linalg as la, lightning_compress
from . import torchao
from .. import probe
from ..modules.paths import module_at
try:
    from lightning_compress import errors, Targets
except ImportError:
    pass
if TYPE_CHECKING:
    import lightning_compress.pruning.masks as masks
class Late:
    async def run(self):
        def inner():
            from lightning.pytorch import Trainer
            from lightning_compress.quantization import *
"""
    imported = list(imports(source, "channels/callback.py"))
    found = [(file, inside) for name, inside in imported if (file := own_file(name))]
    assert sorted(found) == [
        ("__init__.py", False),
        ("__init__.py", False),
        ("channels/__init__.py", False),
        ("errors.py", False),
        ("modules/paths.py", False),
        ("probe.py", False),
        ("pruning/masks.py", False),
        ("quantization/__init__.py", True),
    ]
    assert third_parties(imported) == {"numpy", "lightning"}


@pytest.mark.parametrize(
    ("arrows", "expected"),
    [
        ([("pruning/a.py", "modules/b.py"), ("pruning/a.py", "pruning/b.py"), ("window.py", "modules/b.py")], {}),
        ([("modules/a.py", "probe.py")], {("modules/a.py", "probe.py"): "goes up"}),
        ([("pruning/a.py", "channels/b.py")], {("pruning/a.py", "channels/b.py"): "goes beside"}),
        (
            [("targets.py", "structure/a.py"), ("structure/b.py", "targets.py")],
            {
                ("targets.py", "structure/a.py"): "is in a circle of folders",
                ("structure/b.py", "targets.py"): "is in a circle of folders",
            },
        ),
        (
            [("report/a.py", "report/b.py"), ("report/b.py", "report/c.py"), ("report/c.py", "report/b.py")],
            {
                ("report/b.py", "report/c.py"): "is in a circle of files",
                ("report/c.py", "report/b.py"): "is in a circle of files",
            },
        ),
    ],
    ids=["none", "up", "beside", "folders", "files"],
)
def test_finds_every_fault(arrows: list[tuple[str, str]], expected: dict[tuple[str, str], str]) -> None:
    assert faults(dict.fromkeys(arrows, False)) == expected


def test_finds_an_import_inside_a_function() -> None:
    arrows = {("report/a.py", "report/b.py"): True, ("__main__.py", "cli.py"): True}
    assert faults(arrows) == {("report/a.py", "report/b.py"): "stands in a function"}


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
