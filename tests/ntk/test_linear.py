"""The linearized model against torch.func on eager layers, and against the kernel's own predictions."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from narrowdeep import DeepNarrowCNN, DeepNarrowMLP
from narrowdeep.ntk import NTKRegressor, linearize

# torch.func.jvp of torch 2.15 imports a module that scripts functions.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")

Narrow = DeepNarrowMLP | DeepNarrowCNN


def moved(kind: str, **settings: Any) -> tuple[Narrow, Tensor]:
    """A model away from its initialisation, in plain form so that its parameters are those of the eager network."""
    torch.manual_seed(0)
    settings = {"form": "plain", "scale": 3.0, "dtype": torch.float64, **settings}
    model: Any = DeepNarrowMLP(3, 2, 9, **settings) if kind == "mlp" else DeepNarrowCNN(2, 2, 9, **settings)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.05 * torch.randn_like(param))
    return model, torch.randn(4, *((3,) if kind == "mlp" else (2, 4, 5)), dtype=torch.float64)


def changed(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.add_(torch.randn(param.shape, generator=generator, dtype=param.dtype))


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_values_and_gradients_are_those_of_eager_layers(kind: str, chunks: int) -> None:
    model, x = moved(kind, chunks=chunks)
    linear = linearize(model)
    changed(linear)
    copied: Any = linear.model
    eager, end = model.to_sequential(), copied.to_sequential()
    start = {name: param.detach() for name, param in eager.named_parameters()}
    theta = {name: param.detach() for name, param in end.named_parameters()}
    weight = torch.randn(4, 2, dtype=torch.float64)

    def first_order(params: dict[str, Tensor]) -> Tensor:
        change = {name: params[name] - start[name] for name in params}
        found: Any = torch.func.jvp(lambda p: torch.func.functional_call(eager, p, (x,)), (start,), (change,))
        return found[0] + found[1]

    expected = first_order(theta)
    out = linear(x)
    assert (out - expected).abs().max() <= 1e-12 * expected.abs().max()
    (weight * out.square()).sum().backward()
    wanted = torch.func.grad(lambda params: (weight * first_order(params).square()).sum())(theta)
    layers = [[wanted[name] for name in wanted if name.endswith(f".{kind}")] for kind in ("weight", "bias")]
    names = ("first_weight", "first_bias", "hidden_weight", "hidden_bias", "last_weight", "last_bias")
    for i, name in enumerate(names):
        rows = layers[i % 2]
        want = rows[0] if i < 2 else torch.stack(rows[1:-1]) if i < 4 else rows[-1]
        value = getattr(linear.model, name)
        parts = list(value) if isinstance(value, nn.ParameterList) else [value]
        got = torch.cat([part.grad for part in parts])
        assert (got - want).abs().max() <= 1e-12 * want.abs().max(), name


def test_other_modules_and_outputs_without_a_dimension() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0)).double()
    linear, x = linearize(model), torch.randn(5, 3, dtype=torch.float64)
    changed(linear)
    start = {name: param.detach() for name, param in model.named_parameters()}
    change = {name: param.detach() - start[name] for name, param in linear.model.named_parameters()}
    found: Any = torch.func.jvp(lambda p: torch.func.functional_call(model, p, (x,)), (start,), (change,))
    assert linear(x).shape == (5,)
    torch.testing.assert_close(linear(x).detach(), found[0] + found[1], rtol=1e-13, atol=1e-13)


def test_descent_on_it_is_the_kernels_descent() -> None:
    """In a network so shallow and of so small a scale that its own training is another."""
    torch.manual_seed(0)
    model = DeepNarrowMLP(2, 1, 6, scale=2.0, dtype=torch.float64)
    x, y = torch.rand(8, 2, dtype=torch.float64), torch.rand(8, 1, dtype=torch.float64)
    outputs = {}
    for name, network in {"linear": linearize(model), "model": copy.deepcopy(model)}.items():
        optimizer = torch.optim.SGD(network.parameters(), lr=0.5 * model.ntk_lr)
        for _ in range(100):
            optimizer.zero_grad()
            ((network(x) - y).square().sum() / 16).backward()
            optimizer.step()
        outputs[name] = network(x).detach()
    predicted = NTKRegressor(model).fit(x, y).predict(x, n_steps=100, tau=0.5)
    np.testing.assert_allclose(outputs["linear"], predicted, rtol=0, atol=1e-10)
    assert np.abs(outputs["model"].numpy() - predicted).max() > 1e-4


def test_it_begins_as_the_model_and_leaves_it_alone() -> None:
    model, x = moved("mlp", form="offset")
    model.first_bias.requires_grad_(False)
    kept = copy.deepcopy(model.state_dict())
    linear: Any = linearize(nn.Sequential(nn.Identity(), model))
    torch.testing.assert_close(linear(x), model(x), rtol=1e-13, atol=1e-13)
    changed(linear)
    assert torch.equal(linear.model[1].first_bias, model.first_bias)
    for name, value in model.state_dict().items():
        assert torch.equal(value, kept[name])


def test_a_state_dict_goes_on_from_the_same_start() -> None:
    model, x = moved("cnn", form="offset", chunks=2)
    linear = linearize(model)
    changed(linear)
    other = linearize(moved("cnn", form="offset", chunks=2)[0])
    changed(other)
    changed(other)
    other.load_state_dict(linear.state_dict())
    assert torch.equal(other(x), linear(x))


def test_parameters_may_be_frozen_later() -> None:
    model, x = moved("mlp")
    linear: Any = linearize(model)
    changed(linear)
    before = linear(x).detach()
    linear.model.first_weight.requires_grad_(False)
    after = linear(x)
    assert torch.equal(after.detach(), before)
    after.sum().backward()
    assert linear.model.first_weight.grad is None
    assert linear.model.last_bias.grad is not None


def test_bad_input() -> None:
    model, x = moved("mlp")
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got int"):
        linearize(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"x must have shape \(N, 3\), got \(4, 2\)"):
        linearize(model)(x[:, :2])
    with pytest.raises(ValueError, match="x must not require gradients"):
        linearize(model)(x.clone().requires_grad_())
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        linearize(nn.Sequential(nn.Linear(3, 2), nn.Dropout()).double())(x)
