"""What outputs of layers are added to, found in a run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_compress.compensation.sums import FunctionLog, Sums, find_sums


def sums_of(model: nn.Module, x: Tensor) -> Sums:
    norms = {path: layer for path, layer in model.named_modules() if isinstance(layer, _NormBase)}
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    with torch.no_grad():
        return find_sums(model, lambda model: model(x), layers, norms)


class Stem(nn.Module):
    """Lets tests see a stream (`stream`) and the sum that a branch has been added to (`total`)."""

    def __init__(self, forward: Any, **layers: nn.Module) -> None:
        super().__init__()
        self._forward, self.stream, self.total = forward, nn.Identity(), nn.Identity()
        for name, layer in layers.items():
            self.add_module(name, layer)
        for layer in self.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_var = torch.rand(layer.num_features) + 0.5
                layer.weight.data = torch.randn(layer.num_features)
        self.eval()

    def forward(self, x: Tensor) -> Any:
        return self._forward(self, x)


def in_place(m: Any, x: Tensor) -> Tensor:
    x = m.stream(m.stem(x))
    y = m.down(m.up(x).relu())
    y += x
    return m.total(y).relu()


def layer_scale(m: Any, x: Tensor) -> Tensor:
    x = m.stream(m.conv(x))
    y = m.down(m.norm(x.permute(0, 2, 3, 1))).relu().neg()
    return m.total(x + (m.gamma * m.up(y)).permute(0, 3, 1, 2))


def scaled(m: Any, x: Tensor) -> Tensor:
    x = m.stream(m.conv(x))
    y = m.up(m.down(x.permute(0, 2, 3, 1)).relu()) * m.gamma
    return m.total(x + y.permute(0, 3, 1, 2))


def with_gamma(model: Stem) -> Stem:
    model.gamma = nn.Parameter(torch.rand(4) + 0.5)
    return model


def linears() -> dict[str, nn.Module]:
    return {"stem": nn.Linear(4, 4), "up": nn.Linear(4, 8), "down": nn.Linear(8, 4)}


MODELS: dict[str, Any] = {
    "pre-norm": (
        lambda: Stem(
            lambda m, x: m.total((s := m.stream(m.stem(x))) + m.drop(m.down(m.up(m.norm(s)).relu()))),
            **linears(), norm=nn.LayerNorm(4), drop=nn.Dropout(),
        ),
        "down",
        (2, 3, 4),
    ),
    "post-norm": (
        lambda: Stem(
            lambda m, x: m.norm(m.total(m.down(m.up(s := m.stream(m.stem(x))).relu()) + s)),
            **linears(), norm=nn.LayerNorm(4),
        ),
        "down",
        (2, 3, 4),
    ),
    "in place": (lambda: Stem(in_place, **linears()), "down", (2, 3, 4)),
    "resnet": (
        lambda: Stem(
            lambda m, x: m.total(m.norm2(m.conv2(m.norm1(m.conv1(s := m.stream(x.clone()))).relu())) + s).relu(),
            conv1=nn.Conv2d(4, 6, 3, padding=1, bias=False), norm1=nn.BatchNorm2d(6),
            conv2=nn.Conv2d(6, 4, 3, padding=1, bias=False), norm2=nn.BatchNorm2d(4),
        ),
        "conv2",
        (2, 4, 5, 5),
    ),
    # The way that downsamples is called last: it can make up for the branch.
    "downsampling": (
        lambda: Stem(
            lambda m, x: m.total(m.stream(m.norm1(m.conv1(x))) + m.norm2(m.conv2(x))),
            conv1=nn.Conv2d(4, 6, 3, 2, 1), norm1=nn.BatchNorm2d(6),
            conv2=nn.Conv2d(4, 6, 1, 2), norm2=nn.BatchNorm2d(6),
        ),
        "conv2",
        (2, 4, 6, 6),
    ),
    "layer scale": (
        lambda: with_gamma(Stem(scaled, conv=nn.Conv2d(4, 4, 1), down=nn.Linear(4, 8), up=nn.Linear(8, 4))),
        "up",
        (2, 4, 3, 3),
    ),
    "layer scale, before": (
        lambda: with_gamma(
            Stem(layer_scale, conv=nn.Conv2d(4, 4, 1), norm=nn.LayerNorm(4), down=nn.Linear(4, 8), up=nn.Linear(8, 4))
        ),
        "up",
        (2, 4, 3, 3),
    ),
    "layer scale, in place": (
        lambda: with_gamma(
            Stem(lambda m, x: m.total((s := m.stream(m.stem(x))) + m.down(m.up(s).relu()).mul_(m.gamma)), **linears())
        ),
        "down",
        (2, 3, 4),
    ),
    "a number": (
        lambda: Stem(lambda m, x: m.total((s := m.stream(m.stem(x))) + 0.1 * m.down(m.up(s).relu())), **linears()),
        "down",
        (2, 3, 4),
    ),
    "moved": (
        lambda: Stem(
            lambda m, x: m.total(m.down(m.up((s := m.stream(m.stem(x))).transpose(0, 1)).relu()).transpose(0, 1) + s),
            **linears(),
        ),
        "down",
        (2, 3, 4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_the_other_term_is_found_and_so_is_what_the_output_must_change_by(name: str):
    torch.manual_seed(0)
    build, path, shape = MODELS[name]
    model, x = build(), torch.randn(shape)
    found = sums_of(model, x).of[path]
    seen: dict[str, Tensor] = {}
    for watched in ("stream", "total"):
        watch = model.get_submodule(watched)
        watch.register_forward_hook(lambda _, args, out, name=watched: seen.update({name: out.clone()}))
    log = FunctionLog({found.others[0]})
    with log, torch.no_grad():
        model(x)
    torch.testing.assert_close(log.held[found.others[0]], seen["stream"])
    before, wanted = seen["total"], torch.randn_like(seen["total"])
    change = found.to_output(wanted)
    model.get_submodule(path).register_forward_hook(lambda layer, args, out: out + change)
    with torch.no_grad():
        model(x)
    torch.testing.assert_close(seen["total"] - before, wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (lambda m, x: m.down(m.up(x).relu()), "there is no sum"),
        (lambda m, x: m.down(m.up(x).relu()) + 1.0, "a number"),
        (lambda m, x: m.down(m.up(s := m.stem(x))).relu() + s, "an activation stands between"),
        (lambda m, x: m.down(m.up(s := m.stem(x))).relu_() + s, "an activation stands between, in place"),
        (lambda m, x: m.down(m.up(s := m.stem(x))).mul_(x) + s, "it is multiplied with what comes"),
        (lambda m, x: m.down(m.up(x)) + m.stem(x), "the other term is made afterwards"),
        (lambda m, x: m.down(m.up(x)) + x.mean((0, 1)), "the other term is spread"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_sum_is_none(forward: Any, why: str):
    torch.manual_seed(0)
    assert "down" not in sums_of(Stem(forward, **linears()), torch.randn(2, 3, 4)).of, why


def test_a_scale_next_to_zero_asks_for_nothing():
    torch.manual_seed(0)
    build, path, shape = MODELS["layer scale"]
    model = build()
    model.gamma.data[1] = 0.0
    change = sums_of(model, torch.randn(shape)).of[path].to_output(torch.ones(2, 4, 3, 3))
    assert not change[..., 1].any() and change[..., 0].all() and change.isfinite().all()
    model.gamma.data.zero_()
    assert not sums_of(model, torch.randn(shape)).of[path].to_output(torch.ones(2, 4, 3, 3)).any()


def test_norms_are_known_by_the_layer_before_them():
    torch.manual_seed(0)
    build, _, shape = MODELS["resnet"]
    assert sums_of(build(), torch.randn(shape)).normed == {"norm1": "conv1", "norm2": "conv2"}


def test_the_same_code_numbers_its_tensors_alike_whatever_its_widths_are():
    build, path, shape = MODELS["resnet"]
    torch.manual_seed(0)
    wide, narrow = build(), build()
    narrow.conv1, narrow.norm1 = nn.Conv2d(4, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3).eval()
    narrow.conv2 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
    x = torch.randn(shape)
    assert sums_of(wide, x).of[path].others == sums_of(narrow, x).of[path].others
