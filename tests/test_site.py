"""The pages of the site: their code runs, what they link to and quote is there, and Sphinx builds them strictly."""

from __future__ import annotations

import ast
import inspect
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from torch import nn

import lightning_compress
from lightning_compress.cli import CompressCLI, main
from tests.choosing.nets import Labelled, Right
from tests.support.data import TinyData
from tests.support.modules import Classifier, quiet_trainer
from tests.test_examples import ROOT, Large, blocks

# Trainers as a user writes them; Lightning's hints to such users are no failure.
pytestmark = pytest.mark.filterwarnings("ignore:::lightning")

PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
PROJECT = """\
from tests.support.data import TinyData as Data
from tests.support.modules import Classifier as LitModel, Classifier as Model
from tests.test_examples import Large, Small
"""


@pytest.fixture
def project(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the pages take as given: a project that can be imported, a trained checkpoint, a teacher's weights."""
    monkeypatch.delitem(sys.modules, "my_project", raising=False)
    monkeypatch.setattr(sys, "path", [str(own_folder), *sys.path])
    Path("my_project.py").write_text(PROJECT)
    torch.save(Large().state_dict(), "large.ckpt")
    trainer = quiet_trainer(max_epochs=4)
    trainer.fit(Classifier(), TinyData())
    trainer.save_checkpoint("trained.ckpt")


def given(page: str) -> dict[str, Any]:
    """The names that a page of guides uses and doesn't make."""
    if page == "accuracy_fell":
        return {"model": Right(outliers=False), "data": Labelled()}
    if page == "ship":
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
        batches = [torch.rand(8, 3, 8, 8) for _ in range(2)]
        return {"model": model, "batches": batches, "module": Classifier(), "data": TinyData()}
    data = TinyData(400, 64) if page == "order" else TinyData()
    data.setup("fit")
    return {"LitModel": Classifier, "data": data, "torch": torch}


@pytest.mark.parametrize("page", sorted(path.stem for path in (ROOT / "docs/guides").glob("*.md")))
def test_python_of_a_guide(page: str, project: None) -> None:
    names = given(page)
    for block in blocks("python", f"docs/guides/{page}.md"):
        if 'target="executorch"' in block and not find_spec("executorch"):
            continue
        brief = block.replace("max_epochs=10", "max_epochs=4")
        exec(compile(brief, f"docs/guides/{page}.md", "exec"), names)


def template(node: ast.expr, names: dict[str, ast.expr]) -> str:
    """A pattern of what an expression that makes text can give."""
    match node:
        case ast.Constant(value=str(text)):
            return re.escape(text)
        case ast.JoinedStr(values=values):
            return "".join(template(value, names) for value in values)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return template(left, names) + template(right, names)
        case ast.Name(id=name) if name in names:
            return template(names[name], {})
    return r"[\s\S]*"


def templates() -> set[str]:
    """Patterns of all texts of the package that are longer than a word, and of the errors that `invalid` builds."""
    found = set()
    for path in (ROOT / "lightning_compress").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        assigned = [node for node in nodes if isinstance(node, ast.Assign)]
        names = {node.targets[0].id: node.value for node in assigned if isinstance(node.targets[0], ast.Name)}
        for node in nodes:
            if isinstance(node, ast.JoinedStr | ast.BinOp | ast.Constant):
                found.add(template(node, names))
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "invalid":
                name, must, _, *remedy = (template(argument, names) for argument in node.args)
                after = f" {remedy[0]}" if remedy else ""
                found.add(rf"`{name}`\ must\ {must}\.\ Received:\ {name}=[\s\S]*\.{after}")
    return {text for text in found if len(re.sub(r"\[\\s\\S\]\*|\W|Received", "", text)) > 20}


def test_each_text_of_the_troubleshooting_page_is_one_of_the_package() -> None:
    texts = [re.compile(text) for text in templates()]
    quoted = re.findall(r"^> `` ?(.*?) ?``$", (ROOT / "docs/troubleshooting.md").read_text(), flags=re.MULTILINE)
    assert len(quoted) > 30
    assert [text for text in quoted if not any(known.fullmatch(text) for known in texts)] == []


def heading_anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "benchmarks/README.md", *PAGES])
def test_what_a_page_links_to_is_there(page: str) -> None:
    path = ROOT / page
    prose = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]*))?\)", prose)
    files = {file: (path.parent / file).resolve() if file else path for file, _ in links}
    assert [file for file, target in files.items() if not target.exists()] == []
    assert [(file, name) for file, name in links if name and name not in heading_anchors(files[file])] == []


def whole(block: str) -> str:
    """A configuration of its own, of a block that may be a callback, a list of them, or a Trainer."""
    config = yaml.safe_load(block)
    if "class_path" in config:
        config = {"callbacks": [config]}
    if "callbacks" in config:
        config = {"trainer": config}
    given = {name: {"class_path": f"my_project.{kind}"} for name, kind in (("model", "LitModel"), ("data", "Data"))}
    return yaml.safe_dump(given | config)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks("yaml", page)])
def test_yaml_is_a_configuration(page: str, project: None, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    monkeypatch.setattr(CompressCLI, "_run_subcommand", lambda cli, name: built.append(cli.trainer.callbacks))
    for block in blocks("yaml", page):
        Path("config.yaml").write_text(whole(block))
        main(["fit", "--config=config.yaml", "--trainer.logger=false"])
    assert len(built) == len(blocks("yaml", page)) and all(built)


def commands(page: str) -> list[str]:
    """The commands that take a configuration; test_report_page.py runs the one that takes none."""
    lines = "".join(blocks("bash", page)).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("lightning-compress ") and " --config " in line]


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_commands_are_understood(page: str, project: None, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    monkeypatch.setattr(CompressCLI, "_run_subcommand", lambda cli, name: ran.append(name))
    Path("config.yaml").write_text(whole("trainer: {logger: false}"))
    torch.save({}, "best.ckpt")
    for command in commands(page):
        main(shlex.split(command, comments=True)[1:])
    assert ran == [command.split()[1] for command in commands(page)]


def test_the_quick_start(own_folder: Path) -> None:
    names: dict[str, Any] = {}
    for block in blocks("python", "docs/quickstart.md"):
        exec(compile(block.replace("max_epochs=", "max_steps=6, max_epochs="), "docs/quickstart.md", "exec"), names)
    assert names["logits"].shape == (5, 10) and names["small"].network[0].out_channels < 32


def test_the_drawing_has_the_hooks_in_the_order_in_which_they_run() -> None:
    class Recorder(pl.Callback):
        def __getattribute__(self, name: str) -> Any:
            if name in vars(pl.Callback) and name not in (*ran, "state_dict", "load_state_dict", "state_key"):
                ran.append(name)
            return super().__getattribute__(name)

    loop, _ = blocks("text", "docs/training_loop.md")
    for run, drawn in zip(("fit", "test"), loop.split("\n\n\n"), strict=True):
        ran: list[str] = []
        trainer = quiet_trainer(callbacks=[Recorder()], num_sanity_val_steps=0)
        getattr(trainer, run)(Classifier(), TinyData())
        hooks = re.findall(r"^│?  ?├─ (\w+)|^[├└]─ (\w+)", drawn, flags=re.MULTILINE)
        names = [inner or outer for inner, outer in hooks]
        assert len(names) > 4
        assert sorted(names, key=ran.index) == names


def test_the_pages_blocks_without_a_fit_of_their_own() -> None:
    for page in ("docs/training_loop.md", "docs/index.md"):
        names: dict[str, Any] = {"model": Classifier(), "data": TinyData()}
        for block in blocks("python", page):
            exec(compile(block, page, "exec"), names)


NAMESPACES = {
    "Lightning's `ModelPruning`": "lightning.pytorch.callbacks",
    "torch-pruning": "torch_pruning",
    "torchao": "torchao.quantization",
}


def codes_of_tables() -> Iterator[tuple[str, str]]:
    """The calls in the tables, each with the module whose names it uses: there, where it is installed, and here."""
    page = (ROOT / "docs/coming_from.md").read_text()
    for title, section in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", page, flags=re.DOTALL | re.MULTILINE):
        for there, here in re.findall(r"^\| (`.*) \| (.*) \|$", section, flags=re.MULTILINE):
            for module, cell in ((NAMESPACES.get(title), there), ("lightning_compress", here)):
                yield from ((module, code) for code in re.findall(r"`([^`]+\))`", cell) if module)


def test_the_tables_of_calls_name_what_there_is() -> None:
    public = {name: getattr(lightning_compress, name) for name in lightning_compress.__all__}
    codes = list(codes_of_tables())
    assert len(codes) > 60
    for module, code in codes:
        if module == "lightning_compress" and code[0].isupper():
            eval(code, public | {"teacher": Large()})  # a constructor checks its settings
        calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
        for call in [call for call in calls if not ast.unparse(call.func).startswith("pruner.")]:
            name = ast.unparse(call.func).removeprefix("tp.")
            home = "torchao.quantization.qat" if name == "QATConfig" else module
            parameters = inspect.signature(attrgetter(name)(import_module(home))).parameters
            assert {keyword.arg for keyword in call.keywords} <= parameters.keys(), code


@pytest.mark.parametrize("page", ["README.md", "docs/which.md", *(page for page in PAGES if "/guides/" in page)])
def test_decimal_figures_stand_in_the_benchmarks(page: str) -> None:
    measured = "".join(path.read_text() for path in (ROOT / "benchmarks").glob("*.md"))
    prose = re.sub(r"```.*?```|`[^`]*`", "", (ROOT / page).read_text(), flags=re.DOTALL)
    if page == "README.md":  # which names versions, too
        prose = "".join(re.findall(r"^\|.*\n", prose, flags=re.MULTILINE))
    figures = re.findall(r"(?<![\w.,])\d[\d,]*\.\d+(?![\w.])", prose)
    assert figures
    assert [figure for figure in figures if not re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", measured)] == []


def test_the_picture_of_runtimes_is_of_its_tables(own_folder: Path) -> None:
    script = runpy.run_path(str(ROOT / "benchmarks/runtimes_picture.py"))
    assert script["speeds"]("resnet18") == [1.94, 1.78, 5.20, 13.03]
    assert all(len(script["speeds"](network)) == 4 for network in script["NETWORKS"])
    script["draw"](own_folder / "runtimes.png")
    assert (own_folder / "runtimes.png").is_file()


def test_the_reference_has_every_public_name() -> None:
    pages = "".join(path.read_text() for path in (ROOT / "docs/api").glob("*.rst"))
    listed = re.findall(r"^\.\. auto\w+:: (\w+)$", pages, flags=re.MULTILINE)
    assert sorted(listed) == sorted(lightning_compress.__all__)


@pytest.mark.slow
def test_sphinx_builds_the_site_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="`make docs` installs it.")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs", ".", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "docs.pytorch.org" in (tmp_path / "docs/api/shared.html").read_text()
