"""An int8 kernel that computes something else than its layer isn't used, whatever stands beside it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.ao.nn.quantized as nnq
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress import QuantizationAwareTraining, StaticInt8, Targets, load_compressed, quantize
from lightning_compress.errors import CompressionError
from lightning_compress.quantization.convert import record_of
from lightning_compress.quantization.numerics.int8 import needs_reduced_range
from lightning_compress.quantization.static.flows import fx, kernels
from lightning_compress.quantization.static.flows.flow import Signature
from lightning_compress.quantization.static.traced import Traced
from lightning_compress.quantization.static.unit import Unit
from tests.quantization.prepared import form_modules, int8_layers
from tests.support.data import TinyData
from tests.support.modules import Classifier, quiet_trainer
from tests.support.oracles import assert_same_state
from tests.support.zoo import row


class Skip(nn.Module):
    """A branch of 5 channels beside a skip connection, as in a UNet."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Conv2d(3, 5, 3, padding=1)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([x, self.branch(x)], 1))


def images(samples: int = 4) -> Tensor:
    return 3.0 + torch.randn(samples, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def cosine(a: Tensor, b: Tensor) -> float:
    return F.cosine_similarity(a.detach().flatten(), b.detach().flatten(), dim=0).item()


def floats(model: nn.Module) -> dict[str, str]:
    record = record_of(model)
    assert record is not None
    return dict(record["floats"])


def noise_like(out: Tensor) -> Tensor:
    """Noise with the mean and the deviation of a quantized tensor."""
    values = out.dequantize()
    noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(0)) * values.std() + values.mean()
    return torch.quantize_per_tensor(noise, out.q_scale(), out.q_zero_point(), out.dtype)


Wrong = Callable[[int, Tensor], bool]
ALWAYS: Wrong = lambda call, x: True  # noqa: E731


@pytest.fixture
def mutate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Make the int8 kernels of convolutions into 5 channels give noise, when ``wrong(call, input)`` says so."""

    def patch(wrong: Wrong = ALWAYS) -> None:
        calls = 0
        right = nnq.Conv2d.forward

        def forward(self: Any, x: Tensor) -> Tensor:
            nonlocal calls
            out = right(self, x)
            if self.out_channels != 5:
                return out
            calls += 1
            return noise_like(out) if wrong(calls, x) else out

        monkeypatch.setattr(nnq.Conv2d, "forward", forward)

    yield patch


WRONG: dict[str, Wrong] = {
    "always": ALWAYS,
    "the second time": lambda call, x: call == 2,
    "for one sample": lambda call, x: len(x) == 1,
    "for an odd batch": lambda call, x: len(x) == 3,
    "where inputs are large": lambda call, x: bool((x.int_repr() > 250).float().mean() > 0.01),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_kernel_beside_a_skip_connection_is_not_used(wrong: str, mutate: Callable[..., None]) -> None:
    model, x = Skip().eval(), images()
    mutate(WRONG[wrong])
    int8 = quantize(model, calibration=[x]).eval()
    assert "computes something else" in floats(int8)["branch"]
    assert "head" in int8_layers(int8)  # the rest is int8
    assert cosine(int8(x), model(x)) > 0.999


def test_a_look_at_the_outputs_alone_would_let_it_through(
    mutate: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = Skip().eval(), images()
    mutate()
    monkeypatch.setattr(kernels, "STEPS", float("inf"))
    int8 = quantize(model, calibration=[x]).eval()
    assert "branch" not in floats(int8)
    assert 0.9 < cosine(int8(x), model(x)) < 0.999


def test_the_right_kernels_are_all_used() -> None:
    assert floats(quantize(Skip().eval(), calibration=[images()])) == {}


class Shifted(Skip):
    """A sum with a number has a range of its own, which torch's `cat` then takes for all that it joins, and clips."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([x + 3.0, self.branch(x)], 1))


@pytest.mark.filterwarnings("ignore:All inputs of this cat operator:UserWarning")
def test_a_wrong_operation_that_is_no_layer_splits_the_unit() -> None:
    model, x = Shifted().eval(), images() - 3.0
    int8 = quantize(model, calibration=[x]).eval()
    assert "computes something else" in floats(int8)[""]
    assert [unit["path"] for unit in (record_of(int8) or {})["units"]] == ["branch", "head"]
    assert cosine(int8(x), model(x)) > 0.999


def test_a_single_layer_with_a_wrong_kernel_has_nothing_to_quantize(mutate: Callable[..., None]) -> None:
    mutate()
    with pytest.raises(CompressionError, match="computes something else"):
        quantize(nn.Conv2d(3, 5, 3), calibration=[images()], flow="fx")
    with pytest.raises(CompressionError, match="0: its int8 kernel.*computes something else"):
        quantize(nn.Sequential(nn.Conv2d(3, 5, 3)), calibration=[images()], flow="fx")


class Images(Classifier):
    """`Skip` on images of 16 values."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Skip()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.view(-1, 1, 4, 4).expand(-1, 3, -1, -1)).mean((2, 3))


def test_training_leaves_a_layer_with_a_wrong_kernel_float(mutate: Callable[..., None]) -> None:
    mutate()
    module = Images()
    quiet_trainer(callbacks=[QuantizationAwareTraining()]).fit(module, TinyData())
    found = [reason for path, reason in floats(module).items() if path.endswith("branch")]
    assert len(found) == 1 and "computes something else" in found[0]
    assert any(isinstance(inner, nnq.Conv2d) for inner in form_modules(module).values())


def fitted(tmp_path: Path) -> Images:
    """A module that is prepared, on a machine with right kernels."""
    module = Images()
    trainer = quiet_trainer(callbacks=[QuantizationAwareTraining(convert=False)])
    trainer.fit(module, TinyData())
    trainer.save_checkpoint(tmp_path / "prepared.ckpt")
    return module


def test_a_kernel_that_is_wrong_when_hours_later_it_is_converted_is_told_of(
    mutate: Callable[..., None], tmp_path: Path
) -> None:
    module, x = fitted(tmp_path), torch.randn(8, 16)
    prepared = copy.deepcopy(module).eval()(x)
    mutate()
    trainer = quiet_trainer(callbacks=[QuantizationAwareTraining()])
    with pytest.warns(UserWarning, match=r"stay float: `.*branch`: its int8 kernel.*computes something else"):
        trainer.test(Images(), TinyData(), ckpt_path=tmp_path / "prepared.ckpt", verbose=False, weights_only=True)
    module = trainer.lightning_module
    assert any(path.endswith("branch") for path in floats(module))
    assert cosine(module(x), prepared) > 0.999
    trainer.save_checkpoint(tmp_path / "int8.ckpt")
    again = load_compressed(tmp_path / "int8.ckpt", Images())
    assert_same_state(again, module)
    assert torch.equal(again.eval()(x), module(x))


def test_what_was_found_wrong_is_judged_anew_when_it_is_converted_again(
    mutate: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fitted(tmp_path)
    module = load_compressed(tmp_path / "prepared.ckpt", Images())
    with monkeypatch.context():
        mutate()
        with pytest.warns(UserWarning, match="branch"):
            quiet_trainer(callbacks=[QuantizationAwareTraining()]).test(module, TinyData(), verbose=False)
    monkeypatch.undo()
    quiet_trainer(callbacks=[QuantizationAwareTraining()]).fit(module, TinyData())
    assert not any(path.endswith("branch") for path in floats(module))


# What is known to be wrong upstream, on this CPU or another.

KINDS: dict[str, Callable[[], nn.Module]] = {
    "1d": lambda: nn.ConvTranspose1d(4, 8, 2, 2),
    "2d": lambda: nn.ConvTranspose2d(4, 8, 2, 2),
    "3d": lambda: nn.ConvTranspose3d(4, 8, 2, 2),
    "like channels": lambda: nn.ConvTranspose2d(8, 8, 2, 2),
    "groups": lambda: nn.ConvTranspose2d(4, 8, 3, 2, groups=2),
    "dilation": lambda: nn.ConvTranspose2d(4, 8, 3, dilation=2),
    "output padding": lambda: nn.ConvTranspose2d(4, 8, 3, 2, 1, output_padding=1),
    "stride 1": lambda: nn.ConvTranspose2d(4, 8, 3),
    "no bias": lambda: nn.ConvTranspose2d(4, 8, 4, 2, 1, bias=False),
    "with BatchNorm": lambda: nn.Sequential(nn.ConvTranspose2d(4, 8, 2, 2), nn.BatchNorm2d(8), nn.ReLU()),
}


class Functional(nn.Module):
    """Calls a transposed convolution as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, self.weight, stride=2)


def around(up: nn.Module) -> tuple[nn.Module, Tensor]:
    """A network with ``up`` between two convolutions, and its input."""
    dims = 1 if "1d" in repr(up) else 3 if "3d" in repr(up) else 2
    conv, channels = getattr(nn, f"Conv{dims}d"), 8 if "(8, 8" in repr(up) else 4
    net = nn.Sequential(conv(3, channels, 1), up, conv(8, 4, 1)).eval()
    return net, torch.randn(4, 3, *[5] * dims)


@pytest.mark.parametrize(
    ("kind", "engine"), [*[(kind, "x86") for kind in (*KINDS, "functional")], ("2d", "onednn"), ("2d", "fbgemm")]
)
def test_transposed_convolutions_are_float_on_every_engine(kind: str, engine: str) -> None:
    net, x = around(Functional() if kind == "functional" else KINDS[kind]())
    int8 = quantize(net, StaticInt8(engine=engine), calibration=[x])
    kernels = form_modules(int8).values()
    assert not [inner for inner in kernels if isinstance(inner, nnq.modules.conv._ConvTransposeNd)]
    assert not [inner for inner in kernels if "quantized.conv_transpose" in getattr(inner, "code", "")]
    assert cosine(int8.eval()(x), net(x)) > 0.995
    if kind != "functional":
        assert any("right on every CPU" in reason for path, reason in floats(int8).items() if path.startswith("1"))


def test_targets_that_name_nothing_else_are_refused() -> None:
    net, x = around(nn.ConvTranspose2d(4, 8, 2, 2))
    with pytest.raises(CompressionError, match="`targets` must leave"):
        quantize(net, calibration=[x], targets=Targets(["1"]))


@pytest.mark.parametrize("channels", [4, 8])
def test_the_judgement_finds_torchs_own_wrong_kernel(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its kernel of oneDNN is right for equal channel counts alone, on every CPU.
    monkeypatch.setattr(fx, "WRONG_KERNELS", ())
    scheme, x = StaticInt8(engine="onednn"), torch.randn(4, 8, 6, 6)
    net = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ConvTranspose2d(8, channels, 3, 2)).eval()
    traced = Traced(Unit("", Signature((x,), {})), StaticInt8(), training=False).build_(net)
    traced.calibrating = True
    with torch.no_grad():
        traced.run(False, [x])
    wrong = fx.wrong_kernels(traced.graph, fx.convert(traced.graph, scheme), scheme, [x])
    assert list(wrong) == ([] if channels == 8 else ["1"])


def test_products_that_overflow_on_this_cpu_are_not_used() -> None:
    # 8-bit weights: right with VNNI, else pairs of products don't fit into 16 bits.
    net = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    with torch.no_grad():
        net[0].weight.copy_(net[0].weight.abs().clamp(min=0.1))
    x = torch.rand(32, 64)
    try:
        int8 = quantize(net, StaticInt8(reduce_range=False), calibration=[x], flow="fx").eval()
    except CompressionError as error:
        assert needs_reduced_range() and "computes something else" in str(error)
    else:
        assert cosine(int8(x), net(x)) > 0.999


# Nothing goes unjudged.


@pytest.mark.parametrize(
    ("name", "engine"),
    [*[(name, "x86") for name in ("conv_bn_relu", "depthwise", "concat", "attention", "lstm")], ("residual", "onednn")],
)
def test_every_kernel_is_judged_and_rounds_as_its_layer(name: str, engine: str) -> None:
    model, (args, _) = row(name).build().eval(), row(name).inputs(0)
    scheme = StaticInt8(engine=engine)
    traced = Traced(Unit("", Signature(args, {})), scheme, training=False).build_(model)
    traced.calibrating = True
    with torch.no_grad():
        traced.run(False, list(args))
    int8 = fx.convert(traced.graph, scheme)
    reference = fx._convert_with(fx.convert_to_reference_fx, traced.graph, scheme, ())
    run = kernels._Kernels(int8, None)
    with torch.no_grad():
        run.run(*args)
    layers = kernels._Layers(reference, run)
    judged: set[str] = set()
    for node in reference.graph.nodes:
        if node.target is torch.quantize_per_tensor:
            names = [one.name for one in (node, *kernels._between_roundings(node))]
            judged |= set(names[: next(i for i, one in enumerate(names) if one in run.given) + 1])
    given = [node for node in int8.graph.nodes if node.name in run.given]
    assert given
    assert [node.name for node in given if not judged & {node.name, node.stack_trace}] == []
    with torch.no_grad():
        layers.run(*args)
    assert max(layers.steps.values()) < 1.01


def test_a_judgement_draws_nothing_from_the_global_generators() -> None:
    model = Skip().eval()
    state = torch.get_rng_state()
    quantize(model, calibration=[images()])
    assert torch.equal(torch.get_rng_state(), state)
