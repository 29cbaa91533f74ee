"""Roads from a pruned layer to a norm: pruned units are silent behind it, or a warning says that they may not be."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

from lightning_compress import Targets, prune_
from tests.pruning.silent import IMAGES, assert_silent, forward, gone_rows, rough

CONV, NEXT = (3, 8, 3), (8, 4, 3)
ROADS: dict[str, Callable[[], list[nn.Module]]] = {
    "a nested sequential": lambda: [nn.Sequential(nn.Conv2d(*CONV)), nn.BatchNorm2d(8)],
    "two norms in a row": lambda: [nn.Conv2d(*CONV), nn.BatchNorm2d(8), nn.BatchNorm2d(8)],
    "a norm without scale and shift": lambda: [nn.Conv2d(*CONV), nn.BatchNorm2d(8, affine=False)],
    "dropout and pooling between": lambda: [nn.Conv2d(*CONV), nn.Dropout2d(), nn.AvgPool2d(2, 1), nn.BatchNorm2d(8)],
}


@pytest.mark.parametrize("with_inputs", [False, True])
@pytest.mark.parametrize("road", ROADS)
def test_on_other_roads_to_a_norm_units_are_silent_or_a_warning_says_so(road: str, with_inputs: bool) -> None:
    model = rough(nn.Sequential(*ROADS[road](), nn.Tanh(), nn.Conv2d(*NEXT)))
    [conv] = [one for one in model.modules() if isinstance(one, nn.Conv2d) and one.in_channels == 3]
    inputs = IMAGES if with_inputs else None
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        prune_(model, 0.5, "ln_structured", "layer", Targets(include=["0"]), inputs=inputs)
    if not any("may still put out a constant" in str(one.message) for one in told):
        assert_silent(model, gone_rows(conv.weight), model[-1].weight, run=forward)


def test_a_flattened_map_before_the_norm() -> None:
    flat = [nn.Conv2d(3, 8, 3), nn.Flatten(), nn.BatchNorm1d(8 * 16), nn.Tanh(), nn.Linear(8 * 16, 4)]
    model = rough(nn.Sequential(*flat))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        prune_(model, 0.5, "ln_structured", "layer", Targets(include=["0"]), inputs=IMAGES)
    if not any("may still put out a constant" in str(one.message) for one in told):
        gone = gone_rows(model[0].weight).repeat_interleave(16)
        assert_silent(model, gone, model[4].weight, run=forward)


@pytest.mark.parametrize(("positions", "way"), [(5, "in sequence"), (5, "by a run"), (8, "by a run")])
def test_a_norm_over_positions_is_not_one_of_units(positions: int, way: str) -> None:
    # A linear layer's units lie last in (N, positions, units); BatchNorm1d normalises the middle.
    model = rough(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(positions), nn.Tanh(), nn.Linear(8, 4)))
    inputs = torch.randn(3, positions, 6) if way == "by a run" else None
    with pytest.warns(UserWarning, match=r"may still put out a constant: .*`1`"):
        prune_(model, 0.5, "ln_structured", "layer", Targets(include=["0"]), inputs=inputs)
    assert int(gone_rows(model[0].weight).sum()) == 4
    assert model[1].weight.all() and model[1].bias.all()
