"""What others do with second derivatives, against eager layers: curvature libraries, power iterations, penalties."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, hessian, jacrev
from torch.nn.functional import cross_entropy

from narrowdeep import DeepNarrowCNN, DeepNarrowMLP
from narrowdeep.modules.base import PARAMETER_NAMES
from narrowdeep.ntk import sharpness
from tests.ops.chains import CONV, MLP, assert_close, eager

# torch.func's forward mode imports a module that scripts functions.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning"),
    pytest.mark.parametrize("kind", ["mlp", "cnn"]),
    pytest.mark.parametrize("form", ["offset", "plain"]),
    pytest.mark.parametrize("chunks", [1, 3]),
]

LABELS = torch.tensor([0, 1, 1, 0, 1, 0])


def moved(kind: str, form: Any, chunks: int) -> tuple[Any, Tensor]:
    """A model far from its initialisation, and a batch."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"form": form, "chunks": chunks, "scale": 2.0, "dtype": torch.float64}
    model: Any = DeepNarrowMLP(2, 2, 5, **settings) if kind == "mlp" else DeepNarrowCNN(1, 2, 5, **settings)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param), alpha=0.2)
    return model, torch.rand(6, *((2,) if kind == "mlp" else (1, 3, 4)), dtype=torch.float64)


def eager_layers(model: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """(all parameters in the model's order, flat; x) -> outputs of the layers in torch, one by one."""
    sizes = [p.numel() for p in model.parameters()]
    family = MLP if isinstance(model, DeepNarrowMLP) else CONV

    def function(flat: Tensor, x: Tensor) -> Tensor:
        named = dict(zip(model.named_parameters(), flat.split(sizes), strict=True))
        parts = [
            torch.cat([part.reshape(p.shape) for (key, p), part in named.items() if key.partition(".")[0] == name])
            for name in PARAMETER_NAMES
        ]
        return eager(family, (x, *parts), model.scale, model.form == "offset")

    return function


def flattened(tensors: Any) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def test_curvlinops(kind: str, form: str, chunks: int) -> None:
    curvlinops = pytest.importorskip("curvlinops")
    model, x = moved(kind, form, chunks)
    layers, flat = eager_layers(model), flattened(model.parameters())
    outputs = layers(flat, x)
    jacobian = jacrev(layers)(flat, x).flatten(0, 1)
    of_outputs = hessian(cross_entropy)(outputs, LABELS).reshape(outputs.numel(), outputs.numel())
    gradients = jacrev(lambda p: cross_entropy(layers(p, x), LABELS, reduction="none"))(flat)
    expected = {
        "Hessian": hessian(lambda p: cross_entropy(layers(p, x), LABELS))(flat),
        "GGN": jacobian.T @ of_outputs @ jacobian,
        "EF": gradients.T @ gradients / 6,
    }
    data, identity = [(x[:4], LABELS[:4]), (x[4:], LABELS[4:])], torch.eye(flat.numel(), dtype=torch.float64)
    for name, matrix in expected.items():
        kinds = getattr(curvlinops, f"{name}LinearOperator")
        operator = kinds(model, torch.nn.CrossEntropyLoss(), list(model.parameters()), data)
        assert_close(operator @ identity, matrix, 1e-10, name)


def test_hessian_of_all_parameters(kind: str, form: str, chunks: int) -> None:
    model, x = moved(kind, form, chunks)
    layers, flat = eager_layers(model), flattened(model.parameters())
    named = dict(model.named_parameters())
    sizes = [p.numel() for p in named.values()]

    def ours(p: Tensor) -> Tensor:
        parts = zip(named.items(), p.split(sizes), strict=True)
        return functional_call(model, {key: part.reshape(value.shape) for (key, value), part in parts}, (x,))

    found = hessian(lambda p: cross_entropy(ours(p), LABELS))(flat)
    assert_close(found, hessian(lambda p: cross_entropy(layers(p, x), LABELS))(flat), 1e-10)


def test_power_iterations_on_a_graph_that_is_kept(kind: str, form: str, chunks: int) -> None:
    """As PyHessian's, with the number of steps that convergence takes."""
    model, x = moved(kind, form, chunks)
    layers, flat = eager_layers(model), flattened(model.parameters())
    eigenvalues = torch.linalg.eigvalsh(hessian(lambda p: cross_entropy(layers(p, x), LABELS))(flat))
    params = tuple(model.parameters())
    grads = torch.autograd.grad(cross_entropy(model(x), LABELS), params, create_graph=True)
    direction = torch.randn_like(flat)
    shift = float(eigenvalues.abs().max()) / 2  # so that the largest is the one of largest modulus
    value = torch.zeros(())
    for _ in range(500):
        direction = direction / direction.norm()
        parts = [t.reshape(p.shape) for t, p in zip(direction.split([p.numel() for p in params]), params, strict=True)]
        product = flattened(torch.autograd.grad(grads, params, parts, retain_graph=True))
        value, direction = direction @ product, product + shift * direction
    assert_close(value, eigenvalues[-1], 1e-10)
    assert_close(sharpness(model, x, LABELS, loss=cross_entropy, tol=0)[0], eigenvalues[-1], 1e-10)


def test_training_with_a_gradient_penalty(kind: str, form: str, chunks: int) -> None:
    model, x = moved(kind, form, chunks)
    layers, flat = eager_layers(model), flattened(model.parameters()).requires_grad_()
    for params, call in ((list(model.parameters()), model), ([flat], lambda x: layers(flat, x))):
        optimizer = torch.optim.Adam(params, lr=1e-3)
        for _ in range(20):
            optimizer.zero_grad()
            leaf = x.clone().requires_grad_()
            outputs = call(leaf)
            (gradient,) = torch.autograd.grad(outputs.sum(), leaf, create_graph=True)
            (cross_entropy(outputs, LABELS) + 0.1 * gradient.square().mean()).backward()
            optimizer.step()
    assert_close(flattened(model.parameters()), flat.detach(), 1e-10)
