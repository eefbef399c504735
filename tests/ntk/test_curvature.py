"""The largest eigenvalues of the Hessian, against the whole Hessian of eager layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from narrowdeep import DeepNarrowCNN, DeepNarrowMLP
from narrowdeep.ntk import sharpness

# torch.func's forward mode imports a module that scripts functions.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")


def moved(kind: str, **settings: Any) -> tuple[Any, Tensor]:
    """In plain form, so that the parameters are those of the eager network, and far from its initialisation."""
    torch.manual_seed(0)
    settings = {"form": "plain", "scale": 2.0, "dtype": torch.float64, **settings}
    model: Any = DeepNarrowMLP(2, 2, 5, **settings) if kind == "mlp" else DeepNarrowCNN(1, 2, 4, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model, torch.randn(6, *((2,) if kind == "mlp" else (1, 3, 4)), dtype=torch.float64)


def eigenvalues(model: nn.Module, loss: Any) -> Tensor:
    """Of the whole Hessian in the trained parameters, the largest first."""
    params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    sizes, shapes = [p.numel() for p in params.values()], [p.shape for p in params.values()]

    def of(flat: Tensor) -> Tensor:
        values = [part.reshape(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]
        return loss(lambda x: torch.func.functional_call(model, dict(zip(params, values, strict=True)), (x,)))

    flat = torch.cat([p.flatten() for p in params.values()])
    return torch.linalg.eigvalsh(torch.func.hessian(of)(flat)).flip(0)


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_narrow_models(kind: str, chunks: int) -> None:
    model, x = moved(kind, chunks=chunks)
    y = torch.randn(6, 2, dtype=torch.float64)
    expected = eigenvalues(model.to_sequential(), lambda f: (f(x) - y).square().sum() / 12)
    found = sharpness(model, x, y, k=3, tol=0)
    torch.testing.assert_close(found, expected[:3], rtol=1e-10, atol=0)
    labels = torch.arange(6) % 2
    expected = eigenvalues(model.to_sequential(), lambda f: cross_entropy(f(x), labels))
    torch.testing.assert_close(sharpness(model, x, labels, loss=cross_entropy, tol=0), expected[:1], rtol=1e-10, atol=0)


def test_frozen_parameters_stay_out() -> None:
    model, x = moved("mlp")
    y = torch.randn(6, 2, dtype=torch.float64)
    model.hidden_weight.requires_grad_(False)
    eager = model.to_sequential()
    for layer in list(eager)[2:-1:2]:
        layer.weight.requires_grad_(False)
    expected = eigenvalues(eager, lambda f: (f(x) - y).square().sum() / 12)
    torch.testing.assert_close(sharpness(model, x, y, tol=0), expected[:1], rtol=1e-10, atol=0)
    assert all(p.grad is None for p in model.parameters())


def test_other_modules() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1), nn.Flatten(0)).double()
    x, y = torch.randn(2, 5, 2, dtype=torch.float64)[0], torch.randn(5, 1, dtype=torch.float64)
    expected = eigenvalues(model, lambda f: (f(x)[:, None] - y).square().sum() / 10)
    torch.testing.assert_close(sharpness(model, x, y, k=2, tol=0), expected[:2], rtol=1e-10, atol=0)


def test_a_loss_without_curvature() -> None:
    model = nn.Linear(2, 1)
    assert sharpness(model, torch.rand(3, 2), torch.rand(3, 1), loss=lambda f, y: (f * y).sum(), k=2).tolist() == [0, 0]


def test_bad_input() -> None:
    model, x = moved("mlp")
    y = torch.zeros(6, 2, dtype=torch.float64)
    values: list[tuple[Any, Any, dict[str, Any], str]] = [
        (x, y, {"k": 0}, "k must be at least 1, got 0"),
        (x, y, {"k": 10**6}, "k must be below the number of trained parameters, 117, got 1000000"),
        (x, y, {"tol": -1}, "tol must be finite and not negative, got -1"),
        (x, y[:, 0], {}, r"y must have the shape of the outputs, \(6, 2\), got \(6,\)"),
        (x, y[:3], {}, r"x and y must have as many samples, got 6 and \(3, 2\)"),
        (x, y * torch.nan, {}, "loss must have finite gradients"),
        (x[:, :1], y, {}, r"x must have shape \(N, 2\)"),
    ]
    for samples, targets, settings, message in values:
        with pytest.raises(ValueError, match=message):
            sharpness(model, samples, targets, **settings)
    kinds: list[tuple[Any, Any, dict[str, Any], str]] = [
        (x, y, {"k": 1.5}, "k must be an int, got 1.5"),
        (x, [0.0], {}, "y must be a torch.Tensor, got list"),
        (x, y, {"loss": lambda f, y: f - y}, "loss must return a scalar tensor"),
    ]
    for samples, targets, settings, message in kinds:
        with pytest.raises(TypeError, match=message):
            sharpness(model, samples, targets, **settings)
