"""The table in docs/quantization.md of what static int8 quantizes, made anew; run this file to print it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_compress import quantize
from lightning_compress.quantization.convert import record_of
from tests.support.modules import ZooModule
from tests.support.zoo import ZOO, Row

PAGE = Path(__file__).parents[2] / "docs" / "quantization.md"


def cell(row: Row) -> str:
    """What becomes of one network."""
    module = ZooModule(row).net
    args, kwargs = row.inputs()
    record = record_of(quantize(Called(module), calibration=[(args, kwargs)])) or {}
    units = [unit["path"].removeprefix("net").lstrip(".") for unit in record["units"]]
    floats = {path.removeprefix("net").lstrip("."): reason for path, reason in record["floats"].items()}
    split = [reason.removeprefix("not as a whole: ") for reason in floats.values() if reason.startswith("not as a")]
    left = [
        f"`{path}` ({reason.partition(' (')[0]})"
        for path, reason in floats.items()
        if not reason.startswith("not as a whole") and not any(path.startswith(f"{outer}.") for outer in floats)
    ]
    what = "all" if units == [""] else f"{', '.join(f'`{unit}`' for unit in units)} ({split[0]})"
    return f"{what} but {', '.join(left)}" if left else what


class Called(torch.nn.Module):
    """A network whose calibration batches are (args, kwargs)."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def calibration_step(self, batch: Any) -> Any:
        args, kwargs = batch
        return self.net(*args, **kwargs)


def table() -> str:
    return "\n".join(["| Network | Int8 |", "|:--|:--|", *(f"| {row} | {cell(row)} |" for row in ZOO)])


@pytest.mark.slow
def test_the_page_tells_what_is_quantized() -> None:
    assert table() in PAGE.read_text()


if __name__ == "__main__":
    print(table())
