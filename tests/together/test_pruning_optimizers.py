"""Optimizers whose state isn't shaped like their weights: nothing that they remember is of the weights before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adafactor, Optimizer, SparseAdam
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import OneShot, Rewind, ScheduledPruning, Targets, Window
from tests.support.modules import quiet_trainer

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
Y = torch.tanh(X @ torch.randn(8, 8, generator=torch.Generator().manual_seed(1)))


class Flat(Optimizer):
    """Momentum of all parameters as one vector, kept by the first."""

    def __init__(self, params: Any, lr: float = 0.2) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None if closure is None else torch.enable_grad()(closure)()
        params = self.param_groups[0]["params"]
        state = self.state[params[0]]
        gradient = torch.cat([parameter.grad.flatten() for parameter in params])
        state["flat"] = gradient if "flat" not in state else 0.9 * state["flat"] + gradient
        for parameter, part in zip(
            params, state["flat"].split([parameter.numel() for parameter in params]), strict=True
        ):
            parameter.sub_(self.param_groups[0]["lr"] * part.view_as(parameter))
        return loss


class Named(Flat):
    """The same vector under a name that is no parameter."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        first = self.param_groups[0]["params"][0]
        if "all" in self.state:
            self.state[first] = self.state.pop("all")  # type: ignore[call-overload]
        loss = super().step(closure)
        self.state["all"] = self.state.pop(first)  # type: ignore[index]
        return loss


class Factored(Optimizer):
    """Shampoo-like: a factor for each dimension. Those of a square weight have its shape by chance."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None if closure is None else torch.enable_grad()(closure)()
        for parameter in self.param_groups[0]["params"]:
            state, gradient = self.state[parameter], parameter.grad.view(len(parameter), -1)
            if not state:
                state["factors"] = [torch.eye(size) for size in gradient.shape]
                state["momentum"] = torch.zeros_like(parameter)
            for factor, rows in zip(state["factors"], (gradient, gradient.T), strict=True):
                factor.add_(rows @ rows.T)
                assert factor.diagonal().min() >= 1.0  # a factor that was multiplied by a mask is none
            left, right = map(torch.linalg.inv, state["factors"])
            state["momentum"].mul_(0.9).add_((left @ gradient @ right).view_as(parameter))
            parameter.sub_(self.param_groups[0]["lr"] * state["momentum"])
        return loss


class Wrapped(Optimizer):
    """SAM-like: it moves the weights away, and lets an optimizer of its own step."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})
        self.base = SGD(self.param_groups, lr=0.1, momentum=0.9, weight_decay=0.0)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        assert closure is not None
        loss = torch.enable_grad()(closure)()
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["old"] = parameter.clone()
            parameter.add_(0.05 * parameter.grad)
        torch.enable_grad()(closure)()
        for parameter in self.param_groups[0]["params"]:
            parameter.copy_(self.state[parameter]["old"])
        self.base.step()
        return loss


class Net(L.LightningModule):
    def __init__(self, make: Callable[[Any], Optimizer], first: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.make = make
        # A first parameter that isn't pruned may still be the one by which an optimizer remembers the others.
        self.net = nn.Sequential(*([] if first else [nn.LayerNorm(8)]), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Optimizer:
        return self.make(self.parameters())

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(X, Y), batch_size=64)


class Watch(L.Callback):
    """The loss after each batch; and what the optimizer holds after the one in which masks grow."""

    def __init__(self) -> None:
        self.losses = list[float]()
        self.held: dict[Any, Any] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        with torch.no_grad():
            self.losses.append(nn.functional.mse_loss(pl_module.net(X), Y).item())
        if len(self.losses) == EVENT:
            self.held = dict(trainer.optimizers[0].state)


EVENT = 10
MAKE: dict[str, Callable[[Any], Optimizer]] = {
    "lbfgs": lambda p: LBFGS(p, lr=1.0, max_iter=4, line_search_fn="strong_wolfe"),
    "flat": Flat,
    "named": Named,
    "factored": Factored,
}


def fit(module: Net, *callbacks: Any, **kwargs: Any) -> ScheduledPruning:
    window = Window(EVENT, EVENT + 1, unit="step")
    pruning = ScheduledPruning(**{"sparsity": 0.6, "window": window, "schedule": OneShot(), **kwargs})
    quiet_trainer(max_epochs=30, callbacks=[pruning, *callbacks]).fit(module)
    return pruning


@pytest.mark.parametrize("rewind", [None, Rewind(2)], ids=["", "rewind"])
@pytest.mark.parametrize("first", [True, False], ids=["pruned first", "norm first"])
@pytest.mark.parametrize("name", MAKE)
def test_state_of_no_known_layout_starts_anew_when_masks_grow(name: str, first: bool, rewind: Rewind | None) -> None:
    module, watch = Net(MAKE[name], first), Watch()
    pruning = fit(module, watch, rewind=rewind)
    # Factors of a bias that isn't pruned may stay; a vector over all parameters may not.
    assert not [key for key in watch.held if name != "factored" or key.dim() > 1]
    assert min(watch.losses[EVENT:]) < 0.9 * watch.losses[EVENT - 1]
    assert all(not module.get_parameter(weight)[~mask].any() for weight, mask in pruning.masks.items())


def test_moments_of_a_wrapped_optimizer_are_masked_too() -> None:
    module = Net(Wrapped)
    pruning = fit(module)
    [optimizer] = module.trainer.optimizers
    for name, mask in pruning.masks.items():
        weight = module.get_parameter(name)
        for moment in (optimizer.state[weight]["old"], optimizer.base.state[weight]["momentum_buffer"]):  # type: ignore[attr-defined]
            assert not moment[~mask].any() and moment[mask].all()


class Averaging(Optimizer):
    """Schedule-free-like: plain descent of an iterate, whose average is the weights."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None if closure is None else torch.enable_grad()(closure)()
        for parameter in self.param_groups[0]["params"]:
            iterate = self.state[parameter].setdefault("z", parameter.clone())
            iterate.sub_(0.05 * parameter.grad)
            parameter.lerp_(iterate, 0.1)
        return loss


def test_a_weight_that_comes_back_does_so_in_averages_of_the_weights_too() -> None:
    module = Net(Averaging)
    seen = []

    class See(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            for name, mask in pruning.masks.items():
                weight = module.get_parameter(name)
                iterate = trainer.optimizers[0].state[weight]["z"]
                back = mask & ~masks.get(name, mask)
                seen.append(int(back.sum()))
                assert torch.equal(iterate[back], weight[back]) and not iterate[~mask].any()
                masks[name] = mask

    masks: dict[str, Tensor] = {}
    window = Window(2, 20, unit="step")
    pruning = ScheduledPruning("movement", sparsity=0.6, window=window, regrow=True)
    quiet_trainer(max_epochs=24, callbacks=[pruning, See()]).fit(module)
    assert sum(seen) > 5


def test_state_of_eight_bits_is_left_alone() -> None:
    class Coded(SGD):
        @torch.no_grad()
        def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
            loss = super().step(closure)
            for parameter in self.param_groups[0]["params"]:
                code = self.state[parameter].setdefault("code", torch.full_like(parameter, 127, dtype=torch.uint8))
                assert (code == 127).all()  # which stands for zero
            return loss

    fit(Net(lambda p: Coded(p, lr=0.1)))


def test_means_over_a_dimension_go_on_where_only_values_change() -> None:
    class Means(SGD):
        """Adafactor as T5 is trained with: factors without the dimension that they are means over."""

        @torch.no_grad()
        def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
            loss = super().step(closure)
            for parameter in self.param_groups[0]["params"]:
                state = self.state[parameter]
                state["step"] = state.get("step", 0) + 1
                if parameter.dim() > 1:
                    state["row"], state["col"] = parameter.grad.square().mean(1), parameter.grad.square().mean(0)
            return loss

    module = Net(lambda p: Means(p, lr=0.1, momentum=0.9))
    pruning = fit(module)
    for name, mask in pruning.masks.items():
        state = module.trainer.optimizers[0].state[module.get_parameter(name)]
        assert state["step"] == 30 and not state["momentum_buffer"][~mask].any() and state["row"].all()


def test_factored_moments_of_pruned_rows_are_zero() -> None:
    module = Net(lambda p: Adafactor(p, lr=0.05))
    pruning = fit(module, method="ln_structured", scope="layer")
    for name, mask in pruning.masks.items():
        state = module.trainer.optimizers[0].state[module.get_parameter(name)]
        assert not state["row_var"][~mask.any(1)].any() and state["row_var"][mask.any(1)].all()
        assert state["col_var"].all()


def test_gradients_of_sparse_layout_bring_no_moments_back() -> None:
    class Words(Net):
        def __init__(self) -> None:
            super().__init__(lambda p: SparseAdam(p, lr=0.05))
            self.net = nn.Embedding(20, 8, sparse=True)  # type: ignore[assignment]

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return self.net((batch[0].abs() * 5).long() % 20).square().mean()

    class See(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.optimizers[0].register_step_post_hook(self.look)

        def look(self, optimizer: Optimizer, *_: Any) -> None:
            for name, mask in pruning.masks.items():
                seen.append(not mask.all())
                assert not optimizer.state[module.get_parameter(name)]["exp_avg"][~mask].any()

    module, seen = Words(), list[bool]()
    window, targets = Window(4, 5, unit="step"), Targets(include=["net"])
    pruning = ScheduledPruning(sparsity=0.6, window=window, schedule=OneShot(), targets=targets)
    quiet_trainer(max_epochs=8, callbacks=[pruning, See()]).fit(module)
    assert sum(seen) >= 3
