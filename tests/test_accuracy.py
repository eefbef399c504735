"""float32 in offset form at the thesis's depths (section 5.1): outputs, gradients and training against the truth.

The truth is the float64 offset form, itself held against the network W = E + Delta in exact arithmetic. A plausible
loss proves nothing here: outputs are compared.
"""

from __future__ import annotations

import copy
import math
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from narrowdeep import DeepNarrowMLP
from narrowdeep.data import load_task
from narrowdeep.modules.base import PARAMETER_NAMES
from narrowdeep.ops import engine

TASK = load_task("toy", dtype=torch.float64)
DEPTH = 10_000
SCALES = (5e4, 1e9)  # the authors' own, and one at which plain float64 fails as well
BITS = 200


def step(model: DeepNarrowMLP, x: Tensor, y: Tensor) -> None:
    """One step of gradient descent on 1/(2 N) sum |f - y|^2, kernel time 0.5 (thesis section 3.2)."""
    loss = (model(x) - y).square().sum() / (2 * len(x))
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    with torch.no_grad():
        for param, gradient in zip(model.parameters(), gradients, strict=True):
            param.sub_(gradient, alpha=0.5 * model.ntk_lr)


def rounded(model: DeepNarrowMLP) -> DeepNarrowMLP:
    """A copy whose float64 parameters are float32 numbers."""
    return copy.deepcopy(model).float().double()


@cache
def trained(scale: float, steps: int = 40) -> DeepNarrowMLP:
    torch.manual_seed(0)
    model = rounded(DeepNarrowMLP(2, 1, DEPTH, scale=scale, dtype=torch.float64))
    for _ in range(steps):
        step(model, TASK.x_train, TASK.y_train)
    return rounded(model)


def gradients(model: DeepNarrowMLP, x: Tensor, grad_out: Tensor) -> list[Tensor]:
    return [g.double() for g in torch.autograd.grad(model(x), list(model.parameters()), grad_out)]


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def _fixed(tensor: Tensor) -> np.ndarray:
    """Python integers in units of 2^-BITS: every float64 of normal size is one, and sums of them are exact."""
    integers = [int(math.ldexp(v, BITS)) for v in tensor.detach().double().flatten().tolist()]
    return np.array(integers, dtype=object).reshape(tuple(tensor.shape))


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a @ b) >> BITS


def _float(a: np.ndarray) -> Tensor:
    return torch.tensor([math.ldexp(v, -BITS) for v in a.flatten().tolist()], dtype=torch.float64).reshape(a.shape)


@pytest.mark.parametrize("scale", SCALES)
def test_the_truth_is_the_network_in_exact_arithmetic(scale: float) -> None:
    model, x = trained(scale), TASK.x_train[::40]
    parts = {name: _fixed(part) for name, part in model.identity_part().items()}
    w = {name: _fixed(getattr(model, name)) + parts[name] for name in PARAMETER_NAMES}
    inputs = _fixed(x.T)
    states = [np.maximum(_product(w["first_weight"], inputs) + w["first_bias"][:, None], 0)]
    for weight, bias in zip(w["hidden_weight"], w["hidden_bias"], strict=True):
        states.append(np.maximum(_product(weight, states[-1]) + bias[:, None], 0))
    out = _product(w["last_weight"], states[-1]) + w["last_bias"][:, None]
    got = model(x)
    torch.testing.assert_close(got.T, _float(out), rtol=0, atol=1e-13)
    # The gradient of sum f with respect to the biases, from the last layer to the first.
    g = w["last_weight"].T * (states[-1] > 0)
    grad_bias = []
    for weight, state in zip(w["hidden_weight"][::-1], states[-2::-1], strict=True):
        grad_bias.append(g.sum(1))
        g = _product(weight.T, g) * (state > 0)
    found = dict(zip(PARAMETER_NAMES, gradients(model, x, torch.ones_like(got)), strict=True))
    assert relative(found["hidden_bias"], _float(np.array(grad_bias[::-1]))) < 1e-13
    assert relative(found["first_bias"], _float(g.sum(1))) < 1e-13


@pytest.mark.parametrize("isa", engine.instruction_sets())
@pytest.mark.parametrize("scale", SCALES)
def test_float32_outputs_and_gradients(scale: float, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured: outputs 5e-8 and 8e-8 off, gradients at most 2e-6."""
    monkeypatch.setenv("NARROWDEEP_ISA", isa)
    exact = trained(scale)
    model, x = copy.deepcopy(exact).float(), TASK.x_train.float()
    wanted = exact(x.double()).detach()
    assert wanted.max() > 0.2  # from outputs of 0: it has learned something
    assert (model(x).detach().double() - wanted).abs().max() < 1e-6
    residual = ((wanted - TASK.y_train) / len(x)).float()
    truth = gradients(exact, x.double(), residual.double())
    for name, got, want in zip(PARAMETER_NAMES, gradients(model, x, residual), truth, strict=True):
        assert relative(got, want) < 1e-5, name


@torch.no_grad()
@pytest.mark.parametrize("scale", SCALES)
def test_plain_float32_is_wrong_there(scale: float) -> None:
    """Why there is an offset form. Measured: one output for all 200 inputs, 0.42 off."""
    exact, x = trained(scale), TASK.x_train
    wanted = exact(x)
    plain = DeepNarrowMLP.from_sequential(exact.to_sequential(), form="plain", scale=scale)
    assert (plain(x) - wanted).abs().max() < 1e-2  # float64 has the same network
    for network in (copy.deepcopy(plain).float(), plain.to_sequential().float()):
        got = network(x.float())
        assert (got.double() - wanted).abs().max() > 0.1
        assert len(got.unique()) < 50
    assert len(copy.deepcopy(exact).float()(x.float()).unique()) > 190


@pytest.mark.slow
@pytest.mark.parametrize("scale", SCALES)
def test_float32_tracks_float64_training(scale: float) -> None:
    """Measured over 200 steps: outputs 8e-8 and 1.3e-7 off."""
    x, y = TASK.x_train[::4], TASK.y_train[::4]
    torch.manual_seed(0)
    exact = rounded(DeepNarrowMLP(2, 1, DEPTH, scale=scale, dtype=torch.float64))
    model = copy.deepcopy(exact).float()
    worst = 0.0
    for k in range(200):
        step(exact, x, y)
        step(model, x.float(), y.float())
        if k % 20 == 19:
            with torch.no_grad():
                worst = max(worst, float((model(x.float()).double() - exact(x)).abs().max()))
    assert worst < 1e-5
    with torch.no_grad():
        assert (exact(x) - y).square().mean() < 0.1 * y.square().mean()
