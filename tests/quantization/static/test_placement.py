"""Where activations are rounded, for each target: what stands here was written by hand from the rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.nn import functional as F

from lightning_compress.quantization.static.graphs import LAYERS, copy_graph
from lightning_compress.quantization.static.placement import TARGETS, Place, places
from lightning_compress.quantization.static.signature import Signature
from lightning_compress.quantization.static.trace import trace


class Net(nn.Module):
    """Computes a function of itself, which has layers ``a``, ``b``, ..., and of its inputs."""

    def __init__(self, function: Callable[..., Any], *layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in zip("abcdefgh", layers, strict=False):
            self.add_module(name, layer)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def conv(inputs: int = 4, outputs: int = 4, **options: Any) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def convs(count: int) -> list[nn.Module]:
    return [conv() for _ in range(count)]


def linears(count: int) -> list[nn.Module]:
    return [nn.Linear(4, 4) for _ in range(count)]


def residual(n: Net, x: Tensor) -> Tensor:
    x = F.max_pool2d(n.a(x).relu(), 2)
    return n.h(F.adaptive_avg_pool2d((n.c(n.b(x).relu()) + x).relu(), 1).flatten(1))


def with_shortcut(n: Net, x: Tensor) -> Tensor:
    x = n.a(x).relu()
    return n.e((n.c(n.b(x).relu()) + n.d(x)).relu())


def pre_activation(n: Net, x: Tensor) -> Tensor:
    x = n.a(x)
    x = x + n.c(n.b(n.e(x).relu()).relu())
    return n.d(n.f(x).relu())


def inverted(n: Net, x: Tensor) -> Tensor:
    x = n.a(x)
    return n.e(x + n.d(F.relu6(n.c(F.relu6(n.b(x))))))


def gated(n: Net, x: Tensor) -> Tensor:
    x = n.a(x).relu()
    y = n.b(x)
    return n.d((x + y * n.c(y.mean((2, 3), keepdim=True)).sigmoid()).relu())


def unet(n: Net, x: Tensor) -> Tensor:
    x = n.a(x).relu()
    low = n.b(F.max_pool2d(x, 2)).relu()
    return n.c(torch.cat([x, F.interpolate(low, scale_factor=2.0)], 1))


def smooth_unet(n: Net, x: Tensor) -> Tensor:
    x = n.a(x).relu()
    low = n.b(F.max_pool2d(x, 2)).relu()
    return n.c(torch.cat([x, F.interpolate(low, scale_factor=2.0, mode="bilinear")], 1))


def convnext(n: Net, x: Tensor) -> Tensor:
    for _ in range(2):
        x = x + n.c(F.gelu(n.b(F.layer_norm(n.a(x).permute(0, 2, 3, 1), (4,))))).permute(0, 3, 1, 2)
    return x


def attend(n: Net, x: Tensor, mask: Tensor | None = None) -> Tensor:
    scores = n.a(x) @ n.b(x).transpose(1, 2)
    if mask is not None:
        scores = scores + (mask < 0)[:, None].float() * torch.finfo(torch.float32).min
    return n.d(scores.softmax(-1) @ n.c(x))


def post_norm(n: Net, x: Tensor, mask: Tensor) -> Tensor:
    x = F.layer_norm(x + attend(n, x, mask), (4,))
    return F.layer_norm(x + n.f(F.gelu(n.e(x))), (4,))


def pre_norm(n: Net, x: Tensor) -> Tensor:
    x = x + attend(n, F.layer_norm(x, (4,)))
    return n.g(x + n.f(F.gelu(n.e(F.layer_norm(x, (4,))))))


def shuffled(n: Net, x: Tensor) -> Tensor:
    left, right = n.a(x).relu().chunk(2, 1)
    return n.c(torch.cat([left, n.b(right).relu()], 1))


IMAGE, WORDS = (2, 4, 8, 8), (2, 3, 4)
ORT, RT, ET = "onnxruntime", "tensorrt", "executorch"


@dataclass(frozen=True)
class Row:
    """Says after which nodes a network is rounded: ``node > user, user`` for some users, ``node #`` in a group."""

    make: Callable[[], nn.Module]
    expected: dict[str, str]
    inputs: tuple[tuple[int, ...], ...] = (IMAGE,)
    floats: tuple[str, ...] = ()


def row(
    function: Any, *layers: nn.Module, inputs: Any = (IMAGE,), floats: tuple[str, ...] = (), **expected: str
) -> Row:
    return Row(lambda: Net(function, *layers), expected, inputs, floats)


ROWS = {
    # Layers in a row.
    "a convolution": row(lambda n, x: n.a(x), conv(), onnxruntime="x", tensorrt="x", executorch="x; conv2d"),
    "BatchNorm and an activation": row(
        lambda n, x: n.c(n.b(n.a(x)).relu()),
        *(conv(), nn.BatchNorm2d(4), conv()),
        **{ORT: "x; relu", RT: "x; relu", ET: "x; relu; conv2d_1"},
    ),
    "an activation before BatchNorm": row(
        lambda n, x: n.c(n.b(n.a(x).relu())),
        *(conv(), nn.BatchNorm2d(4), conv()),
        **{ORT: "x; relu; batch_norm", RT: "x; batch_norm"},
    ),
    "a smooth activation": row(
        lambda n, x: n.b(F.silu(n.a(x))),
        *convs(2),
        **{ORT: "x; conv2d; silu", RT: "x; silu", ET: "x; conv2d; silu; conv2d_1"},
    ),
    "depthwise": row(
        lambda n, x: n.b(F.hardtanh(n.a(x), 0.0, 4.0)),
        *(conv(groups=4), conv(groups=2)),
        **{ORT: "x; hardtanh", RT: "x; hardtanh"},
    ),
    "linear layers": row(
        lambda n, x: n.b(F.dropout(n.a(x).relu(), 0.5, n.training)),
        *linears(2),
        inputs=(WORDS,),
        **{ORT: "x; relu", RT: "x; relu", ET: "x; relu; linear_1"},
    ),
    "a convolution twice": row(lambda n, x: n.a(n.a(x).relu()), conv(), **{ORT: "x; relu", RT: "x; relu"}),
    "a float layer between": row(
        lambda n, x: n.c(n.b(n.a(x).relu()).relu()),
        *convs(3),
        floats=("b",),
        **{ORT: "x; relu; relu_1", RT: "x; relu_1"},
    ),
    "pools of both kinds": row(
        lambda n, x: n.h(F.avg_pool2d(F.max_pool2d(n.a(x).relu(), 2), 4).flatten(1)),
        *(conv(), *[nn.Identity()] * 6, nn.Linear(4, 2)),
        **{ORT: "x; relu; avg_pool2d", RT: "x; avg_pool2d", ET: "x; relu; avg_pool2d; linear"},
    ),
    "zeros around": row(
        lambda n, x: n.c(F.pad(F.silu(n.b(F.pad(n.a(x), (1, 1)))), (1, 1), value=0.5)),
        *convs(3),
        **{ORT: "x; conv2d; conv2d_1; pad_1", RT: "x; conv2d; pad_1"},
    ),
    "a recurrent layer": row(
        lambda n, x: n.c(n.b(n.a(x).relu().mean(3).transpose(1, 2))[0]),
        *(conv(), nn.LSTM(4, 4, batch_first=True), nn.Linear(4, 2)),
        **{ORT: "x > conv2d; relu; getitem", RT: "x > conv2d; getitem"},
    ),
    # Sums.
    "residual": row(
        residual,
        *(*convs(3), *[nn.Identity()] * 4, nn.Linear(4, 2)),
        **{
            ORT: "x; relu; relu_1; conv2d_2; relu_2; adaptive_avg_pool2d",
            RT: "x; max_pool2d; relu_1; adaptive_avg_pool2d",
            ET: "x; relu; relu_1; conv2d_2; relu_2; adaptive_avg_pool2d; linear",
        },
    ),
    "residual with a layer in the shortcut": row(
        with_shortcut,
        *convs(5),
        **{ORT: "x; relu; relu_1; conv2d_2; conv2d_3; relu_2", RT: "x; relu; relu_1; conv2d_3; relu_2"},
    ),
    "residual before the activation": row(
        pre_activation,
        *(*convs(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4)),
        **{
            ORT: "x; conv2d; relu; relu_1; conv2d_2; add; relu_2",
            RT: "x; conv2d > add; relu; relu_1; relu_2",
        },
    ),
    "inverted residual": row(
        inverted,
        *convs(5),
        **{ORT: "x; conv2d; relu6; relu6_1; conv2d_3; add", RT: "x; conv2d; relu6; relu6_1; add"},
    ),
    "a stem that stays float": row(
        with_shortcut,
        *convs(5),
        floats=("a", "d"),
        **{ORT: "relu > conv2d_1; relu_1; conv2d_2; relu_2", RT: "relu > conv2d_1; relu_1; relu_2"},
    ),
    "a last sum": row(
        lambda n, x: (n.b(n.a(x).relu()) + n.c(x)).relu(),
        *convs(3),
        **{ORT: "x; relu", RT: "x; relu", ET: "x; relu; conv2d_1; conv2d_2; relu_1"},
    ),
    "a gate": row(
        gated,
        *convs(4),
        **{
            ORT: "x; relu; conv2d_1; mean; conv2d_2; relu_1",
            RT: "x; relu > conv2d_1; mean; relu_1",
        },
    ),
    "a sum with the input": row(
        lambda n, x: n.b(n.a(x) + x), *convs(2), **{ORT: "x > conv2d; conv2d; add", RT: "x > conv2d; add"}
    ),
    "a sum with a constant": row(
        lambda n, x: n.b(n.a(x) + n.c.bias.view(4, 1, 1) + 1.0), *convs(3), **{ORT: "x; conv2d; add_1", RT: "x; add_1"}
    ),
    "a sum that spreads": row(
        lambda n, x: n.c(n.a(x) + n.b(x.mean((2, 3), keepdim=True))),
        *convs(3),
        **{ORT: "x > conv2d; conv2d; mean; conv2d_1; add", RT: "x > conv2d; mean; add"},
    ),
    "a sum with a factor": row(
        lambda n, x: n.c(torch.add(n.a(x), n.b(x), alpha=2)),
        *convs(3),
        **{ORT: "x; conv2d; conv2d_1; add", RT: "x; add"},
    ),
    # Concatenations.
    "dense": row(
        lambda n, x: n.c(torch.cat([y := n.a(x).relu(), n.b(y).relu()], 1)),
        *(conv(), conv(), conv(8)),
        **{ORT: "x; relu #; relu_1 #", RT: "x; relu > conv2d_1; cat"},
    ),
    "U-Net": row(
        unet,
        *(conv(), conv(), conv(8)),
        **{ORT: "x; relu #; relu_1 #", RT: "x; relu > max_pool2d; cat", ET: "x; relu #; relu_1 #; conv2d_2"},
    ),
    "U-Net with interpolation": row(
        smooth_unet, *(conv(), conv(), conv(8)), **{ORT: "x; relu #; relu_1; upsample_bilinear2d #"}
    ),
    "smooth activations joined": row(
        lambda n, x: n.c(torch.cat([F.silu(n.a(x)), F.silu(n.b(x))], 1)),
        *(conv(), conv(), conv(8)),
        **{ORT: "x; conv2d; conv2d_1; cat", RT: "x; cat"},
    ),
    "halves": row(shuffled, *(conv(), conv(2, 2), conv()), **{ORT: "x; relu #; relu_1 #", RT: "x; getitem_1; cat"}),
    "joined for the end": row(lambda n, x: torch.cat([n.a(x), n.b(x)], 1), *convs(2), **{ORT: "x", RT: "x"}),
    # Several readers.
    "an output in the middle": row(
        lambda n, x: (y := n.a(x).relu(), F.max_pool2d(y, 2), n.b(y)),
        *convs(2),
        **{ORT: "x; relu > conv2d_1", RT: "x; relu > conv2d_1", ET: "x; relu; conv2d_1"},
    ),
    "a value before and behind its activation": row(
        lambda n, x: n.b((y := n.a(x)).relu()) * n.c(y),
        *convs(3),
        **{ORT: "x; conv2d", RT: "x; conv2d > conv2d_2; relu"},
    ),
    "views of a value that stays": row(
        lambda n, x: n.a((y := F.layer_norm(x, (4,)))[None]) + n.b(y) + y,
        *linears(2),
        inputs=(WORDS,),
        **{ORT: "layer_norm > unsqueeze, linear_1", RT: "layer_norm > unsqueeze, linear_1"},
    ),
    "a view that floats read": row(
        lambda n, x: n.a(y := F.layer_norm(x, (4,)).transpose(1, 2).transpose(1, 2)) + y,
        *linears(1),
        inputs=(WORDS,),
        **{ORT: "transpose_1 > linear"},
    ),
    "the first of several": row(
        lambda n, x: n.b(F.layer_norm(n.a(x), (4,))[:, 0]), *linears(2), inputs=(WORDS,), **{ORT: "x; select"}
    ),
    # Transformers.
    "ConvNeXt": row(
        convnext,
        *(conv(groups=4), *linears(2)),
        **{
            ORT: "x > conv2d; conv2d; layer_norm; gelu; add > conv2d_1; conv2d_1; layer_norm_1; gelu_1",
            RT: "x > conv2d; layer_norm; gelu; add > conv2d_1; layer_norm_1; gelu_1",
        },
    ),
    "norms behind, and a mask": row(
        post_norm,
        *linears(6),
        inputs=(WORDS, (2, 3)),
        **{
            ORT: "x > linear, linear_1, linear_2; matmul_1; layer_norm > linear_4; gelu",
            RT: "x > linear, linear_1, linear_2; matmul_1; layer_norm > linear_4; gelu",
            ET: (
                "x > linear, linear_1, linear_2; linear; linear_1; linear_2; matmul_1; linear_3;"
                " layer_norm > linear_4; linear_4; gelu; linear_5"
            ),
        },
    ),
    "norms before": row(
        pre_norm, *linears(7), inputs=(WORDS,), **{ORT: "layer_norm; matmul_1; layer_norm_1; gelu; add_1"}
    ),
    "a convolution beside the stream": row(
        lambda n, x: n.b(F.layer_norm((y := F.layer_norm(x, (8,))) + n.a(y), (8,))),
        *(conv(), nn.Linear(8, 2)),
        **{ORT: "layer_norm > conv2d; conv2d; layer_norm_1", RT: "layer_norm > conv2d; layer_norm_1"},
    ),
    "words": row(
        lambda n, x: n.b(n.a(x.long().abs())),
        nn.Embedding(9, 4),
        nn.Linear(4, 4),
        inputs=((2, 3),),
        **{ORT: "embedding"},
    ),
}


@cache
def traced(name: str) -> tuple[GraphModule, list[Node]]:
    """A network's graph, and its int8 layers."""
    torch.manual_seed(0)
    row = ROWS[name]
    model = row.make().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(2.0, 3.0)
    graph = trace(model, Signature(tuple(torch.randn(size) for size in row.inputs), {})).graph
    names = {f"{name}.weight" for name in row.floats}
    return graph, [
        node for node in graph.graph.nodes if node.target in LAYERS and str(node.args[1].target) not in names
    ]


def in_words(found: list[Place]) -> str:
    groups = [place.group for place in found]
    words = []
    for place in found:
        users = "" if place.users is None else " > " + ", ".join(place.users)
        words.append(f"{place.after}{' #' if groups.count(place.group) > 1 else ''}{users}".replace("tensors_0", "x"))
    return "; ".join(words)


CASES = [(name, target) for name, row in ROWS.items() for target in row.expected]


@pytest.mark.parametrize(("name", "target"), CASES)
def test_values_are_rounded_where_the_rules_say(name: str, target: str) -> None:
    graph, layers = traced(name)
    assert in_words(places(graph, layers, TARGETS[target])) == ROWS[name].expected[target]


def test_openvino_takes_what_onnxruntime_takes() -> None:
    assert TARGETS["openvino"] == TARGETS["onnxruntime"]


class Seen(Interpreter):
    """Keeps the values of all nodes."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.values: dict[str, Any] = {}

    def run_node(self, n: Node) -> Any:
        self.values[n.name] = super().run_node(n)
        return self.values[n.name]


def on_grid(x: Tensor, scale: float) -> Tensor:
    return torch.round(x / scale) * scale


def is_on(x: Tensor, scale: float) -> bool:
    return torch.allclose(on_grid(x, scale), x, atol=1e-5)


@pytest.mark.parametrize("target", [ORT, RT, ET])
@pytest.mark.parametrize("name", ROWS)
def test_layers_read_codes_of_one_range_and_nothing_is_rounded_twice(name: str, target: str) -> None:
    graph, layers = traced(name)
    found = places(graph, layers, TARGETS[target])
    scales = {place.group: 0.07 * 1.0319**place.group for place in found}
    form = copy_graph(graph)
    nodes = {node.name: node for node in form.graph.nodes}
    for place in found:
        node = nodes[place.after]
        users = [user for user in node.users if place.users is None or user.name in place.users]
        with form.graph.inserting_after(node):
            call = form.graph.call_function(on_grid, (node, scales[place.group]))
        for user in users:
            user.replace_input_with(node, call)
    seen = Seen(form)
    with torch.no_grad():
        seen.run(*[torch.randn(size) for size in ROWS[name].inputs])
    assert found
    for layer in layers:
        read = seen.values[nodes[layer.name].args[0].name]
        assert read.any(), layer.name
        assert any(is_on(read, scale) for scale in scales.values()), layer.name
    for place in found:
        value = seen.values[place.after]
        assert value.dtype is torch.float32
        assert not any(is_on(value, scale) for scale in scales.values()), place.after
