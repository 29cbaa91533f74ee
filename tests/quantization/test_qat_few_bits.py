"""`QuantizationAwareTraining` with a `WeightOnly` scheme: what was trained is what runs in few bits afterwards."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_compress import (
    CompressionError,
    QuantizationAwareTraining,
    ScheduledPruning,
    Targets,
    WeightOnly,
    Window,
    quantize,
)
from tests.quantization.few_bits_fits import packed, qat, rounded, trained_in_few_bits
from tests.quantization.lora.fits import At, Net, fit, mlp
from tests.support.data import TinyData, keyword_loader
from tests.support.modules import Classifier, KeywordClassifier, ManualClassifier, ZooModule, quiet_trainer
from tests.support.oracles import (
    assert_same_state,
    hooks,
    snapshot,
)
from tests.support.zoo import row

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory:UserWarning"),
]


@pytest.mark.parametrize("group_size", [None, 8, 16])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_the_converted_model_computes_what_the_fake_quantized_one_computed(bits: int, group_size: int | None) -> None:
    module = Net(mlp(24, 32, 4))
    if group_size == 16:
        module = Net(mlp(32, 32, 4))
    fit(qat(bits, group_size, convert=False), module=module)
    layers = ["net.0", "net.2", *(["net.4"] if bits == 8 else [])]  # the last layer stays float in few bits
    assert trained_in_few_bits(module) == layers
    x = torch.randn(64, 16)
    with torch.no_grad():
        fake = module.eval()(x)
        inner = module.net[0](x)
        expected = F.linear(x, rounded(module.net[0].weight.detach(), bits, group_size), module.net[0].bias)
        torch.testing.assert_close(inner, expected, rtol=1e-5, atol=1e-5)
        quiet_trainer(callbacks=[qat(bits, group_size)]).test(module, TinyData(), verbose=False)
        assert {weight.bits for weight in packed(module).values()} == {bits}
        torch.testing.assert_close(module(x), fake, rtol=1e-5, atol=1e-6)
    assert list(packed(module)) == layers


def test_gradients_pass_straight_through() -> None:
    module = Net(mlp(24, 4))
    fit(qat(4, convert=False), module=module)
    x = torch.randn(7, 16, requires_grad=True)
    layer = module.net[0]
    y = layer(x)
    upstream = torch.randn_like(y)
    got_x, got_w, got_b = torch.autograd.grad(y, (x, layer.weight, layer.bias), upstream)
    weight = layer.weight.detach()
    torch.testing.assert_close(got_x, upstream @ rounded(weight, 4, None), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got_b, upstream.sum(0), rtol=1e-5, atol=1e-5)
    # The largest of each row sets the scale, which has a gradient too.
    others = weight.abs() < 0.93 * weight.abs().amax(1, keepdim=True)
    assert others.sum() > 300
    torch.testing.assert_close(got_w[others], (upstream.T @ x.detach())[others], rtol=0.02, atol=1e-3)


def test_parameters_are_the_same_objects_in_the_same_order() -> None:
    module = Classifier()
    names, identities = [n for n, _ in module.named_parameters()], [id(p) for p in module.parameters()]
    seen: list[Any] = []

    def look(trainer: L.Trainer, pl_module: Any) -> None:
        seen.append(([n for n, _ in pl_module.named_parameters()], [id(p) for p in pl_module.parameters()]))
        assert trained_in_few_bits(pl_module) == ["body"]
        held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
        assert held == set(identities)

    before = snapshot(module)
    fit(qat(4, 8, convert=False), At(on_train_epoch_end=look), module=module)
    assert seen == [(names, identities)] * 2
    after = snapshot(module)
    assert all(not torch.equal(before[name], after[name]) for name in names)  # all of them learn
    assert hooks(module) == []


def test_training_equals_a_loop_over_torchaos_own_preparation() -> None:
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    module, data = Net(mlp(24, 4)), TinyData()
    plain = copy.deepcopy(module.net)
    fit(qat(3, 8, convert=False), module=module, data=data)
    config = IntxFakeQuantizeConfig(torch.int3, group_size=8, scale_precision=torch.bfloat16)
    quantize_(plain, QATConfig(weight_config=config, step="prepare"), filter_fn=lambda layer, path: path == "0")
    optimizer = torch.optim.SGD(plain.parameters(), lr=module.lr, momentum=0.9)
    for _ in range(2):
        for x, y in data.train_dataloader():
            optimizer.zero_grad()
            F.cross_entropy(plain(x), y).backward()
            optimizer.step()
    assert_same_state(dict(module.net.named_parameters()), dict(plain.named_parameters()))


class Adaptive(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


@pytest.mark.slow
def test_two_bits_are_better_trained_than_rounded_afterwards() -> None:
    # The order in which a CPU adds decides where a single fit ends; at a small rate, and over three, it doesn't matter.
    losses = torch.tensor([losses_afterwards_and_trained(2, seed) for seed in (2, 3, 4)])
    afterwards, trained = losses.sum(0).tolist()
    assert trained < afterwards


def losses_afterwards_and_trained(bits: int, seed: int) -> tuple[float, float]:
    torch.manual_seed(seed)
    everything = Targets(include=["net.0", "net.2", "net.4", "net.6"])
    data = TinyData(200, 16)
    _, plain = fit(module=Adaptive(mlp(32, 32, 32, 4), lr=0.01), data=data, max_epochs=10, limit_val_batches=0)
    plain.lr = 0.001
    # As long again for both: the float model doesn't gain what rounding then costs.
    _, longer = fit(module=copy.deepcopy(plain), data=data, max_epochs=10, limit_val_batches=0)
    _, trained = fit(qat(bits, 8, targets=everything), module=plain, data=data, max_epochs=10, limit_val_batches=0)
    assert len(packed(trained)) == 4
    x, y = data.train.tensors
    with torch.no_grad():
        rounded_after = quantize(longer.eval(), WeightOnly(bits, 8), targets=everything)
        return float(F.cross_entropy(rounded_after.eval()(x), y)), float(F.cross_entropy(trained.eval()(x), y))


# Which layers.


class Words(KeywordClassifier):
    """An embedding, and a layer whose inputs don't divide into groups of 8."""

    def __init__(self, sparse: bool = False, padding: int | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16, padding_idx=padding, sparse=sparse)
        self.body = nn.Linear(16, 30)
        self.middle = nn.Linear(30, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, ids: Tensor, mask: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        return self.head(self.middle(self.body(self.embedding(ids)).relu()).relu().mean(1))


def fit_words(*callbacks: Callback, module: Any = None) -> Any:
    module = module or Words()
    quiet_trainer(callbacks=list(callbacks)).fit(module, keyword_loader(), keyword_loader())
    return module


def test_layers_that_do_not_divide_train_in_float_and_are_listed() -> None:
    callback = qat(4, 8)
    seen: list[list[str]] = []
    module = fit_words(callback, At(on_train_epoch_end=lambda t, m: seen.append(trained_in_few_bits(m))))
    assert seen == [["body"]]
    assert list(packed(module)) == ["body", "middle"]
    assert any("middle" in note and "trained in float" in note for note in callback.report_notes())
    assert any("head" in note for note in callback.report_notes())
    assert any("embedding" in note for note in callback.report_notes())


@pytest.mark.parametrize("padding", [None, 0, -1])
def test_embeddings_are_trained_when_they_are_named(padding: int | None) -> None:
    targets = Targets(include=["embedding", "body"])
    module = fit_words(qat(4, 8, targets=targets, convert=False), module=Words(padding=padding))
    assert sorted(trained_in_few_bits(module)) == ["body", "embedding"]
    ids = torch.arange(20)
    with torch.no_grad():
        fake = module.eval().embedding(ids)
        torch.testing.assert_close(fake, rounded(module.embedding.weight.detach(), 4, 8), rtol=1e-5, atol=1e-6)
        if padding is not None:
            assert not fake[padding].any()
        quiet_trainer(callbacks=[qat(4, 8)]).test(module, keyword_loader(), verbose=False)
        assert sorted(packed(module)) == ["body", "embedding"]
        torch.testing.assert_close(module.embedding(ids), fake, rtol=1e-5, atol=1e-6)


def test_an_embedding_with_sparse_gradients_trains() -> None:
    class Sparse(Words):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Sparse(sparse=True)
    before = snapshot(module)
    fit_words(qat(4, 8, targets=Targets(include=["embedding", "body"]), convert=False), module=module)
    assert not torch.equal(before["embedding.weight"], module.embedding.weight)


def test_an_embedding_that_renormalizes_stays_float() -> None:
    module = Words()
    module.embedding = nn.Embedding(20, 16, max_norm=1.0)
    callback = qat(4, 8, targets=Targets(include=["embedding", "body"]))
    fit_words(callback, module=module)
    assert list(packed(module)) == ["body"]
    assert any("embedding" in note and "max_norm" in note for note in callback.report_notes())


def test_tied_embedding_and_head_share_their_codes() -> None:
    class Tied(Words):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.middle = nn.Linear(16, 32), nn.Linear(32, 16)
            self.head = nn.Linear(16, 20, bias=False)
            self.head.weight = self.embedding.weight

    callback = qat(4, 8, targets=Targets(include=["embedding", "head", "body"]), convert=False)
    module = fit_words(callback, module=Tied())
    assert module.head.weight is module.embedding.weight
    ids = torch.randint(20, (3, 5))
    with torch.no_grad():
        fake = module.eval()(ids)
        quiet_trainer(callbacks=[QuantizationAwareTraining(WeightOnly(4, 8))]).test(
            module, keyword_loader(), verbose=False
        )
        torch.testing.assert_close(module(ids), fake, rtol=1e-5, atol=1e-6)
    found, state = packed(module), module.state_dict()
    assert found["embedding"] is found["head"]
    assert state["embedding.weight"].data_ptr() == state["head.weight"].data_ptr()


@pytest.mark.parametrize(
    "name",
    ["mlp", "conv_bn_relu", "attention", "transformer", "tied", "shared", "keyword_only"],
)
def test_over_the_zoo_trains_converts_tests_and_trains_again(name: str) -> None:
    module = ZooModule(row(name))
    identities = [id(parameter) for parameter in module.parameters()]
    fit_zoo = qat(4, convert=False)
    quiet_trainer(callbacks=[fit_zoo]).fit(module)
    args, kwargs = row(name).inputs(0)
    with torch.no_grad():
        fake = module.eval()(*args, **kwargs)
        layers = trained_in_few_bits(module.train())
        trainer = quiet_trainer(callbacks=[qat(4)])
        trainer.test(module, verbose=False)
        assert packed(module)
        if set(packed(module)) == set(layers):
            # Few rows go through a kernel that rounds them to bfloat16.
            torch.testing.assert_close(module.eval()(*args, **kwargs), fake, rtol=0.02, atol=0.02)
    module.train()
    quiet_trainer(callbacks=[qat(4, convert=False)]).fit(module)
    assert not packed(module)
    assert [id(parameter) for parameter in module.parameters()] == identities


def test_convolutions_are_rounded_when_the_fit_ends_and_said_so() -> None:
    module, callback = ZooModule(row("conv_bn_relu")), qat(4, convert=False)
    quiet_trainer(callbacks=[callback]).fit(module)
    assert any("trained in float, rounded when the fit ends" in note for note in callback.report_notes())
    convolutions = [path for path, inner in module.named_modules() if type(inner) is nn.Conv2d]
    assert convolutions and not set(convolutions) & set(trained_in_few_bits(module))


def test_torchs_encoder_evaluates_what_it_trained() -> None:
    module = ZooModule(row("transformer"))
    quiet_trainer(callbacks=[qat(2, convert=False)]).fit(module)
    layers = trained_in_few_bits(module)
    assert layers
    args, kwargs = row("transformer").inputs(0)
    weights = {path: module.get_submodule(path).weight.detach() for path in layers}
    reference = ZooModule(row("transformer"))
    state = module.state_dict()
    state |= {f"{path}.weight": rounded(weight, 2, None) for path, weight in weights.items()}
    reference.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(
            module.eval()(*args, **kwargs), reference.eval()(*args, **kwargs), rtol=1e-4, atol=1e-5
        )


# Overrides under a static scheme.


def test_overrides_beside_static_int8() -> None:
    class Long(Classifier):
        """`forward` can't be traced as a whole; the layers are quantized on their own."""

        def __init__(self) -> None:
            super().__init__()
            self.middle = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.body(self.flatten(x))).relu()
            if x.sum() > 1e9:
                x = -x
            return self.head(self.middle(x).relu())

    callback = QuantizationAwareTraining("int8_static", overrides={"middle": WeightOnly(3, 8)}, convert=False)
    _, module = fit(callback, module=Long())
    x = torch.randn(16, 16)
    assert trained_in_few_bits(module) == ["middle"]
    hidden = torch.randn(16, 32)
    with torch.no_grad():
        fake = module.eval().middle(hidden)
        torch.testing.assert_close(
            fake,
            F.linear(hidden, rounded(module.middle.weight.detach(), 3, 8), module.middle.bias),
            rtol=1e-5,
            atol=1e-5,
        )
        whole = module(x)
        test = QuantizationAwareTraining("int8_static", overrides={"middle": WeightOnly(3, 8)})
        quiet_trainer(callbacks=[test]).test(module, TinyData(), verbose=False)
        assert [weight.bits for weight in packed(module).values()] == [3]
        torch.testing.assert_close(module.middle(hidden), fake, rtol=1e-5, atol=1e-6)
        assert (module(x) - whole).abs().mean() < 0.05 * (whole.max() - whole.min())


def test_the_last_override_that_matches_wins() -> None:
    callback = qat(4, 8, overrides={"net.*": WeightOnly(2), "net.2": WeightOnly(6, 8)})
    _, module = fit(callback, module=Net(mlp(24, 24, 24, 4)))
    assert {path: weight.bits for path, weight in packed(module).items()} == {"net.0": 2, "net.2": 6, "net.4": 2}


# Refusals.


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        (WeightOnly(4, 8, symmetric=False), "`scheme` must be symmetric for training.*symmetric=True"),
        ("nf4", "`scheme` must be int8_static or weight-only"),
        ("gptq", "`scheme` must be int8_static or weight-only"),
        ("int4_weight_onli", "Nearest: int4_weight_only"),
    ],
    ids=str,
)
def test_schemes_that_cannot_be_trained_are_refused(scheme: Any, words: str) -> None:
    with pytest.raises(CompressionError, match=words):
        QuantizationAwareTraining(scheme)


def test_a_flow_for_int8_alone_and_other_bad_arguments() -> None:
    with pytest.raises(CompressionError, match="`flow` must be"):
        QuantizationAwareTraining(WeightOnly(4), flow="pt2e")  # type: ignore[arg-type]
    with pytest.raises(CompressionError, match="boddy"):
        fit(qat(4, targets=Targets(include=["boddy"])))


def test_a_module_with_nothing_to_train_in_few_bits_is_an_error_that_changes_nothing() -> None:
    module = Net(nn.Sequential(nn.Unflatten(1, (1, 16)), nn.AvgPool1d(4), nn.Flatten(), nn.PReLU()))
    before = snapshot(module)
    with pytest.raises(CompressionError, match="quantize"):
        fit(qat(4), module=module)
    assert_same_state(before, snapshot(module))


# Fits of every kind.


def test_a_window_that_opens_late() -> None:
    forms: list[bool] = []
    note = At(on_train_batch_end=lambda t, m: forms.append(bool(trained_in_few_bits(m))))
    _, module = fit(qat(4, 8, window=Window(9, unit="step")), note)
    assert forms == [False] * 9 + [True] * 5
    assert list(packed(module)) == ["body"]


@pytest.mark.parametrize(
    "options",
    [{"precision": "bf16-mixed"}, {"gradient_clip_val": 0.01}, {"accumulate_grad_batches": 3}],
    ids=str,
)
def test_a_fit_with_other_settings_of_the_trainer(options: dict[str, Any]) -> None:
    _, module = fit(qat(4, 8), **options)
    assert list(packed(module)) == ["body"]
    quiet_trainer().test(module, TinyData(), verbose=False)


# Dynamo makes an instance of torchao's rounding function while it traces it.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_manual_optimization_and_a_compiled_submodule() -> None:
    _, module = fit(qat(4, 8), module=ManualClassifier())
    assert list(packed(module)) == ["body"]
    compiled = Net(mlp(24, 4))
    compiled.net = torch.compile(compiled.net, backend="eager")
    fit(qat(4, 8), module=compiled)
    assert len(packed(compiled)) == 1


def test_preparing_draws_nothing_from_the_global_generators() -> None:
    states = []
    for callbacks in ([], [qat(4, 8)]):
        fit(*callbacks, module=Net(mlp(24, 24, 4)))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


class Stop(Callback):
    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 5:
            raise KeyboardInterrupt


def test_ctrl_c_leaves_a_float_module_that_trains_on() -> None:
    module = Classifier()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(qat(4, 8), Stop(), module=module)
    assert list(module.state_dict()) == list(Classifier().state_dict())
    assert not trained_in_few_bits(module) and type(module.body) is nn.Linear and hooks(module) == []
    fit(qat(4, 8), module=module)
    assert list(packed(module)) == ["body"]


@pytest.mark.parametrize("same", [True, False], ids=["the same callback", "a new one"])
def test_a_second_fit_trains_the_float_weights_on(same: bool) -> None:
    callback = qat(4, 8)
    _, module = fit(callback)
    assert list(packed(module)) == ["body"]
    start: dict[str, Any] = {}
    note = At(on_train_start=lambda t, m: start.update(snapshot(m)))
    fit(callback if same else qat(4, 8), note, module=module.train())
    assert start["body.weight"].dtype == torch.float32
    assert len(start["body.weight"].unique()) > 100  # the float weights, not the rounded ones
    assert list(packed(module)) == ["body"]


def test_a_second_fit_with_other_bits_is_heard() -> None:
    _, module = fit(qat(4, 8))
    try:
        fit(qat(2, 8), module=module.train())
    except (CompressionError, UserWarning):
        return
    assert {weight.bits for weight in packed(module).values()} == {2}


def test_copies_and_pickles() -> None:
    callback = qat(4, 8, convert=False)
    _, module = fit(callback)
    x = torch.randn(4, 16)
    twin = copy.deepcopy(module)
    assert torch.equal(twin.eval()(x), module.eval()(x))
    with torch.no_grad():
        twin.body.weight.add_(1.0)
    assert not torch.equal(twin(x), module(x))
    for again in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        fit(again)
    _, converted = fit(qat(4, 8))
    again = pickle.loads(pickle.dumps(converted))
    assert torch.equal(again.eval()(x), converted.eval()(x))


def test_a_weight_that_is_computed_meanwhile_is_what_is_rounded() -> None:
    class Halved(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    _, module = fit(qat(4, 8, convert=False), max_epochs=1)
    x, halved = torch.randn(5, 16), rounded(module.body.weight.detach() / 2, 4, 8)
    nn.utils.parametrize.register_parametrization(module.body, "weight", Halved())
    torch.testing.assert_close(module.body(x), F.linear(x, halved, module.body.bias), rtol=1e-5, atol=1e-5)


def test_with_pruning_zeros_stay_zero() -> None:
    pruning = ScheduledPruning(sparsity=0.5, targets=Targets(include=["body"]))
    _, module = fit(pruning, qat(4, 8))
    [weight] = packed(module).values()
    mask = pruning.masks["body.weight"].bool()
    assert (weight()[~mask] == 0).all()
    assert int((~mask).sum()) == mask.numel() // 2


def test_a_forward_that_asks_for_the_very_type_is_told_of_when_it_passes_over_layers() -> None:
    class Asks(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x) if type(self.body) is nn.Linear else x.new_zeros(len(x), 32))

    module, qat = Asks(), QuantizationAwareTraining("int4_weight_only")
    quiet_trainer(callbacks=[qat]).fit(module, TinyData())
    assert any("`body` left out" in note for note in qat.report_notes())
