"""The support modules once more, with `pytorch_lightning` in the place of `lightning`, whose other name it is."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType


def under_the_older_name(name: str) -> ModuleType:
    """A module of this folder that imports the package by its other name."""
    source = (Path(__file__).parent / f"{name}.py").read_text()
    assert source.count("import lightning as L\n") == 1
    module = ModuleType(f"{__name__}.{name}")
    sys.modules[module.__name__] = module  # where pickle and dataclasses look for the classes
    exec(source.replace("import lightning as L\n", "import pytorch_lightning as L\n"), vars(module))
    return module


data = under_the_older_name("data")
modules = under_the_older_name("modules")
