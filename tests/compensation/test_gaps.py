"""Behind a sum a block has left: what the block made of the stream is to be in the sum."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import plan_removal, remove_channels_
from lightning_compress.channels.cutting.cut import cut_
from lightning_compress.compensation.in_order import Visit, Visits
from lightning_compress.compensation.runner import Runner, layers_of_


class Branch(nn.Module):
    """Adds to a stream, before a norm or behind it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.up, self.down, self.norm = nn.Linear(8, 12), nn.Linear(12, 8), nn.LayerNorm(8)
        nn.init.normal_(self.norm.weight, 1.0, 0.3)
        nn.init.normal_(self.norm.bias, 0.0, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "pre":
            return x + self.down(self.up(self.norm(x)).relu())
        total = x + self.down(self.up(x).relu())
        return self.norm(total) if self.kind == "post" else total.relu()


class Stream(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.blocks, self.last = (
            nn.Linear(4, 8),
            nn.ModuleList(Branch(kind) for _ in range(4)),
            nn.Linear(8, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def without(model: nn.Module, paths: list[str]) -> nn.Module:
    """The model with these blocks skipped, as a plan would leave it."""
    narrow = copy.deepcopy(model)
    numbers = {f"{path}._skipped_block": ["identity", "x", 0, "", 0, 0] for path in paths}
    kept = {
        name: {0: torch.zeros(0, dtype=torch.int64)}
        for name, _ in model.named_parameters()
        if name.startswith(tuple(f"{path}." for path in paths))
    }
    cut_(narrow, kept, numbers)
    return narrow


def visited(kind: str, gone: list[str]) -> tuple[nn.Module, Tensor, dict[str, Visit]]:
    model, x = Stream(kind).eval(), torch.randn(6, 4)
    narrow = without(model, gone)
    paths = layers_of_(Runner(narrow).twin())
    visits = Visits(Runner(model), Runner(narrow), [x], paths, needs_sums=True, blocks=gone)
    return model, x, {visit.path: visit for visit in visits}


def outputs_of(model: nn.Module, x: Tensor, path: str) -> Tensor:
    found = list[Tensor]()
    model.get_submodule(path).register_forward_hook(lambda module, args, out: found.append(out.detach()))
    model(x)
    return found[0]


@pytest.mark.parametrize("kind", ["pre", "post", "relu"])
def test_the_sum_before_a_gap_is_to_become_what_the_last_block_made(kind: str) -> None:
    model, x, visits = visited(kind, ["blocks.1", "blocks.2"])
    visit = visits["blocks.0.down"]
    assert visit.gap is not None and visit.gap.block == "blocks.2"
    (call,) = visit.calls
    assert call.reference is None and call.terms is not None
    wanted, norm = call.terms[0], model.get_submodule("blocks.0.norm")
    made = {"pre": lambda total: total, "post": norm, "relu": torch.relu}[kind](wanted)
    expected = outputs_of(model, x, "blocks.2")
    if kind == "post":  # a LayerNorm forgets size and mean, which another one's output has too
        normed = (expected - norm.bias) / norm.weight
        normed = (normed - normed.mean(1, keepdim=True)) / normed.var(1, correction=0, keepdim=True).sqrt()
        expected = (normed * norm.weight + norm.bias).detach()
    torch.testing.assert_close(made.detach(), expected, atol=1e-4, rtol=1e-4)


def test_other_layers_have_the_targets_of_always() -> None:
    _, _, visits = visited("pre", ["blocks.1", "blocks.2"])
    gaps = {path for path, visit in visits.items() if visit.gap is not None}
    assert gaps == {"blocks.0.down"}
    assert all(call.reference is not None for path, visit in visits.items() if path not in gaps for call in visit.calls)


@pytest.mark.parametrize("kind", ["pre", "post", "relu"])
def test_a_model_without_blocks_is_nearer_to_the_whole_one_with_its_fits(kind: str) -> None:
    model = Stream(kind).eval()
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(64, 4, generator=generator) for _ in range(5)]
    x = torch.randn(256, 4, generator=generator)
    plan = plan_removal(model, batches[0], macs=0.55, blocks=True, min_layer_channels=1.0, calibration=batches)
    assert any(row.block for row in plan.rows)
    plain, fitted = copy.deepcopy(model), copy.deepcopy(model)
    remove_channels_(plain, plan)
    remove_channels_(fitted, plan, calibration=batches)
    apart = [(narrow(x) - model(x)).square().sum().item() for narrow in (fitted, plain)]
    assert apart[0] < 0.6 * apart[1]
