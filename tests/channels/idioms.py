"""Small networks in idioms that people use, with the tensors that a removal may shrink: rows of `test_trace`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Net(nn.Module):
    """Layers by name, and a forward that uses them."""

    def __init__(self, forward: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        for name, layer in layers.items():
            if isinstance(layer, Tensor) and not isinstance(layer, nn.Parameter):
                self.register_buffer(name, layer)
            else:
                setattr(self, name, layer)
        self.run = forward

    def forward(self, *inputs: Any) -> Any:
        return self.run(self, *inputs)


def linear(*widths: int) -> nn.Linear:
    return nn.Linear(*widths)


def conv(inp: int, out: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inp, out, kernel, padding=kernel // 2, **options)


def _windows(self: Any, x: Tensor) -> Tensor:
    batch, count, _ = x.shape
    q, k, v = self.qkv(x).reshape(batch, count, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
    weights = (q * self.scale @ k.transpose(-2, -1)).softmax(-1)
    return self.o((weights @ v).transpose(1, 2).reshape(batch, count, -1))


def _yolo(self: Any, x: Tensor) -> Tensor:
    y = self.h(self.b(x).relu())
    y = y.view(len(y), 3, 7, *y.shape[2:]).permute(0, 1, 3, 4, 2).contiguous()
    return torch.cat([y[..., :2].sigmoid(), y[..., 2:4].exp() * self.anchors, y[..., 4:]], -1)


def _unet_odd(self: Any, x: Tensor) -> Tensor:
    a = self.a(x).relu()
    u = self.u(self.b(F.max_pool2d(a, 2)).relu())
    return self.o(torch.cat([a, F.pad(u, [0, a.size(3) - u.size(3), 0, a.size(2) - u.size(2)])], 1))


def _res2net(self: Any, x: Tensor) -> Tensor:
    parts = torch.split(self.s(x), self.width, 1)
    out = [parts[0]]
    for layer, part in zip((self.c, self.d), parts[1:], strict=True):
        out.append(layer(part + out[-1]).relu())
    return self.o(torch.cat(out, 1))


def _partial(self: Any, x: Tensor) -> Tensor:
    changed, rest = torch.split(self.s(x), [self.dim, self.s.out_channels - self.dim], 1)
    return self.o(torch.cat([self.c(changed), rest], 1).relu())


def _select_kernels(self: Any, x: Tensor) -> Tensor:
    maps = torch.stack([self.a(x), self.b(x)], 1)
    squeezed = self.f(maps.sum(1).mean((2, 3))).relu()
    weights = torch.stack([self.g(squeezed), self.h(squeezed)], 1).softmax(1)
    return self.o((maps * weights[..., None, None]).sum(1))


def _non_local(self: Any, x: Tensor) -> Tensor:
    x = self.s(x)
    q, k, v = (layer(x).flatten(2) for layer in (self.q, self.k, self.v))
    y = (q.transpose(1, 2) @ k).softmax(-1) @ v.transpose(1, 2)
    return self.o(x + self.w(y.transpose(1, 2).unflatten(2, x.shape[2:])))


def _vae(self: Any, x: Tensor) -> Tensor:
    mean, log_variance = self.e(x).relu(), self.l(x)
    return self.d(mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean) if self.training else mean)


def _functional_share(self: Any, x: Tensor) -> Tensor:
    return self.o(F.linear(self.a(x).relu(), self.a.weight.t()))


def _in_place(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    y += self.b(x)
    y[:, :, 0] = 0.0
    return self.o(y.mul_(2.0))


Idiom = tuple[str, Callable[[], nn.Module], list[tuple[int, ...]], str]
"""Name, network, shapes of the inputs, and the weights and buffers that shrink."""

IDIOMS: list[Idiom] = [
    (
        "einsum",
        lambda: Net(
            lambda s, x: s.o(torch.einsum("bnc,cd->bnd", s.q(x), s.w)),
            **{"q": linear(5, 16), "w": nn.Parameter(torch.randn(16, 12)), "o": linear(12, 3)},
        ),
        [(2, 8, 5)],
        "q.weight w o.weight",
    ),
    ("functional_share", lambda: Net(_functional_share, a=linear(6, 12), o=linear(6, 3)), [(2, 6)], "a.weight"),
    (
        "cumsum_over_time",
        lambda: Net(lambda s, x: s.o(s.a(x).cumsum(1)), a=linear(6, 12), o=linear(12, 3)),
        [(2, 7, 6)],
        "a.weight o.weight",
    ),
    (
        "buffers_of_any_dtype",
        lambda: Net(
            lambda s, x: s.o(torch.where(s.mask, s.a(x), 0.0) * s.number),
            **{"a": linear(6, 12), "o": linear(12, 3)},
            **{"mask": torch.arange(12) % 3 > 0, "number": torch.arange(12)},
        ),
        [(2, 6)],
        "a.weight o.weight mask number",
    ),
    (
        "parameter_list",
        lambda: Net(
            lambda s, x: (x @ s.w[0]).relu() @ s.w[1],
            w=nn.ParameterList([torch.randn(6, 12), torch.randn(12, 3)]),
        ),
        [(2, 6)],
        "w.0 w.1",
    ),
    (
        "generator_view",
        lambda: Net(
            lambda s, x: s.d(s.c(s.l(x).view(len(x), -1, 4, 4)).relu()),
            **{"l": linear(9, 8 * 16), "c": nn.ConvTranspose2d(8, 6, 4, 2, 1), "d": conv(6, 3)},
        ),
        [(2, 9)],
        "l.weight c.weight d.weight",
    ),
    (
        "generator_view_by_attribute",
        lambda: Net(lambda s, x: s.d(s.l(x).view(len(x), s.ngf, 4, 4)), l=linear(9, 8 * 16), d=conv(8, 3), ngf=8),
        [(2, 9)],
        "l.weight d.weight",
    ),
    (
        "unet_of_odd_size",
        lambda: Net(_unet_odd, a=conv(3, 8), b=conv(8, 12), u=nn.ConvTranspose2d(12, 10, 2, stride=2), o=conv(18, 2)),
        [(2, 3, 13, 11)],
        "a.weight b.weight u.weight o.weight",
    ),
    (
        "padded_shortcut",
        lambda: Net(
            lambda s, x: s.o(s.b(s.a(x)) + F.pad(s.a(x)[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))),
            **{"a": conv(3, 8), "b": conv(8, 16, stride=2), "o": conv(16, 2)},
        ),
        [(2, 3, 8, 8)],
        "a.weight b.weight o.weight",
    ),
    (
        "yolo_head",
        lambda: Net(_yolo, b=conv(3, 18), h=conv(18, 21, 1), anchors=torch.rand(3, 1, 1, 2)),
        [(2, 3, 8, 8)],
        "b.weight h.weight",
    ),
    (
        "two_towers",
        lambda: Net(
            lambda s, x, y: F.normalize(s.b(s.a(x)), dim=-1) @ F.normalize(s.d(s.c(y)), dim=-1).t(),
            **{"a": linear(6, 12), "b": linear(12, 8), "c": linear(9, 10), "d": linear(10, 8)},
        ),
        [(4, 6), (4, 9)],
        "a.weight b.weight c.weight d.weight",
    ),
    (
        "vae",
        lambda: Net(_vae, e=linear(6, 12), l=linear(6, 12), d=linear(12, 6)),
        [(4, 6)],
        "e.weight l.weight d.weight",
    ),
    (
        "res2net",
        lambda: Net(_res2net, s=conv(3, 12), c=conv(4, 4), d=conv(4, 4), o=conv(12, 2), width=4),
        [(2, 3, 8, 8)],
        "s.weight c.weight d.weight o.weight",
    ),
    (
        "partial_convolution",
        lambda: Net(_partial, s=conv(3, 16), c=conv(4, 4), o=conv(16, 2), dim=4),
        [(2, 3, 8, 8)],
        "s.weight c.weight o.weight",
    ),
    (
        "selective_kernels",
        lambda: Net(
            _select_kernels,
            a=conv(3, 12),
            b=conv(3, 12, 5),
            f=linear(12, 6),
            g=linear(6, 12),
            h=linear(6, 12),
            o=conv(12, 2),
        ),
        [(2, 3, 8, 8)],
        "a.weight b.weight f.weight g.weight h.weight o.weight",
    ),
    (
        "non_local",
        lambda: Net(
            _non_local, s=conv(3, 12), q=conv(12, 6), k=conv(12, 6), v=conv(12, 5), w=conv(5, 12), o=conv(12, 2)
        ),
        [(2, 3, 4, 4)],
        "s.weight q.weight k.weight v.weight w.weight o.weight",
    ),
    (
        "window_attention",
        lambda: Net(_windows, qkv=linear(12, 36), o=linear(12, 3), num_heads=4, scale=0.5),
        [(2, 5, 12)],
        "qkv.weight o.weight",
    ),
    (
        "maxout",
        lambda: Net(lambda s, x: s.o(s.a(x).unflatten(1, (-1, 2)).amax(-1)), a=linear(6, 12), o=linear(6, 3)),
        [(2, 6)],
        "a.weight o.weight",
    ),
    (
        "modulation",
        lambda: Net(
            lambda s, x: s.o(s.c(x) * s.l(x).chunk(2, 1)[0] + s.l(x).chunk(2, 1)[1]),
            c=linear(6, 10),
            l=linear(6, 20),
            o=linear(10, 2),
        ),
        [(2, 6)],
        "c.weight l.weight o.weight",
    ),
    (
        "in_place",
        lambda: Net(_in_place, a=conv(3, 8), b=conv(3, 8), o=conv(8, 2)),
        [(2, 3, 8, 8)],
        "a.weight b.weight o.weight",
    ),
    (
        "batch_as_large_as_the_width",
        lambda: Net(lambda s, x: s.o(s.a(x) @ s.a(x).t() @ s.b(x)), a=linear(6, 12), b=linear(6, 12), o=linear(12, 3)),
        [(12, 6)],
        "a.weight b.weight o.weight",
    ),
    (
        "three_dimensions",
        lambda: nn.Sequential(
            nn.Conv3d(3, 8, 3),
            nn.BatchNorm3d(8),
            nn.MaxPool3d(2),
            nn.Conv3d(8, 12, 1, groups=4),
            nn.Flatten(),
            nn.Linear(96, 3),
        ),
        [(2, 3, 6, 6, 6)],
        "0.weight 1.weight 3.weight 5.weight",
    ),
    (
        "several_outputs_a_group",
        lambda: nn.Sequential(conv(3, 8), conv(8, 24, groups=8), nn.BatchNorm2d(24), conv(24, 2)),
        [(2, 3, 8, 8)],
        "0.weight 1.weight 2.weight 3.weight",
    ),
    (
        "transposed_groups",
        lambda: nn.Sequential(
            conv(3, 8),
            nn.ConvTranspose2d(8, 12, 3, stride=2, output_padding=1, groups=2),
            nn.BatchNorm2d(12),
            conv(12, 2),
        ),
        [(2, 3, 8, 8)],
        "0.weight 1.weight 2.weight 3.weight",
    ),
    (
        "norms_without_scales",
        lambda: nn.Sequential(
            conv(3, 16),
            nn.InstanceNorm2d(16),
            conv(16, 12),
            nn.BatchNorm2d(12, affine=False),
            conv(12, 9),
            nn.BatchNorm2d(9, track_running_stats=False),
            conv(9, 2),
        ),
        [(2, 3, 8, 8)],
        "0.weight 2.weight 4.weight 6.weight 5.weight",
    ),
    (
        "seq2seq",
        lambda: Net(
            lambda s, x, y: s.o(s.d(y, s.e(x)[1])[0]),
            e=nn.LSTM(6, 12, batch_first=True),
            d=nn.LSTM(6, 12, batch_first=True),
            o=linear(12, 3),
        ),
        [(2, 7, 6), (2, 5, 6)],
        "e.weight_ih_l0 e.weight_hh_l0 d.weight_ih_l0 d.weight_hh_l0 o.weight",
    ),
    (
        "learned_state",
        lambda: Net(
            lambda s, x: s.o(s.r(x, s.h.expand(-1, len(x), -1).contiguous())[0]),
            r=nn.GRU(6, 12, batch_first=True),
            h=nn.Parameter(torch.randn(1, 1, 12)),
            o=linear(12, 3),
        ),
        [(2, 7, 6)],
        "r.weight_ih_l0 r.weight_hh_l0 h o.weight",
    ),
    (
        "last_states_of_two_directions",
        lambda: Net(
            lambda s, x: s.o(torch.cat([*s.r(x)[1]], 1)),
            r=nn.GRU(6, 12, batch_first=True, bidirectional=True, bias=False),
            o=linear(24, 3),
        ),
        [(2, 7, 6)],
        "r.weight_ih_l0 r.weight_hh_l0 r.weight_ih_l0_reverse r.weight_hh_l0_reverse o.weight",
    ),
]
