"""Steps on the loss of a closure, on mini-batches with momentum and by chunks, against dense linear algebra."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from narrowdeep import DeepNarrowCNN, DeepNarrowMLP
from narrowdeep.data import load_task
from narrowdeep.optim import GramGaussNewton

# torch.func.jvp of torch 2.15 imports a module that scripts functions.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")

Narrow = DeepNarrowMLP | DeepNarrowCNN


def task(kind: str, samples: int = 7, dtype: torch.dtype = torch.float64, **settings: Any) -> tuple[Narrow, Tensor]:
    torch.manual_seed(0)
    settings = {"scale": 200.0, "dtype": dtype, **settings}
    if kind == "mlp":
        return DeepNarrowMLP(3, 3, 10, **settings), torch.rand(samples, 3, dtype=dtype)
    return DeepNarrowCNN(1, 3, 6, **settings), torch.rand(samples, 1, 3, 5, dtype=dtype)


def tangents(model: Narrow, x: Tensor) -> Tensor:
    """(N out, parameters) of the eager layers, as they are now."""
    eager = model.to_sequential()
    params = {name: param.detach() for name, param in eager.named_parameters()}
    found: Any = torch.func.jacrev(lambda p: torch.func.functional_call(eager, p, (x,)))(params)
    return torch.cat([part.flatten(2) for part in found.values()], 2).flatten(0, 1)


def scaled(factor: float, y: Tensor, f: Tensor) -> Tensor:
    return factor * functional.mse_loss(f, y)


def closure_of(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    return lambda: loss(model(x))


def flat(model: Narrow) -> Tensor:
    return torch.cat([param.detach().flatten() for layer in model.layers() for param in layer])


def minimum(loss: Callable[[Tensor], Tensor], start: Tensor, jacobian: Tensor, ridge: float) -> Tensor:
    """The delta that minimises ``loss(start + J delta) + ridge/2 |delta|^2``, by Newton's method in parameter space."""
    delta = torch.zeros(jacobian.shape[1], dtype=torch.float64)
    for _ in range(30):
        outputs = (start.flatten() + jacobian @ delta).reshape(start.shape)
        gradient = torch.func.grad(loss)(outputs).flatten()
        hessian = torch.func.hessian(loss)(outputs).reshape(len(gradient), -1)
        # (J^T H J + r I)^-1 of a vector, in the space of the outputs
        right = jacobian.T @ gradient + ridge * delta
        inner = ridge * torch.eye(len(gradient)) + hessian @ jacobian @ jacobian.T
        delta = delta - (right - jacobian.T @ torch.linalg.solve(inner, hessian @ (jacobian @ right))) / ridge
    return delta


@pytest.mark.parametrize("form", ["offset", "plain"])
@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_cross_entropy_goes_to_the_minimum_of_the_linear_model(
    kind: str, chunks: int, form: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("narrowdeep.optim.losses._TOLERANCE", 1e-15)
    model, x = task(kind, chunks=chunks, form=form)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 2])
    jacobian, before = tangents(model, x), flat(model)
    damping = 1e-2
    kernel = model.ntk_lr * jacobian @ jacobian.T
    # At outputs 0 the Hessian is (I - 1 1^T / 3) / (3 N), on a gradient that sums to 0 a multiple of the identity.
    ridge = damping * float(kernel.diagonal().mean()) / (3 * 7) / model.ntk_lr
    start = torch.zeros(7, 3, dtype=torch.float64)
    delta = minimum(lambda f: functional.cross_entropy(f, labels), start, jacobian, ridge)
    kernels: list[Any] = ["empirical"] if form == "plain" else ["features", "empirical"]
    for kernel_name in kernels:
        trained = copy.deepcopy(model)
        optimizer = GramGaussNewton(trained, damping=damping, kernel=kernel_name, batch_size=4)
        step = optimizer.step(closure_of(trained, x, lambda f: functional.cross_entropy(f, labels)))
        assert (flat(trained) - before - delta).norm() <= 1e-6 * delta.norm()
        assert step.accepted
        assert step.loss == pytest.approx(np.log(3), rel=1e-12)
        assert step.measured == pytest.approx(float(functional.cross_entropy(trained(x).detach(), labels)), rel=1e-12)
        moved = (jacobian @ delta).reshape(7, 3)
        assert step.predicted == pytest.approx(float(functional.cross_entropy(moved, labels)), rel=1e-6)
        assert step.predicted < 0.7 * step.loss


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_squares_of_any_factor_in_a_closure_are_a_step_on_targets(kind: str) -> None:
    """One system, solved at once; as a function of features, of samples, and by conjugate gradients."""
    y = torch.randn(60, 3, dtype=torch.float64)
    cases: list[tuple[int, int | str]] = [(5, "1GiB"), (60, "1GiB"), (5, 100)]
    for samples, budget in cases:
        results, targets = [], y[:samples]
        for factor in [None, 1.0, 7.0]:
            model, x = task(kind, samples)
            optimizer = GramGaussNewton(model, damping=1e-2, kernel="features", budget=budget)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*conjugate gradients")
                if factor is None:
                    step = optimizer.step(x, targets)
                else:
                    step = optimizer.step(closure_of(model, x, partial(scaled, factor, targets)))
            assert step.accepted
            results.append(flat(model))
        moved = (results[0] - flat(task(kind)[0])).norm()
        for result in results[1:]:
            assert (result - results[0]).norm() <= (1e-4 if budget == 100 else 1e-9) * moved


def test_a_module_of_one_output_and_float32() -> None:
    """Logistic regression of scikit-learn, whose penalty is the same ridge."""
    from sklearn.linear_model import LogisticRegression

    torch.manual_seed(0)
    x = torch.randn(40, 3)
    labels = (x[:, 0] + 0.5 * torch.randn(40) > 0).float()
    linear = nn.Linear(3, 1, bias=False)
    model = nn.Sequential(linear, nn.Flatten(0))
    nn.init.zeros_(linear.weight)
    damping = 0.3
    optimizer = GramGaussNewton(model, damping=damping)
    step = optimizer.step(lambda: functional.binary_cross_entropy_with_logits(model(x), labels))
    ridge = damping * float(x.square().sum(1).mean()) / 4  # the Hessian at 0 is 1/4
    expected = LogisticRegression(C=1 / ridge, fit_intercept=False, tol=1e-10).fit(x.numpy(), labels.numpy())
    np.testing.assert_allclose(linear.weight.detach().numpy(), expected.coef_, rtol=1e-2)
    assert step.measured == pytest.approx(step.predicted, rel=1e-5)


def test_a_closure_sees_outputs_that_it_cannot_tell_from_the_models() -> None:
    model, x = task("mlp", dtype=torch.float32)
    whole = nn.Sequential(nn.Identity(), model)
    seen: list[tuple[Any, ...]] = []
    runs: list[int] = []
    model.register_forward_hook(lambda *_: runs.append(1))

    def closure() -> Tensor:
        out = whole(x)
        seen.append((out.dtype, tuple(out.shape), torch.is_grad_enabled()))
        return functional.cross_entropy(out, torch.arange(7) % 3)

    GramGaussNewton(whole, damping=1e-2, batch_size=100).step(closure)
    assert len(seen) > 5
    assert set(seen) == {(torch.float32, (7, 3), True)}
    assert len(runs) < len(seen)
    assert "forward" not in vars(whole)


@pytest.mark.parametrize(
    ("closure", "error", "message"),
    [
        (lambda m, x: torch.ones(()), ValueError, "closure must call the model, whose loss it computes"),
        (lambda m, x: m(x, x), ValueError, "closure must call the model with one tensor"),
        (lambda m, x: m(x).sum() + m(x).sum(), ValueError, "closure must call the model once, with all samples"),
        (lambda m, x: m(x), ValueError, r"closure must return the loss, a scalar tensor, got \(7, 3\)"),
        (lambda m, x: float(m(x).detach().sum()), ValueError, "closure must return the loss, a scalar tensor, got 0.0"),
        (lambda m, x: m(x).detach().sum(), ValueError, "closure must return a loss of the model's outputs"),
        (lambda m, x: -(m(x) - 1).square().sum(), ValueError, "closure must be convex in .* got the curvature -2"),
        (lambda m, x: m(x).sum(), ValueError, "closure must be convex in .* got the curvature 0"),
        (lambda m, x: m(x[:, :2]).sum(), ValueError, r"x must have shape \(N, 3\), got \(7, 2\)"),
    ],
)
def test_closures_that_are_none(closure: Any, error: type[Exception], message: str) -> None:
    model, x = task("mlp")
    kept = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        GramGaussNewton(model, damping=1e-2).step(lambda: closure(model, x))
    for name, value in model.state_dict().items():
        assert torch.equal(value, kept[name])
    assert "forward" not in vars(model)


def test_a_closure_that_calls_backward_or_has_targets_is_refused() -> None:
    model, x = task("mlp")
    optimizer = GramGaussNewton(model, damping=1e-2)

    def closure() -> Tensor:
        loss = (model(x) - 1).square().mean()
        loss.backward()
        return loss

    with pytest.raises(ValueError, match="closure must not call backward, which the step does"):
        optimizer.step(closure)
    with pytest.raises(ValueError, match="y must be left out with a closure"):
        optimizer.step(closure, x)
    with pytest.raises(TypeError, match="y must be given with x, or a closure in the place of both"):
        optimizer.step(x)


# --- Mini-batches with momentum ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["features", "empirical"])
@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_momentum_is_the_formula_on_explicit_jacobians(kind: str, chunks: int, kernel: Any) -> None:
    model, x = task(kind, 9, chunks=chunks)
    y, damping, momentum = torch.randn(9, 3, dtype=torch.float64), 1e-2, 0.7
    optimizer = GramGaussNewton(model, damping=damping, momentum=momentum, kernel=kernel, adaptive=False, batch_size=2)
    first = {rows: tangents(model, x[rows[0] : rows[1]]) for rows in [(0, 5), (5, 9), (2, 7)]}
    velocity = torch.zeros_like(flat(model))
    for rows, stale in first.items():
        part = slice(*rows)
        before, jacobian = flat(model), tangents(model, x[part])
        seen = stale if kernel == "features" else jacobian
        gram = model.ntk_lr * seen @ seen.T
        gram += damping * gram.diagonal().mean() * torch.eye(len(gram))
        residual = (y[part] - model(x[part]).detach()).flatten() - momentum * jacobian @ velocity
        coefficients = torch.linalg.solve(gram, residual)
        velocity = momentum * velocity + model.ntk_lr * jacobian.T @ coefficients
        step = optimizer.step(x[part], y[part], at=x[:3])
        change = flat(model) - before
        assert (change - (1 - momentum) * velocity).norm() <= 1e-7 * change.norm()
        assert step.outputs is not None
        assert step.measured == pytest.approx(step.predicted, rel=0.05)
        torch.testing.assert_close(step.outputs, model(x[:3]).detach(), rtol=0.02, atol=0.02)


def test_momentum_keeps_what_other_batches_have_learned() -> None:
    """Digits, three passes in batches of a tenth: without it they undo each other's work."""
    digits = load_task("digits")
    losses = {}
    for momentum in [0.0, 0.9]:
        torch.manual_seed(0)
        model = DeepNarrowMLP(64, 10, 200, rho=16.0)
        optimizer = GramGaussNewton(model, kernel="features", damping=1e-3, momentum=momentum, adaptive=False)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            for rows in torch.randperm(1437, generator=generator).split(144):
                optimizer.step(digits.x_train[rows], digits.y_train[rows])
        losses[momentum] = float((model(digits.x_train).detach() - digits.y_train).square().sum()) / 2 / 1437
    assert losses[0.9] < 0.75 * losses[0.0]


def test_a_run_with_momentum_goes_on_bit_for_bit() -> None:
    x, y = torch.rand(12, 2), torch.rand(12, 1)

    def fresh(seed: int) -> tuple[Narrow, GramGaussNewton]:
        torch.manual_seed(seed)
        model = DeepNarrowMLP(2, 1, 50)
        return model, GramGaussNewton(model, damping=1e-3, kernel="features", momentum=0.9)

    model, optimizer = fresh(0)
    for rows in torch.arange(12).split(4):
        optimizer.step(x[rows], y[rows])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    expected = [optimizer.step(x[rows], y[rows]) for rows in torch.arange(12).split(3)]
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, again = fresh(1)
    other.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    assert [again.step(x[rows], y[rows]) for rows in torch.arange(12).split(3)] == expected
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    plain = GramGaussNewton(fresh(1)[0], kernel="features")
    with pytest.raises(ValueError, match="state_dict must be of an optimizer with momentum"):
        plain.load_state_dict(saved["optimizer"])
    short = {**saved["optimizer"], "velocity": saved["optimizer"]["velocity"][1:]}
    with pytest.raises(ValueError, match="for parameters of the same shapes"):
        again.load_state_dict(short)


def test_a_step_that_is_taken_back_empties_momentum() -> None:
    model, x = task("mlp", scale=3.0)
    y = torch.randn(7, 3, dtype=torch.float64)
    optimizer = GramGaussNewton(model, damping=0.0, kernel="features", momentum=0.1)
    kept = flat(model)
    with pytest.warns(UserWarning, match="moved too far"):
        step = optimizer.step(x, y)
    assert not step.accepted
    assert torch.equal(flat(model), kept)
    assert optimizer.state_dict()["velocity"] is None


def test_bad_momentum() -> None:
    for value, error, message in [
        (1.0, ValueError, r"momentum must be in \[0, 1\), got 1.0"),
        (-0.1, ValueError, r"momentum must be in \[0, 1\), got -0.1"),
        ("much", TypeError, "momentum must be a number, got 'much'"),
    ]:
        with pytest.raises(error, match=message):
            GramGaussNewton(task("mlp")[0], momentum=value)  # type: ignore[arg-type]
    behind = nn.Sequential(nn.Linear(3, 3).double(), task("mlp", chunks=2)[0])
    with pytest.raises(ValueError, match="model must be differentiable in forward mode for momentum"):
        GramGaussNewton(behind, momentum=0.5)


# --- Chunk by chunk ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", ["offset", "plain"])
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_chunks_that_move_one_after_another_move_as_all_at_once(kind: str, form: Any, dtype: torch.dtype) -> None:
    y = torch.randn(7, 3, dtype=dtype)
    results, steps, calls = [], [], []
    for chunks, batch in [(1, 100), (3, 100), (4, 3)]:
        model, x = task(kind, dtype=dtype, chunks=chunks, form=form)
        before = flat(model)
        optimizer = GramGaussNewton(model, damping=1e-2, kernel="features", adaptive=False, batch_size=batch)
        most: list[int] = []
        for param in model.parameters():
            param.register_post_accumulate_grad_hook(
                lambda _, m=model, seen=most: seen.append(sum(p.grad is not None for p in m.parameters()))
            )
        seen: list[tuple[int, int]] = []
        steps.append(optimizer.step(x, y, at=x[:2], on_batch=lambda *done, s=seen: s.append(done)))
        calls.append(seen)
        results.append(flat(model) - before)
        if chunks > 1:
            assert max(most) <= 4  # a chunk's two, and those of an end
        assert all(param.grad is None for param in model.parameters())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for result, step in zip(results[1:], steps[1:], strict=True):
        assert (result - results[0]).norm() <= tolerance * results[0].norm()
        assert step.measured == pytest.approx(steps[0].measured, rel=100 * tolerance)
    assert calls[2][-1] == (28, 28)
    assert [done for done, _ in calls[2]] == sorted(done for done, _ in calls[2])


@pytest.mark.parametrize("kernel", ["features", "empirical"])
def test_chunks_that_are_frozen_stay(kernel: Any) -> None:
    model, x = task("cnn", chunks=3)
    for param in (model.hidden_weight[1], model.hidden_bias[1], model.last_weight):
        param.requires_grad_(False)
    kept = copy.deepcopy(model.state_dict())
    step = GramGaussNewton(model, damping=1e-3, kernel=kernel, adaptive=False).step(x, torch.rand(7, 3).double())
    assert step.measured == pytest.approx(step.predicted, rel=0.05)
    for name, value in model.named_parameters():
        assert torch.equal(value, kept[name]) is not value.requires_grad, name


def test_first_chunks_that_are_frozen() -> None:
    """No gradient goes so far, and the chunks behind them move as they do all at once."""
    moved = []
    for adaptive in (True, False):
        model, x = task("mlp", chunks=3)
        for param in (model.first_weight, model.first_bias, model.hidden_weight[0], model.hidden_bias[0]):
            param.requires_grad_(False)
        y = torch.ones_like(model(x).detach())
        optimizer = GramGaussNewton(model, adaptive=adaptive, damping=0.1, kernel="empirical")
        optimizer.step(x, y)
        moved.append([p.detach().clone() for p in model.parameters()])
    for one, other in zip(*moved, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_a_chunk_whose_gradient_is_not_finite_does_not_move() -> None:
    model, x = task("mlp", chunks=2)
    kept = copy.deepcopy(model.state_dict())

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return 1e-200 * torch.eye(len(a), len(b), dtype=torch.float64)

    optimizer = GramGaussNewton(model, damping=1e-2, kernel=kernel, adaptive=False)
    with pytest.raises(RuntimeError, match="the step is not finite"):
        optimizer.step(x, 1e150 + torch.zeros(7, 3).double())
    for name, value in model.named_parameters():
        assert torch.equal(value, kept[name])
