"""What a release holds: the wheel, the source distribution, their metadata, and one version everywhere."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
import yaml

import lightning_compress

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERSION = lightning_compress.__version__
FILES = {
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "lightning_compress").rglob("*")
    if path.is_file() and path.suffix != ".pyc"
}
BESIDE = ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "MANIFEST.in")
BUILD = "from setuptools import build_meta; build_meta.build_sdist('dist'); build_meta.build_wheel('dist')"


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of both distributions, built from a copy: a build leaves files beside its sources."""
    folder = tmp_path_factory.mktemp("release")
    unwanted = shutil.ignore_patterns("__pycache__")
    for name in ("lightning_compress", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=unwanted)
    for name in BESIDE:
        shutil.copy(ROOT / name, folder)
    subprocess.run([sys.executable, "-c", BUILD], cwd=folder, check=True, capture_output=True)
    return folder / "dist"


def metadata(wheel: zipfile.ZipFile) -> Message:
    return Parser().parsestr(wheel.read(f"lightning_compress-{VERSION}.dist-info/METADATA").decode())


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(dist: Path) -> None:
    with zipfile.ZipFile(dist / f"lightning_compress-{VERSION}-py3-none-any.whl") as wheel:
        info = f"lightning_compress-{VERSION}.dist-info"
        assert "lightning_compress/py.typed" in FILES
        about = {f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt")}
        assert set(wheel.namelist()) == FILES | about | {f"{info}/licenses/LICENSE"}
        assert (
            "lightning-compress = lightning_compress.__main__:main" in wheel.read(f"{info}/entry_points.txt").decode()
        )


@pytest.mark.slow
def test_the_source_distribution_holds_what_a_build_needs(dist: Path) -> None:
    with tarfile.open(dist / f"lightning_compress-{VERSION}.tar.gz") as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert FILES | set(BESIDE) <= names
    assert {name.partition("/")[0] for name in names if "/" in name} == {
        "lightning_compress",
        "lightning_compress.egg-info",
    }


@pytest.mark.slow
def test_the_metadata_say_what_the_project_says(dist: Path) -> None:
    with zipfile.ZipFile(dist / f"lightning_compress-{VERSION}-py3-none-any.whl") as wheel:
        told = metadata(wheel)
    assert (told["Name"], told["Version"], told["Requires-Python"]) == ("lightning-compress", VERSION, ">=3.11")
    assert (told["License-Expression"], told["License-File"]) == ("Apache-2.0", "LICENSE")
    assert told.get_all("Classifier") == PROJECT["classifiers"] and "Typing :: Typed" in PROJECT["classifiers"]
    assert set(told.get_all("Provides-Extra", [])) == set(PROJECT["optional-dependencies"])
    assert len([need for need in told.get_all("Requires-Dist", []) if "extra" not in need]) == len(
        PROJECT["dependencies"]
    )
    assert told.get_payload() == (ROOT / "README.md").read_text()


def test_the_version_stands_at_the_head_of_the_changelog() -> None:
    released = re.findall(r"^## \[(\d.*?)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert released[0] == VERSION
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == VERSION


def test_extras_that_texts_name_are_there() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "lightning_compress").rglob("*.py")]
    named = [re.findall(r"lightning-compress\[([\w,]+)\]", page.read_text()) for page in pages]
    extras = {extra for texts in named for text in texts for extra in text.split(",")}
    assert len(extras) >= 4 and extras <= set(PROJECT["optional-dependencies"])


def test_what_a_merge_needs_is_the_tests_of_the_readme() -> None:
    assert (ROOT / ".ci/run").read_text().splitlines()[-1] == "exec make test"
    assert "\nmake test " in (ROOT / "README.md").read_text()
    ci = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert ci["jobs"]["test"]["steps"][-1] == {"run": ".ci/run"}
