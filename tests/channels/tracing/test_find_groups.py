"""The same structure in other words: halves, keys that heads share, windows, layers of the user's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress import RemovalPlan, plan_removal
from tests.channels.cuts import inexact
from tests.channels.idioms import Net, conv, linear

Rows = set[tuple[str, int, int]]


def planned(build: Callable[[], nn.Module], *shapes: tuple[int, ...], macs: float = 0.5) -> tuple[Rows, RemovalPlan]:
    """What goes, by the first layer of each row; it is exact."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, inputs = build().eval(), tuple(torch.randn(shape) for shape in shapes)
    plan = plan_removal(model, inputs, macs=macs, importance="random")
    assert inexact(model, plan, inputs) < 1e-5
    return {(row.layers[0], row.before, row.after) for row in plan.rows}, plan


Halves = Callable[[Any, Tensor], Any]


def halves(take: Halves) -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        first, second = take(self, self.stem(x).relu())
        return self.out(torch.cat((first, second, self.conv(second)), 1))

    own: Any = {"sizes": (16, 16), "half": 0.5, "width": 32, "c": 16}
    return Net(forward, stem=conv(3, 32), conv=conv(16, 16), out=conv(48, 8, 1), **own)


HALVES: dict[str, Halves] = {
    "split_by_attribute": lambda s, y: y.split(s.c, 1),
    "tuple": lambda s, y: y.split((s.c, s.c), 1),
    "torch_split": lambda s, y: torch.split(y, [s.c, s.c], dim=1),
    "tuple_that_is_kept": lambda s, y: y.split(s.sizes, 1),
    "slices": lambda s, y: (y[:, : s.c], y[:, s.c :]),
    "slices_from_the_end": lambda s, y: (y[:, : -s.c], y[:, -s.c :, ...]),
    "narrow": lambda s, y: (y.narrow(1, 0, s.c), y.narrow(1, s.c, s.c)),
    "tensor_split": lambda s, y: y.tensor_split(2, 1),
    "tensor_split_at": lambda s, y: torch.tensor_split(y, (s.c,), 1),
    "index_select": lambda s, y: [y.index_select(1, torch.arange(at, at + s.c)) for at in (0, s.c)],
    "counted_from_the_end": lambda s, y: (y[:, : s.c], y[:, torch.arange(-s.c, 0)]),
    "view": lambda s, y: y.view(len(y), 2, s.c, *y.shape[2:]).unbind(1),
    "unflatten": lambda s, y: y.unflatten(1, (2, -1)).unbind(1),
    "half_of_the_shape": lambda s, y: y.split((y.shape[1] // 2, y.shape[1] - y.shape[1] // 2), 1),
    "a_kept_fraction": lambda s, y: y.split([int(y.shape[1] * s.half)] * 2, 1),
    "half_of_a_kept_number": lambda s, y: (y[:, : s.width // 2], y[:, s.width // 2 :]),
    "number_of_another_layer": lambda s, y: (y[:, : s.conv.in_channels], y[:, s.conv.in_channels :]),
    "written_slices": lambda s, y: (y[:, :16], y[:, 16:]),
    "written_sizes": lambda s, y: torch.split(y, [16, 16], 1),
    "written_narrow": lambda s, y: (torch.narrow(y, 1, 0, 16), y.narrow(1, 16, length=16)),
    "written_ends": lambda s, y: y.tensor_split((16,), dim=1),
}


@pytest.mark.parametrize("how", HALVES)
def test_halves_are_those_of_chunk(how: str) -> None:
    expected, _ = planned(lambda: halves(lambda s, y: y.chunk(2, 1)), (2, 3, 8, 8))
    assert planned(lambda: halves(HALVES[how]), (2, 3, 8, 8))[0] == expected


def test_places_that_alternate_are_halves_too() -> None:
    rows, _ = planned(lambda: halves(lambda s, y: (y[:, ::2], y[:, 1::2])), (2, 3, 8, 8))
    assert {layer for layer, before, after in rows if after < before} == {"stem", "conv"}


def test_a_half_that_must_stay_leaves_the_other_free() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        y = self.a(x)
        return y[:, : self.kept], self.o(y[:, self.kept :].relu())

    rows, plan = planned(lambda: Net(forward, a=linear(6, 24), o=linear(12, 3), kept=12), (4, 6))
    assert rows == {("a", 12, 1)} or {(layer, before) for layer, before, _ in rows} == {("a", 12)}
    assert plan.kept["a.weight"][0][:12].tolist() == list(range(12))


def _partial_stages(self: Any, x: Tensor) -> Tensor:
    parts = list(self.i(x).split((self.c, self.c), 1))
    parts.extend(layer(parts[-1]).relu() for layer in (self.a, self.b))
    return self.o(torch.cat(parts, 1))


def _branches(self: Any, x: Tensor) -> Tensor:
    whole, square, wide = torch.split(self.i(x), self.widths, 1)
    return self.o(torch.cat([whole, self.a(square), self.b(wide)], 1))


def _gated_orders(self: Any, x: Tensor) -> Tensor:
    gate, rest = torch.split(self.p(self.i(x)), (self.dims[0], sum(self.dims)), 1)
    parts = torch.split(self.d(rest), self.dims, 1)
    return self.o(self.a(gate * parts[0]) * parts[1])


def _coupled(self: Any, x: Tensor) -> Tensor:
    x = self.i(x)
    first, second = x[:, : self.half], x[:, self.half :]
    hidden = self.b(self.a(first).relu())
    scale, shift = hidden[:, : self.half], hidden[:, self.half :]
    return self.o(torch.cat([first, second * scale.tanh().exp() + shift], 1))


def _gru(self: Any, x: Tensor) -> Tensor:
    state, size = x.new_zeros(len(x), self.size), self.size
    for step in x.unbind(1):
        a, b = self.a(step), self.b(state)
        reset, update = ((a + b)[:, : 2 * size]).sigmoid().split([size, size], 1)
        new = (a[:, 2 * size :] + reset * b[:, 2 * size :]).tanh()
        state = (1 - update) * new + update * state
    return self.o(state)


def _lstm(self: Any, x: Tensor) -> Tensor:
    hidden = cell = x.new_zeros(len(x), self.size)
    for step in x.unbind(1):
        gates = self.a(torch.cat([step, hidden], 1))
        i, f, o = gates[:, : 3 * self.size].sigmoid().chunk(3, 1)
        cell = f * cell + i * gates[:, 3 * self.size :].tanh()
        hidden = o * cell.tanh()
    return self.o(hidden)


def _glu(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    return self.o(F.silu(y[..., : self.hidden]) * y[..., self.hidden :])


def _flat(self: Any, x: Tensor) -> Tensor:
    return self.o(self.a(x).relu().view(-1, 8 * 6 * 6))


PARTS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "partial_stages": (lambda: Net(_partial_stages, i=conv(3, 32, 1), a=conv(16, 16), b=conv(16, 16),
                                   o=conv(64, 4, 1), c=16), (2, 3, 8, 8), "i a b"),
    "branches": (lambda: Net(_branches, i=conv(3, 24, 1), a=conv(6, 6), b=conv(6, 6), o=conv(24, 4, 1),
                             widths=(12, 6, 6)), (2, 3, 8, 8), "i a b"),
    "gated_orders": (lambda: Net(_gated_orders, i=conv(3, 16, 1), p=conv(16, 32, 1), d=conv(24, 24, groups=24),
                                 a=conv(8, 16, 1), o=conv(16, 4, 1), dims=[8, 16]), (2, 3, 8, 8), "i p a"),
    "coupling": (lambda: Net(_coupled, i=linear(6, 24), a=linear(12, 32), b=linear(32, 24), o=linear(24, 3), half=12),
                 (4, 6), "i a"),
    "gru_by_hand": (lambda: Net(_gru, a=linear(6, 48), b=linear(16, 48), o=linear(16, 3), size=16), (3, 4, 6), "a"),
    "lstm_by_hand": (lambda: Net(_lstm, a=linear(22, 64), o=linear(16, 3), size=16), (3, 4, 6), "a"),
    "gated_unit": (lambda: Net(_glu, a=linear(12, 64), o=linear(32, 5), hidden=32), (4, 12), "a"),
    "flattened_maps": (lambda: Net(_flat, a=conv(3, 8), o=linear(288, 5)), (2, 3, 6, 6), "a"),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_parts_of_a_width_follow(name: str) -> None:
    build, shape, layers = PARTS[name]
    _, plan = planned(build, shape)
    cut = {layer for row in plan.rows if row.after < row.before for layer in row.layers}
    assert cut >= set(layers.split())


class SharedKeys(nn.Module):
    """Several query heads for each key head."""

    def __init__(self, how: str, keys: int, heads: int = 8, width: int = 8) -> None:
        super().__init__()
        self.how, self.heads, self.keys, self.width = how, heads, keys, width
        self.q, self.k, self.v = (linear(32, count * width) for count in (heads, keys, keys))
        self.o = linear(heads * width, 32)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (layer(x).view(batch, length, -1, self.width).transpose(1, 2) for layer in (self.q, self.k, self.v))
        repeats = self.heads // self.keys
        if self.how == "grouped_call":
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        elif self.how == "without_a_dimension":
            scores = torch.einsum("bhid,bjd->bhij", q, k[:, 0]) * 0.3
            y = torch.einsum("bhij,bjd->bhid", scores.softmax(-1), v[:, 0])
        else:
            if self.how == "expanded":
                k, v = (heads[:, :, None].expand(-1, -1, repeats, -1, -1).flatten(1, 2) for heads in (k, v))
            elif self.how == "repeated":
                k, v = (heads.repeat_interleave(repeats, 1) for heads in (k, v))
            elif self.how == "groups_apart":
                q, k, v = q.unflatten(1, (self.keys, repeats)), k[:, :, None], v[:, :, None]
            y = (q @ k.transpose(-2, -1) * 0.3).softmax(-1) @ v
            y = y.reshape(batch, -1, length, self.width)
        return self.o(y.transpose(1, 2).reshape(batch, length, -1))


SHARED = [
    *((how, 1) for how in ("grouped_call", "broadcast", "without_a_dimension", "expanded", "repeated", "groups_apart")),
    *((how, 2) for how in ("grouped_call", "expanded", "repeated", "groups_apart")),
]


@pytest.mark.parametrize(("how", "keys"), SHARED)
def test_query_heads_leave_and_the_keys_that_they_share_stay(how: str, keys: int) -> None:
    rows, plan = planned(lambda: SharedKeys(how, keys), (2, 6, 32), macs=0.6)
    assert rows == {("q", 64, 32)}
    assert {"k", "v", "o"} == set(plan.fixed)
    indices = plan.kept["q.weight"][0].view(-1, 8)
    assert (indices % 8 == torch.arange(8)).all(), "heads leave as wholes"
    assert len((indices[:, 0] // 8 // (8 // keys)).unique()) == keys, "each key head keeps queries"


def test_many_key_heads_go_with_their_queries() -> None:
    rows, _ = planned(lambda: SharedKeys("grouped_call", 4), (2, 6, 32))
    assert rows == {("q", 64, 32)}


class Own(nn.Module):
    """A layer with parameters of its own, in torch's layout or not."""

    def __init__(self, how: str, *shape: int) -> None:
        super().__init__()
        self.how = how
        self.weight, self.bias = nn.Parameter(torch.randn(shape) * 0.3), nn.Parameter(torch.randn(shape[0]))
        self.gain = nn.Parameter(torch.rand(shape[0], *[1] * (len(shape) - 1)) + 0.5)
        self.register_buffer("mask", (torch.rand(shape) > 0.3).float())
        self.scale, self.ins = 1 / math.sqrt(shape[1]), shape[1]

    def forward(self, x: Tensor) -> Tensor:
        w, b = self.weight, self.bias
        match self.how:
            case "plain":
                return F.linear(x, w, b)
            case "scaled":
                return torch.addmm(b * 0.5, x, (w * self.scale).t())
            case "scaled_by_a_kept_number":
                return F.linear(x, w / math.sqrt(self.ins), b)
            case "gain":
                return F.linear(x, self.gain * w, b)
            case "mask":
                return F.linear(x, self.mask * w, b)
            case "einsum":
                return torch.einsum("bi,oi->bo", x, w) + b
            case "from_the_left":
                return (w @ x.t()).t() + b
            case "of_unit_rows":
                return 3.0 * F.linear(F.normalize(x, dim=1), F.normalize(w, dim=1))
            case "maps":
                return F.conv2d(x, w * self.scale, b, padding=w.shape[-1] // 2)
        raise ValueError(self.how)


@pytest.mark.parametrize(
    "how",
    ["plain", "scaled", "scaled_by_a_kept_number", "gain", "mask", "einsum", "from_the_left", "of_unit_rows"],
)
def test_own_layers_are_cut_as_torchs_are(how: str) -> None:
    rows, plan = planned(lambda: nn.Sequential(Own(how, 32, 12), nn.ReLU(), Own(how, 24, 32), nn.ReLU(),
                                               linear(24, 5)), (4, 12))  # fmt: skip
    named = {layer for row in plan.rows for layer in row.layers}
    assert (
        {"0.weight", "2.weight"}
        <= named
        <= {f"{place}.{name}" for place in (0, 2) for name in ("weight", "gain", "mask")}
    )
    assert {before for _, before, _ in rows} == {32, 24} and all(after < before for _, before, after in rows)
    assert all(plan.kept[f"{place}.weight"].keys() == dims for place, dims in ((0, {0}), (2, {0, 1})))


@pytest.mark.parametrize("kernel", [1, 3])
def test_own_convolutions_are_cut(kernel: int) -> None:
    shape = 16, 3, kernel, kernel
    rows, _ = planned(lambda: nn.Sequential(Own("maps", *shape), nn.ReLU(), conv(16, 5, 1)), (2, 3, 8, 8))
    assert rows == {("0.weight", 16, 8)}


def test_own_factors_name_the_layer_that_makes_a_width() -> None:
    class Factors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(32, 16) * 0.3), nn.Parameter(torch.randn(16, 12) * 0.3)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.a @ self.b)

    _, plan = planned(lambda: nn.Sequential(Factors(), nn.ReLU(), linear(32, 5)), (4, 12))
    assert [("0.a" in row.layers, "0.b" in row.layers, row.before) for row in plan.rows] == [
        (True, False, 32),
        (True, True, 16),
    ]


def test_standardized_weights_say_why_their_inputs_stay() -> None:
    class Standardized(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            rows = self.weight.reshape(1, self.out_channels, -1)
            rows = F.batch_norm(rows, None, None, training=True)
            return F.conv2d(x, rows.view_as(self.weight), self.bias, padding=1)

    _, plan = planned(lambda: nn.Sequential(Standardized(3, 16, 3), nn.ReLU(), Standardized(16, 12, 3), nn.ReLU(),
                                            conv(12, 4)), (2, 3, 8, 8), macs=0.6)  # fmt: skip
    assert plan.fixed["0"].startswith("a norm spans it, in `2`; name a layer of it exactly")
    assert [row.layers for row in plan.rows] == [("2",)]


class Windows(nn.Module):
    """Attention whose code computes the sizes of heads from the width that comes in."""

    def __init__(self, how: str, width: int = 32, heads: int = 4, tokens: int = 16) -> None:
        super().__init__()
        self.how, self.heads, self.scale = how, heads, (width // heads) ** -0.5
        self.qkv, self.o = linear(width, 3 * width), linear(width, width)
        self.q, self.kv = linear(width, width), linear(width, 2 * width)
        self.q_bias, self.v_bias = (nn.Parameter(torch.randn(width)) for _ in range(2))
        self.table = nn.Parameter(torch.randn(31, heads))
        self.temperature = nn.Parameter(torch.rand(heads, 1, 1))
        self.mix = linear(heads, heads)
        places = torch.arange(tokens)
        self.register_buffer("places", places[:, None] - places + tokens - 1)
        self.register_buffer(
            "mask", torch.zeros(4, tokens, tokens).masked_fill(torch.rand(4, tokens, tokens) > 0.7, -9)
        )

    def _bias(self, count: int) -> Tensor:
        return self.table[self.places.view(-1)].view(count, count, -1).permute(2, 0, 1).unsqueeze(0)

    def forward(self, x: Tensor) -> Tensor:
        batch, count, width = x.shape
        heads, how = self.heads, self.how
        if how == "biases_apart":
            y = F.linear(x, self.qkv.weight, torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias)))
        else:
            y = self.qkv(x)
        if how == "layers_apart":
            q = self.q(x).reshape(batch, count, heads, width // heads).permute(0, 2, 1, 3)
            k, v = self.kv(x).reshape(batch, -1, 2, heads, width // heads).permute(2, 0, 3, 1, 4)
        elif how == "written":
            q, k, v = y.view(batch, count, 3, 4, 8).permute(2, 0, 3, 1, 4)
        elif how == "split_first":
            q, k, v = (part.view(batch, count, heads, width // heads).transpose(1, 2) for part in y.split(width, 2))
        else:
            q, k, v = y.reshape(batch, count, 3, heads, width // heads).permute(2, 0, 3, 1, 4).unbind(0)
        if how == "heads_in_the_batch":
            q, k, v = (part.reshape(batch * heads, count, width // heads) for part in (q, k, v))
            y = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v).view(batch, heads, count, width // heads)
            return self.o(y.transpose(1, 2).contiguous().view(batch, count, width))
        if how == "channels_attend":
            y = ((q * self.scale).transpose(-1, -2) @ k).softmax(-1) @ v.transpose(-1, -2)
            return self.o(y.transpose(-1, -2).transpose(1, 2).reshape(batch, count, width))
        if how in ("plain", "written"):
            y = F.scaled_dot_product_attention(q, k, v)
        elif how == "bias_as_mask":
            mask = self.mask.view(1, 4, 1, count, count).expand(batch // 4, -1, heads, -1, -1)
            y = F.scaled_dot_product_attention(q, k, v, self._bias(count) + mask.reshape(-1, heads, count, count))
        else:
            scores = q * self.scale @ k.transpose(-2, -1)
            if how == "temperatures":
                scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
                scores = scores * self.temperature.clamp(max=1.0).exp() + 4 * torch.sigmoid(self._bias(count))
            if how in ("bias_table", "shifted"):
                scores = scores + self._bias(count)
            if how == "shifted":
                scores = scores.view(batch // 4, 4, heads, count, count) + self.mask.unsqueeze(1).unsqueeze(0)
                scores = scores.view(-1, heads, count, count)
            if how == "heads_are_mixed":
                scores = self.mix(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            y = scores.softmax(-1) @ v
        return self.o(y.transpose(1, 2).reshape(batch, count, width))


WINDOWS = [
    *("plain", "layers_apart", "biases_apart", "written", "split_first", "bias_table", "shifted", "bias_as_mask"),
    *("temperatures", "heads_in_the_batch", "heads_are_mixed", "channels_attend"),
]


@pytest.mark.parametrize("how", WINDOWS)
def test_heads_of_windows_leave(how: str) -> None:
    rows, plan = planned(lambda: nn.Sequential(linear(6, 32), Windows(how), linear(32, 5)), (8, 16, 6))
    layer = "1.q" if how == "layers_apart" else "1.qkv"
    [(before, after)] = {row[1:] for row in rows if row[0] == layer}
    assert after == before // 2
    indices = plan.kept[f"{layer}.weight"][0].view(-1, 8)
    assert (indices % 8 == torch.arange(8)).all(), "heads leave as wholes"
    if how in ("shifted", "bias_as_mask", "bias_table", "temperatures"):
        assert len(plan.kept["1.table"][1]) == 2


def _spatial_windows(self: Any, x: Tensor) -> Tensor:
    batch, height, width, channels = x.shape
    y = x.reshape(batch, height // 4, 4, width // 4, 4, channels).transpose(2, 3)
    sizes = batch, height * width // 16, -1, 3, self.heads, channels // self.heads
    q, k, v = self.qkv(y).reshape(sizes).permute(3, 0, 1, 4, 2, 5)
    y = (q * 0.3 @ k.transpose(-2, -1)).softmax(-1) @ v
    y = y.transpose(2, 3).reshape(batch, height // 4, width // 4, 4, 4, channels)
    return self.o(y.transpose(2, 3).reshape(batch, height, width, channels))


def _of_maps(self: Any, x: Tensor) -> Tensor:
    batch, _, height, width = x.shape
    sizes = batch, self.heads, self.key + self.key + self.value, height * width
    q, k, v = self.qkv(self.i(x)).view(sizes).split([self.key, self.key, self.value], dim=2)
    y = v @ (q.transpose(-2, -1) @ k * self.key**-0.5).softmax(-1).transpose(-2, -1)
    return self.o(y.view(batch, 32, height, width) + self.d(v.reshape(batch, 32, height, width)))


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: Net(_spatial_windows, qkv=linear(32, 96), o=linear(32, 5), heads=4), (2, 8, 8, 32)),
        (lambda: Net(_of_maps, i=conv(6, 32, 1), qkv=conv(32, 64, 1), d=conv(32, 32, groups=32), o=conv(32, 5, 1),
                     heads=4, key=4, value=8), (2, 6, 4, 4)),
    ],
    ids=["of_space", "of_maps"],
)  # fmt: skip
def test_other_windows(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    rows, _ = planned(build, shape)
    [(before, after)] = {row[1:] for row in rows if row[0] == "qkv"}
    assert after == before // 2


def test_code_that_reads_the_width_of_another_layer_is_put_right() -> None:
    # The width that comes in is cut too: what the code computes from it isn't the size of a head any more.
    def build() -> nn.Module:
        return nn.Sequential(linear(6, 32), Windows("plain"), linear(32, 5))

    _, plan = planned(build, (8, 16, 6), macs=0.3)
    assert {layer for row in plan.rows if row.after < row.before for layer in row.layers} >= {"0", "1.qkv", "1.o"}
