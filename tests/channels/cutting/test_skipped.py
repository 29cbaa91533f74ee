"""A module that computes nothing any more: what it gives back, and how it is copied, saved, compiled and exported."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.channels.cutting.skipped import pass_over_, set_skipped_
from lightning_compress.channels.cutting.written import set_written_
from tests.support.residual import Attention, BasicBlock

X = torch.arange(24.0).view(1, 3, 8)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, other: Any, x: Tensor) -> Any:
        return self.layer(x)


@pytest.mark.parametrize(
    ("skip", "given"),
    [
        (["identity", "x", 1, "", 1, 0], X),
        (["zero", "x", 1, "", 1, 0], torch.zeros_like(X)),
        (["identity", "x", 1, "tuple", 3, 1], (None, X, None)),
        (["zero", "x", 1, "list", 1, 0], [torch.zeros_like(X)]),
    ],
)
def test_what_a_skipped_module_gives_back(skip: list[Any], given: Any) -> None:
    module = Named()
    set_skipped_(module, skip)
    for out in (module(None, X), module(None, x=X), module(x=X, other=None)):
        assert type(out) is type(given)
        for got, wanted in zip(*(x if isinstance(x, (list, tuple)) else [x] for x in (out, given)), strict=True):
            assert got is wanted is None or torch.equal(got, wanted)


def through_pickle(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def through_file(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def parent(block: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(8, 8, 1), block)


FORMS: dict[str, Callable[[nn.Module], Any]] = {
    "copied": copy.deepcopy,
    "pickled": through_pickle,
    "saved": through_file,
    "compiled": lambda module: torch.compile(module, backend="eager", fullgraph=True),
    "traced by fx": torch.fx.symbolic_trace,
    "exported": lambda module: torch.export.export(module, (IMAGE,)).module(),
    "traced by jit": lambda module: torch.jit.trace(module, (IMAGE,)),
}
IMAGE = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("form", FORMS)
def test_it_gets_through(form: str) -> None:
    model = parent(BasicBlock(8)).eval()
    set_skipped_(model[1], ["identity", "x", 0, "", 1, 0])
    with torch.no_grad():
        assert torch.equal(FORMS[form](model)(IMAGE), model[0](IMAGE))


def test_it_is_the_users_class_with_its_hooks() -> None:
    block, seen = BasicBlock(8), []
    block.register_forward_hook(lambda module, args, out: seen.append(out))
    set_skipped_(block, ["identity", "x", 0, "", 1, 0])
    assert isinstance(block, BasicBlock) and type(block).__name__ == "BasicBlock"
    block(IMAGE)
    assert torch.equal(seen[0], IMAGE)


def test_taken_back_it_computes_as_before() -> None:
    plain = BasicBlock(8).eval()
    before = plain(IMAGE)
    for _ in range(2):
        set_skipped_(plain, ["zero", "x", 0, "", 1, 0])
        set_skipped_(plain, None)
    assert type(plain) is BasicBlock and torch.equal(plain(IMAGE), before)


def test_sizes_that_were_corrected_before_are_so_again() -> None:
    block = Attention(16, heads=2)
    block.qkv, block.out = nn.Linear(16, 24), nn.Linear(8, 16)  # one head of two has left
    set_written_(block, [["view", 3, [[2, 48, 24, 24]], 5, [[2, 3, 3], [3, 2, 1], [4, 8, 8]]]])
    x = torch.randn(1, 3, 16)
    before = block(hidden_states=x)[0]
    set_skipped_(block, ["zero", "hidden_states", 1, "tuple", 2, 0])
    assert not block(hidden_states=x)[0].any()
    assert torch.equal(through_pickle(block)(hidden_states=x)[0], torch.zeros_like(x))
    set_skipped_(block, None)
    assert torch.equal(block(hidden_states=x)[0], before)


@pytest.mark.parametrize("fast", [True, False])
def test_torchs_fused_layer_doesnt_read_the_weights_of_an_attention_that_is_skipped(fast: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True).eval()
    with torch.inference_mode():
        whole = layer(X)
        set_skipped_(layer.self_attn, ["zero", "query", 0, "tuple", 2, 0])
        torch.backends.mha.set_fastpath_enabled(fast)
        try:
            out = layer(X)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        torch.testing.assert_close(out, X + layer._ff_block(layer.norm2(X)))
        set_skipped_(layer.self_attn, None)
        torch.testing.assert_close(layer(X), whole)


def test_ddp_is_told_what_gets_no_gradients_and_what_the_user_told_it_stays() -> None:
    model = nn.Module()
    model.net = parent(BasicBlock(8))
    model._ddp_params_and_buffers_to_ignore = ["net.0.bias"]
    pass_over_(model)
    assert model._ddp_params_and_buffers_to_ignore == ["net.0.bias"]
    set_skipped_(model.net[1], ["identity", "x", 0, "", 1, 0])
    pass_over_(model)
    inside = {name for name in model.state_dict() if name.startswith("net.1.")}
    assert set(model._ddp_params_and_buffers_to_ignore) == {"net.0.bias", *inside}
    set_skipped_(model.net[1], None)
    pass_over_(model)
    assert model._ddp_params_and_buffers_to_ignore == ["net.0.bias"]
