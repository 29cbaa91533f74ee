"""A cut is proven on what it touches: rounding, orders and layers that begin at zero neither hide nor forbid it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress import CompressionError, Targets, plan_removal, remove_channels_


def block(inp: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inp, out, 3, padding=1, bias=False), nn.BatchNorm2d(out, eps=1e-3), nn.ReLU())


def tower(depth: int, width: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [block(3, width), *(block(width, width) for _ in range(depth))]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))


class Asserts(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        assert y.dtype == torch.float32
        return y.softmax(-1, dtype=torch.float32)


class Autocast(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)  # type: ignore[no-any-return]


ROUNDING: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    # In training mode BatchNorm makes a rounding error grow in each layer, here to more than the outputs.
    "deep": (lambda: tower(60, 32), torch.randn(2, 3, 2, 2)),
    "deeper than float64": (lambda: tower(90, 8), torch.randn(2, 3, 1, 1)),
    "half": (lambda: tower(3).half(), torch.randn(4, 3, 8, 8).half()),
    "bfloat16, deep": (lambda: tower(20).bfloat16(), torch.randn(2, 3, 2, 2).bfloat16()),
    "autocast": (lambda: Autocast(*tower(10)), torch.randn(2, 3, 2, 2)),
    "code that asks for float32": (lambda: Asserts(*tower(50, 32)), torch.randn(2, 3, 2, 2)),
}


def assert_same(state: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    for name, tensor in state.items():
        assert torch.equal(tensor, before[name]) and tensor.dtype == before[name].dtype, name


@pytest.mark.parametrize("name", ROUNDING)
def test_rounding_is_no_fault(name: str) -> None:
    build, x = ROUNDING[name]
    model = build()
    before = copy.deepcopy(model.state_dict())
    plan = plan_removal(model, x, macs=0.5)
    assert list(plan.fixed.values()) == ["an output"]
    assert all(
        torch.equal(tensor, before[key]) and tensor.dtype == before[key].dtype
        for key, tensor in model.state_dict().items()
    )
    remove_channels_(model, plan)
    assert model(x).shape[0] == len(x)


def kept_apart(boxes: Tensor, scores: Tensor) -> Tensor:
    """Greedy suppression: a number of boxes that nobody knows before."""
    order, kept = scores.argsort(descending=True), []
    while len(order) and len(kept) < 6:
        kept.append(order[0])
        order = order[(boxes[order] - boxes[order[0]]).abs().sum(-1) > 0.1]
    return torch.stack(kept) if kept else order


def detections(scores: Tensor, boxes: Tensor) -> list[dict[str, Tensor]]:
    found = []
    for score, box in zip(scores, boxes, strict=True):
        best, label = score.max(-1)
        likely = best > best.mean()
        kept = kept_apart(box[likely], best[likely])
        found.append({"boxes": box[likely][kept], "scores": best[likely][kept], "labels": label[likely][kept]})
    return found


def ranked(scores: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    best, order = scores.amax(-1).topk(scores.shape[1])
    return best, boxes.gather(1, order.unsqueeze(-1).expand(-1, -1, 4))


ENDS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "topk": ranked,
    "sort": lambda scores, boxes: scores[..., 0].sort(-1),
    "suppression": detections,
    "argmax": lambda scores, boxes: scores.argmax(-1),
    "threshold": lambda scores, boxes: boxes[scores[..., 0] > scores.mean()],
    "unique": lambda scores, boxes: (scores * 20).round().unique(),
    "a number of Python's": lambda scores, boxes: boxes[:, : int(50 + 100 * scores.mean())],
}


class Detector(nn.Module):
    def __init__(self, end: Callable[[Tensor, Tensor], Any], norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [(nn.Conv2d(inp, 64, 3, padding=1), norm(64), nn.ReLU()) for inp in (3, 64, 64)]
        self.body = nn.Sequential(*(layer for part in layers for layer in part))
        self.score, self.box, self.end = nn.Conv2d(64, 3, 1), nn.Conv2d(64, 4, 1), end
        nn.init.normal_(self.score.weight, std=0.01)  # as such heads begin: scores nearly tie

    def forward(self, x: Tensor) -> Any:
        y = self.body(x)
        return self.end(self.score(y).flatten(2).transpose(1, 2), self.box(y).flatten(2).transpose(1, 2))


def pictures() -> Tensor:
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    x[..., 50:] = 0  # padding: places that tie
    return x


@pytest.mark.parametrize("end", ENDS)
def test_what_is_decided_by_near_ties_is_no_fault(end: str) -> None:
    model, x = Detector(ENDS[end], nn.BatchNorm2d).eval(), pictures()
    for budget in (0.8, 0.4):
        plan = plan_removal(model, x, macs=budget)
        assert not any(layer.startswith("body") for layer in plan.fixed)


@pytest.mark.parametrize("end", ENDS)
def test_outputs_of_any_length_may_be_cut_approximately(end: str) -> None:
    model, x = Detector(ENDS[end], lambda width: nn.GroupNorm(4, width)).eval(), pictures()
    plan = plan_removal(model, x, macs=0.5, targets=Targets(include=["body.0", "body.3"]))
    assert [row.layers for row in plan.rows] == [("body.0",), ("body.3",)]


class Scaled(nn.Module):
    """Computes with the number of its channels, which a cut changes."""

    def __init__(self, end: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.end = nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 3), end

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.end(self.c(self.b(y.relu() * y.shape[-1] ** -0.5)))


@pytest.mark.parametrize(
    "end", [lambda y: y, lambda y: y.argmax(-1), lambda y: (y + 50).sigmoid()], ids=["values", "classes", "saturated"]
)
def test_what_computes_something_else_stays_whatever_comes_out(end: Callable[[Tensor], Tensor]) -> None:
    plan = plan_removal(Scaled(end), torch.randn(6, 8), channels=0.5)
    assert plan.fixed["a"] == "what remains computes something else"


class Spanned(nn.Module):
    def __init__(self, end: Callable[[Tensor], Tensor] = lambda y: y) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm, self.up, self.down = (
            nn.Linear(8, 32),
            nn.LayerNorm(32),
            nn.Linear(32, 64),
            nn.Linear(64, 32),
        )
        self.gate, self.scale, self.head = nn.Linear(8, 32), nn.Parameter(torch.ones(32)), nn.Linear(32, 5)
        self.end = end

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = self.gate(x).tanh() * self.scale * self.down(self.up(self.norm(y)).relu())
        return self.end(self.head(y))


def begun(*zeros: str, bias: float | None = None) -> nn.Module:
    model = Spanned()
    for name in zeros:
        nn.init.zeros_(model.get_parameter(name))
    if bias is not None:
        nn.init.constant_(model.up.bias, bias)
    return model


BEGINNINGS: dict[str, Callable[[], nn.Module]] = {
    "values": begun,
    "a head of zeros": lambda: begun("head.weight", "head.bias"),
    "a branch of zeros": lambda: begun("down.weight", "down.bias"),
    "a gate of zeros": lambda: begun("gate.weight", "gate.bias"),
    "a scale of zeros": lambda: begun("scale"),
    "a norm of zeros": lambda: begun("norm.weight"),
    "dead units": lambda: begun(bias=-1e3),
    "saturated outputs": lambda: Spanned(lambda y: (1e6 * y + 1e8).sigmoid()),
    "outputs of zeros": lambda: Spanned(lambda y: y * 0),
    "classes": lambda: Spanned(lambda y: y.argmax(-1)),
}


@pytest.mark.parametrize("name", BEGINNINGS)
def test_a_width_that_a_norm_spans_stays_however_a_network_begins(name: str) -> None:
    plan = plan_removal(BEGINNINGS[name](), torch.randn(6, 8), channels=0.6)
    assert "a norm spans it" in plan.fixed["stem"]
    assert any("up" in row.layers for row in plan.rows)


class Begins(nn.Module):
    """A branch that begins at zero, in which the cut of a width computes something else."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.a, self.b, self.head = nn.Linear(8, 32), nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 5)
        self.gain = nn.Parameter(torch.full((32,), gain))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.a(x)
        return self.head(x + self.gain * self.b(F.silu(y) * y.shape[-1] ** -0.5))


@pytest.mark.parametrize("gain", [1.0, 1e-6, 0.0])
def test_a_branch_that_begins_at_zero_is_proven_too(gain: float) -> None:
    plan = plan_removal(Begins(gain), torch.randn(6, 8), channels=0.5)
    assert plan.fixed["a"] == "what remains computes something else"


def test_nothing_is_told_of_a_network_that_makes_noise_of_rounding() -> None:
    class Chaos(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(8, 4000), nn.Linear(4000, 5)  # long enough to be summed in blocks

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(self.a(x).relu()).sigmoid()
            for _ in range(200):
                y = 4 * y * (1 - y)
            return y

    with pytest.raises(CompressionError, match="rounding alone changes what comes out"):
        plan_removal(Chaos(), torch.randn(6, 8), channels=0.5)
