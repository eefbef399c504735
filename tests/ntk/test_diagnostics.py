"""Diagnostics against the eager network's own activations and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from narrowdeep import DeepNarrowCNN, DeepNarrowMLP
from narrowdeep.ntk import empirical_ntk, kernel_drift, layer_contributions, layer_deviation, zero_crossings
from narrowdeep.ntk.diagnostics import _preactivations
from narrowdeep.ops.gram.reference import MLP

Narrow = DeepNarrowMLP | DeepNarrowCNN


def two_states(kind: str, form, size: float = 0.05) -> tuple[Narrow, Narrow, Tensor]:
    torch.manual_seed(0)
    if kind == "mlp":
        initial: Narrow = DeepNarrowMLP(3, 2, 40, scale=7.0, form=form, dtype=torch.float64)
        x = torch.randn(5, 3, dtype=torch.float64)
    else:
        initial = DeepNarrowCNN(1, 2, 6, scale=7.0, form=form, dtype=torch.float64)
        x = torch.randn(4, 1, 3, 2, dtype=torch.float64)
    model = copy.deepcopy(initial)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(size * torch.randn_like(param))
    return initial, model, x


def eager_preactivations(model: Narrow, x: Tensor) -> list[Tensor]:
    seen: list[Tensor] = []
    eager = model.to_sequential()
    for module in eager:
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.register_forward_hook(lambda _m, _i, out: seen.append(out.detach()))
    eager(x)
    return seen[:-1]


@pytest.mark.parametrize("form", ["offset", "plain"])
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_zero_crossings_and_deviation_are_those_of_the_eager_network(kind: str, form) -> None:
    initial, model, x = two_states(kind, form)
    before, after = eager_preactivations(initial, x), eager_preactivations(model, x)
    crossings = torch.stack([((a > 0) != (b > 0)).sum() for a, b in zip(before, after, strict=True)])
    assert torch.equal(zero_crossings(initial, model, x), crossings)
    assert crossings.sum() > 0
    assert zero_crossings(initial, initial, x).sum() == 0

    def norm(f: Tensor) -> Tensor:
        return f.flatten(1).square().sum(1).mean().sqrt()

    for power in (1, 2, 8):
        terms = [(norm(a) + norm(b - a)) ** power for a, b in zip(before, after, strict=True)]
        expected = sum(term.item() for term in terms) / ((model.depth - 1) * model.scale**power)
        assert layer_deviation(initial, model, x, power=power) == pytest.approx(expected, rel=1e-12)


def test_deviation_sees_changes_far_below_the_base() -> None:
    """A middle bias moved by 1e-3 where activations are 1e12: the sum of norms cannot show it, the difference can."""
    initial = DeepNarrowMLP(1, 1, 12, scale=1e12, beta=0.0, rho=0.0, dtype=torch.float64)
    model = copy.deepcopy(initial)
    with torch.no_grad():
        model.get_parameter("hidden_bias")[3, 2] += 1e-3
    x = torch.ones(2, 1, dtype=torch.float64)
    pairs = zip(_preactivations(initial, MLP, x), _preactivations(model, MLP, x), strict=True)
    moved = [(after - before)[2].tolist() for (_, before), (_, after) in pairs]
    assert moved[4:] == [pytest.approx([1e-3, 1e-3], rel=1e-12)] * 7
    assert moved[:4] == [[0.0, 0.0]] * 4


@pytest.mark.parametrize("form", ["offset", "plain"])
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_layer_contributions_are_products_of_layer_gradients(kind: str, form) -> None:
    _, model, x = two_states(kind, form)
    rows = []
    eager: nn.Module = model.to_sequential()
    for sample in x:
        out = eager(sample[None])[0]
        rows.append([torch.autograd.grad(o, tuple(eager.parameters()), retain_graph=True) for o in out])
    parts = layer_contributions(model, x, x[:2], scaled=False)
    assert parts.shape == (model.depth, len(x), 2)
    for layer in range(model.depth):
        j = torch.stack([torch.stack([torch.cat([g[2 * layer].flatten(), g[2 * layer + 1]]) for g in r]) for r in rows])
        expected = torch.einsum("iap,jap->ij", j, j[:2])
        torch.testing.assert_close(parts[layer], expected, rtol=1e-11, atol=1e-11)
    whole = layer_contributions(model, x)
    torch.testing.assert_close(whole.sum(0), empirical_ntk(model, x, reduce="trace"), rtol=1e-12, atol=0)
    model.hidden_weight.requires_grad_(False)
    model.hidden_bias.requires_grad_(False)
    assert torch.equal(layer_contributions(model, x)[1:-1], torch.zeros_like(whole[1:-1]))
    torch.testing.assert_close(layer_contributions(model, x)[0], whole[0])
    assert layer_contributions(model, x[:0]).shape == (model.depth, 0, 0)


def test_drift_is_the_relative_frobenius_distance() -> None:
    initial, model, x = two_states("mlp", "offset", 1e-3)
    before, after = empirical_ntk(initial, x).flatten(), empirical_ntk(model, x).flatten()
    expected = ((after - before).square().sum() / before.square().sum()).sqrt().item()
    assert kernel_drift(initial, model, x) == pytest.approx(expected, rel=1e-12)
    assert kernel_drift(model, model, x) == 0.0
    single = nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 1, bias=False).requires_grad_(False))
    doubled = copy.deepcopy(single)
    with torch.no_grad():
        doubled.get_parameter("1.weight").mul_(2.0)  # J is doubled, so the kernel is 4 times as large
    assert kernel_drift(single, doubled, x.float()) == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda i, m, x: kernel_drift(None, m, x), TypeError, "initial must be a torch.nn.Module, got NoneType"),  # type: ignore[arg-type]
        (lambda i, m, x: kernel_drift(i, nn.Linear(3, 2).double(), x), ValueError, "initial must have parameters of"),
        (
            lambda i, m, x: kernel_drift(DeepNarrowMLP(3, 2, 4, dtype=x.dtype), m, x),
            ValueError,
            r"got \(2, 6, 6\) hidden_weight where model has \(38, 6, 6\)",
        ),
        (lambda i, m, x: kernel_drift(i, m, x[:0]), ValueError, "x must hold at least one sample, got 0"),
        (lambda i, m, x: layer_deviation(i, m, x[:0]), ValueError, "x must hold at least one sample, got 0"),
        (lambda i, m, x: layer_deviation(i, m, x, power=0), ValueError, "power must be at least 1, got 0"),
        (lambda i, m, x: layer_deviation(i, nn.Linear(3, 1), x), TypeError, "model must be a Deep"),  # type: ignore[arg-type]
        (lambda i, m, x: zero_crossings(DeepNarrowCNN(3, 2, 40), m, x), TypeError, "initial must be a DeepNarrowMLP"),
        (lambda i, m, x: zero_crossings(DeepNarrowMLP(3, 2, 4), m, x), ValueError, "the depth of model, 40, got 4"),
        (lambda i, m, x: zero_crossings(i, m, x.float()), TypeError, "same dtype"),
        (lambda i, m, x: layer_contributions(nn.Linear(3, 2), x), TypeError, "must be a Deep"),  # type: ignore[arg-type]
        (lambda i, m, x: layer_contributions(m, x, x[:, :2]), ValueError, r"x2 must have shape \(N, 3\), got \(5, 2\)"),
    ],
)
def test_bad_input(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(*two_states("mlp", "offset"))
