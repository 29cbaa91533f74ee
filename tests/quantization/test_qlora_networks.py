"""`QLoRA` on networks of every kind, and what memory it takes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
)
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_compress import (
    QLoRA,
    Targets,
)
from tests.quantization.lora.fits import At, Held, Net, adapted_layers, fit, mlp
from tests.support.data import TinyData, keyword_loader
from tests.support.modules import Classifier, KeywordClassifier, ZooModule, quiet_trainer
from tests.support.zoo import row

# Networks of every kind.


@pytest.mark.parametrize("name", ["mlp", "attention", "transformer", "tied", "shared", "keyword_only", "dict"])
def test_over_the_zoo_trains_evaluates_and_merges(name: str) -> None:
    module = ZooModule(row(name))
    keys = list(module.state_dict())
    identities = {n: p.data_ptr() for n, p in module.named_parameters(remove_duplicate=False)}
    same = [(a, b) for a in identities for b in identities if a < b and identities[a] == identities[b]]
    qlora = QLoRA(rank=2)
    trainer = quiet_trainer(max_epochs=2, callbacks=[qlora])
    trainer.fit(module)
    layers = adapted_layers(module)
    assert layers and all(layer.lora_B.detach().any() for layer in layers.values())
    trainer.test(module, verbose=False)
    merged = qlora.merge()
    assert list(merged.state_dict()) == keys
    again = {n: p.data_ptr() for n, p in merged.named_parameters(remove_duplicate=False)}
    assert [(a, b) for a in again for b in again if a < b and again[a] == again[b]] == same
    args, kwargs = row(name).inputs(5)
    with torch.no_grad():
        module.eval(), merged.eval()
        torch.testing.assert_close(merged(*args, **kwargs), module(*args, **kwargs), rtol=1e-4, atol=1e-4)
    ZooModule(row(name)).load_state_dict(merged.state_dict(), strict=True)


def test_a_module_under_two_names_has_one_adapter() -> None:
    block = nn.Linear(16, 16)
    module = Net(nn.Sequential(block, nn.ReLU(), block, nn.ReLU(), nn.Linear(16, 4)))
    held = Held()
    qlora = QLoRA(rank=2)
    fit(qlora, held, module=module)
    assert len(held.names) == 2
    merged = qlora.merge()
    assert merged.net[0] is merged.net[2]
    x = torch.randn(4, 16)
    with torch.no_grad():
        torch.testing.assert_close(merged.eval()(x), module.eval()(x), rtol=1e-5, atol=1e-5)


def test_tied_weights_stay_float_and_tied_and_say_so() -> None:
    class Tied(KeywordClassifier):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(16, 20, bias=False)
            self.out.weight = self.embedding.weight
            self.narrow = nn.Linear(20, 32)

        def forward(self, ids: Tensor, mask: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
            return self.head(self.narrow(self.out(self.embedding(ids))).mean(1))

    module, qlora = Tied(), QLoRA(rank=2, targets=Targets(include=["out", "narrow"]))
    quiet_trainer(callbacks=[qlora]).fit(module, keyword_loader(), keyword_loader())
    assert module.out.weight is module.embedding.weight
    assert "out" not in adapted_layers(module) and "narrow" in adapted_layers(module)
    assert any("out" in note and "tied" in note for note in qlora.report_notes())
    merged = qlora.merge()
    assert merged.out.weight is merged.embedding.weight


def test_a_weight_that_the_module_itself_holds_too_is_left_alone() -> None:
    class Holds(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.middle = nn.Linear(32, 32)
            self.kept = self.body.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.middle(self.norm(self.body(x)).relu() + self.kept.sum()).relu())

    module, qlora = Holds(), QLoRA(rank=2, targets=Targets(include=["body", "middle"]))
    fit(qlora, module=module)
    assert module.kept is module.body.weight
    assert list(adapted_layers(module)) == ["middle"]


class Encoder(Classifier):
    """torch's encoder, whose evaluation reads weights and calls no layers."""

    def __init__(self) -> None:
        L.LightningModule.__init__(self)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, 4)
        self.lr = 0.05

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x.view(-1, 2, 8)).mean(1))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_torchs_encoder_evaluates_what_it_trained() -> None:
    module, qlora = Encoder(), QLoRA(rank=2)
    trainer, _ = fit(qlora, module=module)
    assert {path.rpartition(".")[2] for path in adapted_layers(module)} == {"linear1", "linear2"}
    x = torch.randn(6, 16)
    with torch.no_grad():
        training = module.train()(x)
        torch.testing.assert_close(module.eval()(x), training, rtol=1e-5, atol=1e-6)
        with torch.inference_mode():
            torch.testing.assert_close(module(x), training, rtol=1e-5, atol=1e-6)
        merged = qlora.merge()
        torch.testing.assert_close(merged.eval()(x), training, rtol=1e-4, atol=1e-5)
    trainer.test(module, TinyData(), verbose=False)
    encoder = merged.encoder
    assert encoder.use_nested_tensor == Encoder().encoder.use_nested_tensor
    assert encoder.layers[0].activation_relu_or_gelu == Encoder().encoder.layers[0].activation_relu_or_gelu


def test_multihead_attention_stays_float_and_is_listed() -> None:
    module, qlora = ZooModule(row("attention")), QLoRA(rank=2)
    quiet_trainer(callbacks=[qlora]).fit(module)
    attention = [path for path, inner in module.named_modules() if isinstance(inner, nn.MultiheadAttention)]
    assert attention
    assert all(any(f"`{path}` stays float" in note for note in qlora.report_notes()) for path in attention)


def test_a_compiled_submodule() -> None:
    module = Net(mlp(24, 20, 4))
    module.net = torch.compile(module.net, backend="eager")
    keys = list(module.state_dict())
    qlora = QLoRA(rank=2)
    trainer, _ = fit(qlora, module=module)
    assert list(adapted_layers(module)) == ["net.0", "net.2"]
    assert all(layer.lora_B.detach().any() for layer in adapted_layers(module).values())
    trainer.test(module, TinyData(), verbose=False)
    x = torch.randn(4, 16)
    with torch.no_grad():
        merged = qlora.merge()
        torch.testing.assert_close(merged.eval()(x), module.eval()(x), rtol=1e-5, atol=1e-5)
    assert list(merged.state_dict()) == keys
    assert all(parameter.requires_grad for parameter in merged.parameters())


@pytest.mark.parametrize("wrapper", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_computed_weights_stay_float(wrapper: Callable[[nn.Module], nn.Module]) -> None:
    net = mlp(24, 20, 4)
    wrapper(net[0])
    module, qlora = Net(net), QLoRA(rank=2)
    fit(qlora, module=module)
    assert list(adapted_layers(module)) == ["net.2"]
    qlora.merge()


def test_subclasses_of_linear_stay_float() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    module = Net(nn.Sequential(Scaled(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4)))
    fit(QLoRA(rank=2), module=module)
    assert list(adapted_layers(module)) == ["net.2"]


def test_a_penalty_on_the_weight_of_a_layer_reaches_its_adapters() -> None:
    class Penalty(Classifier):
        factor = 0.0

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            weight = self.body.weight.to(self.body.weight.dtype)
            return super().training_step(batch, batch_idx) + self.factor * weight.square().sum()

    free, held = Penalty(), Penalty()
    held.load_state_dict(free.state_dict())
    held.factor = 0.05
    for module in (free, held):
        fit(QLoRA(rank=2, alpha=2.0), module=module)
    assert list(adapted_layers(held)) == ["body"]
    assert held.body.weight.norm() < 0.98 * free.body.weight.norm()


def test_hooks_on_an_adapted_layer_still_run() -> None:
    module = Classifier()
    calls: list[torch.Size] = []
    module.body.register_forward_hook(lambda layer, args, output: calls.append(output.shape))
    fit(QLoRA(rank=2), module=module)
    assert calls and calls[0] == (8, 32)


def test_ranks_above_the_layers_and_layers_of_one_row() -> None:
    module = Net(nn.Sequential(nn.Linear(16, 1), nn.Tanh(), nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 4)))
    qlora = QLoRA(rank=40, alpha=1)
    fit(qlora, module=module)
    x = torch.randn(4, 16)
    with torch.no_grad():
        torch.testing.assert_close(qlora.merge().eval()(x), module.eval()(x), rtol=1e-5, atol=1e-5)


# What it takes.


def tensors_in_memory() -> Iterator[Tensor]:
    gc.collect()
    for thing in gc.get_objects():
        try:
            if isinstance(thing, Tensor) and not is_lazy(thing):  # which has no shape
                yield thing
        except ReferenceError:
            continue


@pytest.mark.parametrize(
    "average", [pytest.param(False, id="alone"), pytest.param(True, id="with averages", marks=pytest.mark.slow)]
)
@pytest.mark.filterwarnings("ignore:.*isinstance|.*deprecated")
def test_no_float_copy_of_an_adapted_weight_lives_on(average: bool) -> None:
    shape = (67, 61)  # of nothing else in this process
    module = Net(nn.Sequential(nn.Linear(16, 61), nn.ReLU(), nn.Linear(61, 67), nn.ReLU(), nn.Linear(67, 4)))
    original = weakref.ref(module.net[2].weight)
    alive: list[int] = []

    def count(trainer: L.Trainer, pl_module: Any) -> None:
        alive.append(sum(tensor.shape == shape and tensor.is_floating_point() for tensor in tensors_in_memory()))

    others = [EMAWeightAveraging(decay=0.9)] if average else []
    trainer, _ = fit(
        QLoRA(rank=2), *others, At(on_train_start=count, on_train_epoch_end=count), module=module, max_epochs=1
    )
    count(trainer, module)
    assert original() is None
    assert alive == [0, 0, 0]
    packed = sum(b.numel() * b.element_size() for b in adapted_layers(module)["net.2"].weight.tensors().values())
    assert packed < 67 * 61 * 0.65  # bytes: half of one for a code, and the scales of 67 rows


def test_backward_keeps_no_float_weight() -> None:
    module = Net(mlp(64, 64, 4))
    fit(QLoRA(rank=2), module=module, max_epochs=1)
    saved: list[torch.Size] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(torch.randn(3, 16))
    assert saved and torch.Size((64, 64)) not in saved and torch.Size((64, 16)) not in saved


def test_draws_nothing_from_the_global_generators() -> None:
    states = []
    for callbacks in ([], [QLoRA(rank=2)]):
        fit(*callbacks, module=Net(mlp(24, 24, 4)))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
