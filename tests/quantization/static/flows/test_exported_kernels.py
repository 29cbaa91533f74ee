"""The pt2e flow: a layer, or a compiled graph, that computes something else than it should isn't used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from lightning_compress import NoEffectWarning, quantize
from lightning_compress.quantization.convert import record_of
from lightning_compress.quantization.static.flows import int8_graph, pt2e
from tests.quantization.static.flows.test_kernels import Skip, images


def cosine(a: Tensor, b: Tensor) -> float:
    return F.cosine_similarity(a.detach().flatten(), b.detach().flatten(), dim=0).item()


def noise_like(out: Tensor) -> Tensor:
    noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    return noise * out.detach().std() + out.detach().mean()


def spoil_(graph: GraphModule, is_spoilt: Callable[[Any], bool]) -> bool:
    """Let the operations that ``is_spoilt`` give noise, with their names kept; whether there were any."""
    found = [node for node in graph.graph.nodes if node.op == "call_function" and is_spoilt(node)]
    for node in found:
        right = node.target
        node.target = lambda *args, right=right: noise_like(right(*args))
    graph.recompile()
    return bool(found)


def is_branch(node: Any) -> bool:
    return "conv2d" in str(node.target) and any("branch_bias" in str(one) for one in node.all_input_nodes)


def test_a_wrong_layer_beside_a_skip_connection_stays_float(monkeypatch: pytest.MonkeyPatch) -> None:
    right = pt2e.convert_pt2e

    def wrong(prepared: GraphModule) -> GraphModule:
        converted = right(prepared)
        int8 = any("dequantize" in str(one) for node in converted.graph.nodes if is_branch(node) for one in node.args)
        if int8:
            assert spoil_(converted, is_branch)
        return converted

    monkeypatch.setattr(pt2e, "convert_pt2e", wrong)
    model, x = Skip().eval(), images()
    int8 = quantize(model, calibration=[x], flow="pt2e").eval()
    record = record_of(int8) or {}
    assert "computes something else" in record["floats"]["branch"]
    assert [unit["path"] for unit in record["units"]] == [""]
    with torch.compiler.set_stance("force_eager"):
        assert cosine(int8(x), model(x)) > 0.999


@pytest.mark.parametrize("is_off", [False, True], ids=["right", "wrong"])
def test_what_the_compiler_makes_is_judged_at_its_first_call(is_off: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def compiler(graph: GraphModule, inputs: Any) -> Any:
        if is_off:
            convolutions = [node for node in graph.graph.nodes if "conv2d" in str(node.target)]
            assert spoil_(graph, lambda node: node is convolutions[0])
        return graph.forward

    monkeypatch.setattr(int8_graph, "compile_fx", compiler)
    model, x = Skip().eval(), images()
    if not is_off:
        assert cosine(quantize(model, calibration=[x], flow="pt2e").eval()(x), model(x)) > 0.999
        return
    with pytest.warns(NoEffectWarning, match="something else, by .* where rounding explains"):
        got = quantize(model, calibration=[x], flow="pt2e").eval()(x)
    assert cosine(got, model(x)) > 0.999


def test_transposed_convolutions_are_float_and_told_of() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 8, 2, 2), nn.Conv2d(8, 4, 1)).eval()
    int8 = quantize(model, calibration=[images()], flow="pt2e").eval()
    assert "right on every CPU" in (record_of(int8) or {})["floats"]["1"]
    with torch.compiler.set_stance("force_eager"):
        assert cosine(int8(images()), model(images())) > 0.999
