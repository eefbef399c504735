"""Gauss-Newton steps against linear algebra on explicit Jacobians of eager layers."""

from __future__ import annotations

import copy
import io
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from narrowdeep import DeepNarrowCNN, DeepNarrowMLP
from narrowdeep.ntk import empirical_ntk, features, limit_ntk_cnn, limit_ntk_mlp
from narrowdeep.ntk.features import InitialFeatures
from narrowdeep.ntk.network import find
from narrowdeep.optim import FusedSGD, GramGaussNewton
from narrowdeep.optim.kernels import FeatureKernel
from narrowdeep.optim.systems import ProductSystem, SampleSystem, _Symmetric, add_gram

# torch.func.jvp of torch 2.15 imports a module that scripts functions.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")

Narrow = DeepNarrowMLP | DeepNarrowCNN
Task = tuple[Narrow, Tensor, Tensor]


def task(kind: str, samples: int = 6, dtype: torch.dtype = torch.float64, **settings: Any) -> Task:
    torch.manual_seed(0)
    y = torch.randn(samples, 2, dtype=dtype)
    if kind == "mlp":
        return DeepNarrowMLP(3, 2, 12, dtype=dtype, **settings), torch.rand(samples, 3, dtype=dtype), y
    return DeepNarrowCNN(1, 2, 12, dtype=dtype, **settings), torch.rand(samples, 1, 4, 5, dtype=dtype), y


def by_hand(model: nn.Module, eager: nn.Module, x: Tensor, y: Tensor, damping: float, rate: float) -> list[Tensor]:
    """The change of each parameter of ``eager`` in one step, from its Jacobian."""
    params = {name: param.detach() for name, param in eager.named_parameters()}
    jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(eager, p, (x,)))(params)
    flat = torch.cat([part.flatten(2) for part in jacobian.values()], 2).flatten(0, 1)
    kernel = rate * flat @ flat.T
    kernel += damping * kernel.diagonal().mean() * torch.eye(len(kernel), dtype=kernel.dtype)
    residual = (y - model(x)).detach().flatten()
    change = rate * flat.T @ torch.linalg.solve(kernel, residual)
    parts = change.split([p.numel() for p in params.values()])
    return [part.view_as(p) for part, p in zip(parts, params.values(), strict=True)]


@pytest.mark.parametrize("kernel", ["features", "empirical"])
@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_a_step_is_that_of_explicit_jacobians(kind: str, chunks: int, kernel: Any) -> None:
    model, x, y = task(kind, scale=50.0, chunks=chunks)
    before = model.to_sequential().requires_grad_(False)
    change = by_hand(model, before, x, y, 1e-2, model.ntk_lr)
    step = GramGaussNewton(model, damping=1e-2, kernel=kernel, batch_size=4).step(x, y)
    after = model.to_sequential().requires_grad_(False)
    largest = max(float(part.abs().max()) for part in change)
    for p, q, part in zip(after.parameters(), before.parameters(), change, strict=True):
        assert (p - q - part).abs().max() <= 1e-10 * largest + 1e-15 * float(q.abs().max())
    assert step.accepted
    assert step.loss == pytest.approx(float(y.square().sum()) / 12, rel=1e-12)
    assert step.measured == pytest.approx(float((y - model(x)).detach().square().sum()) / 12, rel=1e-12)


def test_a_linear_module_takes_one_step_to_ridge_regression() -> None:
    from sklearn.linear_model import Ridge

    torch.manual_seed(0)
    x, y = torch.randn(20, 3, dtype=torch.float64), torch.randn(20, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(3, 1, dtype=torch.float64), nn.Flatten(0))
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    inputs = torch.cat([x, torch.ones(20, 1)], 1)
    mean = float(inputs.square().sum(1).mean())
    step = GramGaussNewton(model, damping=0.1).step(x, y, at=x[:3])
    ridge = Ridge(alpha=0.1 * mean, fit_intercept=False).fit(inputs.numpy(), y.numpy())
    np.testing.assert_allclose(model(x).detach(), ridge.predict(inputs.numpy()), rtol=1e-10)
    assert step.measured == pytest.approx(step.predicted, rel=1e-10)
    assert step.outputs is not None
    np.testing.assert_allclose(step.outputs[:, 0], ridge.predict(inputs[:3].numpy()), rtol=1e-10)


@pytest.mark.parametrize("samples", [5, 60])  # fewer and more than features
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_the_ways_to_solve_agree(kind: str, samples: int) -> None:
    """In features, in samples, by conjugate gradients; and the empirical kernel, which is the same at the start."""
    if kind == "cnn" and samples == 60:
        samples = 150
    results = []
    for kernel, budget in [("features", "1GiB"), ("features", 100), ("empirical", "1GiB"), ("empirical", 100)]:
        model, x, y = task(kind, samples, scale=1e3)
        optimizer = GramGaussNewton(model, damping=1e-2, kernel=kernel, budget=budget)  # type: ignore[arg-type]
        if budget == 100:
            with pytest.warns(UserWarning, match="would take .* more than budget=100 B: .* conjugate gradients"):
                step = optimizer.step(x, y, at=x[:2])
        else:
            step = optimizer.step(x, y, at=x[:2])
        assert step.outputs is not None
        torch.testing.assert_close(step.outputs, model(x[:2]).detach(), rtol=0.02, atol=0.02)
        results.append(torch.cat([param.detach().flatten() for param in model.parameters()]))
    for result, tolerance in zip(results[1:], [1e-4, 1e-7, 1e-4], strict=True):
        assert (result - results[0]).norm() <= tolerance * results[0].norm()


def test_a_matrix_shares_its_memory_with_its_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of rows, solved with one damping after another; nothing below the diagonal is read."""
    monkeypatch.setattr("narrowdeep.optim.systems._ROWS", 7)
    root, right = torch.randn(24, 40, dtype=torch.float64), torch.randn(24, 3, dtype=torch.float64)
    matrix = root @ root.T
    half = torch.zeros(24, 24, dtype=torch.float64)
    add_gram(half, root, root.T)
    torch.testing.assert_close(half.triu(), matrix.triu(), rtol=1e-12, atol=1e-12)
    half[tuple(torch.tril_indices(24, 24, -1))] = torch.nan
    kept, mean = half.clone(), float(matrix.diagonal().mean())
    system = _Symmetric(half, mean)
    for damping in [1e-2, 0.0, 3.0]:
        expected = torch.linalg.solve(matrix + damping * mean * torch.eye(24), right)
        torch.testing.assert_close(system.solve(right, damping), expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(system @ right, matrix @ right, rtol=1e-12, atol=1e-12)
        assert torch.equal(half.triu(1), kept.triu(1))
    singular = root[:, :20] @ root[:, :20].T  # of rank 20
    system = _Symmetric(singular, float(singular.diagonal().mean()))
    with pytest.raises(np.linalg.LinAlgError, match="numerically singular .* the smallest that works is") as found:
        system.solve(right, 0.0)
    least = float(re.findall(r"works is about damping=(\S+) ", str(found.value))[0])
    assert system.solve(right, least).isfinite().all()


@pytest.mark.parametrize("kept", [True, False])
def test_features_are_taken_where_they_are_fewer(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = task("mlp", 60)
    matrix = features(model, x)
    assert matrix.shape[1] < 60
    monkeypatch.setattr("narrowdeep.optim.kernels.SampleSystem", None)
    monkeypatch.setattr("narrowdeep.optim.kernels._BLOCK_BYTES", 1000)  # a few samples a block
    budget = 8 * matrix.shape[1] ** 2 + 8 * matrix.numel() * kept  # of the system, and of the features
    calls: list[int] = []
    rows = InitialFeatures.matrix

    def counted(self: InitialFeatures, part: Tensor) -> Tensor:
        calls.append(len(part))
        return rows(self, part)

    monkeypatch.setattr(InitialFeatures, "matrix", counted)
    step = GramGaussNewton(model, damping=1e-3, kernel="features", budget=budget).step(x, y)
    assert sum(calls) == (60 if kept else 180)  # once, or for the system, the right-hand side and the solution
    regular = matrix @ matrix.T + 1e-3 * matrix.square().sum(1).mean() * torch.eye(60)
    left = y - matrix @ matrix.T @ torch.linalg.solve(regular, y)
    assert step.predicted == pytest.approx(float(left.square().sum()) / 120, rel=1e-9)
    assert step.measured == pytest.approx(step.predicted, rel=0.2)


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_some_of_the_layers_start_conjugate_gradients_off(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same solution in far fewer products, by a system of a part of the features."""
    torch.manual_seed(0)
    shape = (3,) if kind == "mlp" else (1, 4, 4)
    model = DeepNarrowMLP(3, 2, 2000, rho=4.0) if kind == "mlp" else DeepNarrowCNN(1, 2, 300, rho=1.0)
    x, right = torch.rand(600, *shape), torch.randn(600, 2, dtype=torch.float64)
    found = InitialFeatures.of(model, find(model))
    matrix = features(model, x) @ features(model, x).T
    exact = SampleSystem(matrix.clone())
    expected = exact.solve(right, 1e-4)
    counts = []
    for few in [500, 1]:
        monkeypatch.setattr("narrowdeep.optim.kernels._FEW", few)
        kernel = FeatureKernel(found)
        with pytest.warns(UserWarning, match="conjugate gradients"):
            system: Any = kernel.system(x, 2, 8 * 599**2, lambda _: None)
        assert system.mean == pytest.approx(exact.mean, rel=1e-12)
        if few == 1:
            system = ProductSystem(system._product, system.mean)
        products: list[int] = []
        monkeypatch.setattr(system, "_product", lambda v, p=products: p.append(1) or matrix @ v)
        solution = system.solve(right, 1e-4)
        assert (solution - expected).norm() <= 1e-3 * expected.norm()
        counts.append(len(products))
    assert counts[0] < counts[1] / 2


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_kernels_of_ones_own(kind: str) -> None:
    """The limit, which is near the kernel of a deep network, by name and as a function; scalar and matrix-valued."""
    steps = []
    for name in ["features", "limit", "scalar", "matrix"]:
        torch.manual_seed(0)
        shape = (3,) if kind == "mlp" else (1, 3, 3)
        family: Any = DeepNarrowMLP if kind == "mlp" else DeepNarrowCNN
        model = family(shape[0], 2, 3000, scale=1e5, rho=2.0, dtype=torch.float64)
        x, y = torch.rand(4, *shape, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)

        def limit(a: Tensor, b: Tensor) -> Tensor:
            if kind == "mlp":
                return limit_ntk_mlp(a, b, rho=2.0, out_features=2)
            return limit_ntk_cnn(a, b, rho=2.0, out_channels=2)

        def matrix(a: Tensor, b: Tensor) -> Tensor:
            return limit(a, b)[:, :, None, None] * torch.eye(2)

        own: Any = {"scalar": limit, "matrix": matrix}.get(name, name)
        steps.append(GramGaussNewton(model, damping=0.1, kernel=own).step(x, y, at=x))
    for step in steps[1:]:
        assert step.measured == pytest.approx(steps[0].measured, rel=0.1)
        torch.testing.assert_close(step.outputs, steps[1].outputs, rtol=0.3 if step is steps[0] else 1e-9, atol=1e-9)


@pytest.mark.parametrize("kernel", ["features", "empirical"])
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_frozen_parameters_stay_and_do_not_count(kind: str, kernel: Any) -> None:
    model, x, y = task(kind, scale=1e3, chunks=2)
    for part in (model.first_weight, model.hidden_weight[0], model.last_bias):
        part.requires_grad_(False)
    kept = copy.deepcopy(model.state_dict())
    step = GramGaussNewton(model, damping=1e-3, kernel=kernel).step(x, y)
    assert step.measured == pytest.approx(step.predicted, rel=0.02)  # not so if they counted
    for name, value in model.named_parameters():
        assert torch.equal(value, kept[name]) is not value.requires_grad, name


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_float32_behind_a_pool_goes_where_float64_goes(kind: str) -> None:
    outputs = []
    for dtype in [torch.float32, torch.float64]:
        model, x, y = task(kind, 6, torch.float32, scale=300.0)
        x = x.repeat_interleave(2, -1)
        whole = nn.Sequential(nn.AvgPool2d((1, 2)) if kind == "cnn" else nn.AvgPool1d(2), model).to(dtype)
        optimizer = GramGaussNewton(whole, damping=1e-2, kernel="features")
        for _ in range(2):
            optimizer.step(x.to(dtype), y.to(dtype))
        assert all(param.grad is None for param in whole.parameters())
        outputs.append(whole(x.to(dtype)).detach().double())
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-4)


def circle(samples: int) -> tuple[Tensor, Tensor]:
    angle = torch.linspace(0.1, 1.4, samples, dtype=torch.float64)
    return torch.stack([angle.cos(), angle.sin()], 1), torch.sin(8 * angle)[:, None]


def test_an_undamped_second_step_with_a_stale_kernel_diverges_and_the_damping_saves_it() -> None:
    """At L = C_L = 1000: K^-1 sends so much along its last eigenvectors that the network leaves the linear regime."""
    x, y = circle(40)
    losses = {}
    for adaptive in [False, True]:
        torch.manual_seed(0)
        model = DeepNarrowMLP(2, 1, 1000, scale=1000.0, dtype=torch.float64)
        optimizer = GramGaussNewton(model, damping=1e-13, kernel="features", adaptive=adaptive)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            losses[adaptive] = [optimizer.step(x, y) for _ in range(6)]
    once, adapted = losses[False], losses[True]
    assert once[0].measured < 1e-6
    assert once[1].measured > 100 * once[0].measured
    assert once[-1].measured > 1
    assert not adapted[1].accepted
    assert adapted[-1].loss == once[0].measured


def test_a_step_that_does_not_lower_the_loss_is_taken_back() -> None:
    model, x, y = task("mlp", scale=3.0)
    kept = copy.deepcopy(model.state_dict())
    optimizer = GramGaussNewton(model, damping=0.0, kernel="features")
    with pytest.warns(UserWarning, match=r"moved too far for kernel='features' with damping=0 \(a larger scale"):
        step = optimizer.step(x, y)
    assert not step.accepted
    assert step.measured > step.loss
    for name, value in model.named_parameters():
        assert torch.equal(value, kept[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # warned once
        steps = [optimizer.step(x, y) for _ in range(4)]
    assert [s.accepted for s in steps] == [False, False, True, False]
    assert [s.damping for s in steps[:3]] == pytest.approx([2e-6, 8e-6, 64e-6])  # by 2, 4, 8 until a step is taken
    gain = (steps[2].loss - steps[2].measured) / (steps[2].loss - steps[2].predicted)
    assert steps[3].damping == pytest.approx(64e-6 * (1 - (2 * gain - 1) ** 3))
    assert steps[3].loss == pytest.approx(steps[2].measured)
    assert steps[2].measured < 0.7 * step.loss


@pytest.mark.parametrize("kernel", ["features", "empirical"])
def test_a_run_goes_on_bit_for_bit(kernel: Any) -> None:
    def fresh(seed: int) -> tuple[Narrow, GramGaussNewton]:
        torch.manual_seed(seed)
        model = DeepNarrowMLP(2, 1, 100, scale=20.0)
        return model, GramGaussNewton(model, damping=1e-4, kernel=kernel)

    x, y = (part.float() for part in circle(12))
    model, optimizer = fresh(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            optimizer.step(x, y)
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        expected = [optimizer.step(x, y) for _ in range(3)]
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        other, again = fresh(1)
        other.load_state_dict(saved["model"])
        again.load_state_dict(saved["optimizer"])
        assert [again.step(x, y) for _ in range(3)] == expected
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_kernel_of_other_samples_and_of_samples_changed_in_place_is_computed_again() -> None:
    model, x, y = task("mlp", scale=1e6)
    optimizer = GramGaussNewton(model, damping=1e-2, kernel="features", adaptive=False)
    for number in range(3):
        inputs = x if number == 0 else x.mul_(0.5) if number == 1 else x.flip(0)
        step = optimizer.step(inputs, y)
        assert step.measured == pytest.approx(step.predicted, rel=1e-3)


def test_a_function_is_called_at_every_step() -> None:
    """The kernel of the model as it is then, as "empirical" takes it."""
    steps = []
    for own in [True, False]:
        model, x, y = task("mlp", scale=200.0)
        kernel: Any = (lambda a, b, m=model: empirical_ntk(m, a, b)) if own else "empirical"
        optimizer = GramGaussNewton(model, damping=1e-2, kernel=kernel)
        steps.append([optimizer.step(x, y).measured for _ in range(3)])
    assert steps[0] == pytest.approx(steps[1], rel=1e-9)


def test_a_parameter_moves_in_blocks_and_one_may_be_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """``2 a x`` at a = 1 with targets 6 x: no damping needs no second step."""

    class Slope(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.tensor(1.0))
            self.b = nn.Parameter(torch.zeros(5, 2))

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.a * x + (self.b * torch.arange(2.0)).sum() * x

    monkeypatch.setattr("narrowdeep.optim.parameters._BLOCK", 2)
    model, x = Slope(), torch.tensor([[1.0]])
    GramGaussNewton(model, damping=0.0).step(x, 6 * x)
    # The gradient (2, five times 1) has the square 9, and 4 are missing.
    assert model.a.item() == pytest.approx(1 + 8 / 9)
    torch.testing.assert_close(model.b.detach(), torch.tensor([[0.0, 4 / 9]]).repeat(5, 1))


def test_progress_counts_samples() -> None:
    model, x, y = task("mlp", samples=5)
    seen: list[tuple[int, int]] = []
    GramGaussNewton(model, batch_size=2).step(x, y, on_batch=lambda done, total: seen.append((done, total)))
    assert seen == [(n, 20) for n in (2, 4, 5, 10, 12, 14, 15, 17, 19, 20)]


@pytest.mark.parametrize("ways", ["samples", "features"])
def test_a_singular_system_names_a_damping_that_works(ways: str) -> None:
    model, x, y = task("mlp", samples=6 if ways == "samples" else 60, scale=1e3)
    if ways == "samples":
        x[1] = x[0]
    with pytest.raises(np.linalg.LinAlgError, match="numerically singular with damping=0") as error:
        GramGaussNewton(model, damping=0.0, kernel="features").step(x, y)
    smallest = float(str(error.value).split("damping=")[2].split()[0])
    assert smallest < 1e-11
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what such a step does in a network with so few layers
        GramGaussNewton(model, damping=smallest, kernel="features").step(x, y)


def test_an_indefinite_kernel_names_a_damping_that_works() -> None:
    model, x, y = task("mlp", samples=2)
    matrix = torch.tensor([[1.0, 2.0], [2.0, 1.0]])  # eigenvalues 3 and -1

    def kernel(x1: Tensor, x2: Tensor) -> Tensor:
        return matrix[: len(x1), : len(x2)]

    with pytest.raises(np.linalg.LinAlgError, match=r"indefinite with damping=0.5: .* damping=2.0e\+00"):
        GramGaussNewton(model, damping=0.5, kernel=kernel).step(x, y)
    GramGaussNewton(model, damping=2.0, kernel=kernel).step(x, y)


def bad(**settings: Any) -> Callable[[], Any]:
    return lambda: GramGaussNewton(**{"model": task("mlp")[0], **settings})


def step(change: Callable[[Tensor, Tensor], Any], **settings: Any) -> Callable[[], Any]:
    def call() -> Any:
        model, x, y = task("mlp", scale=4.0)
        return GramGaussNewton(model, kernel=lambda *_: pytest.fail("a kernel ran")).step(*change(x, y), **settings)

    return call


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (bad(model=None), TypeError, "model must be a torch.nn.Module, got NoneType"),
        (bad(damping=-1), ValueError, "damping must be finite and not negative, got -1"),
        (bad(damping=True), TypeError, "damping must be a number, got True"),
        (bad(kernel="exact"), ValueError, "kernel must be 'features', 'empirical', 'limit' or a callable, got 'exact'"),
        (bad(kernel=None), ValueError, "kernel must be 'features', 'empirical', 'limit' or a callable, got None"),
        (bad(adaptive=1), TypeError, "adaptive must be True or False, got 1"),
        (bad(batch_size=0), ValueError, "batch_size must be at least 1, got 0"),
        (bad(budget="much"), ValueError, "budget must be a number and one of the units"),
        (bad(model=nn.Linear(2, 1), kernel="features"), ValueError, "model must be a DeepNarrowMLP .* got Linear"),
        (bad(model=nn.Linear(2, 1), kernel="limit"), ValueError, "model must be a narrow model for kernel='limit'"),
        (bad(model=nn.ReLU()), ValueError, "model must have a parameter that requires gradients, got none"),
        (bad(model=task("mlp")[0].requires_grad_(False)), ValueError, "model must have a parameter that requires"),
        (step(lambda x, y: (x[:, :2], y)), ValueError, r"x must have shape \(N, 3\), got \(6, 2\)"),
        (step(lambda x, y: (x.float(), y)), TypeError, "x and first_weight must have the same dtype"),
        (step(lambda x, y: (x[:0], y[:0])), ValueError, "x must have at least one sample, got none"),
        (step(lambda x, y: (x, y[:5])), ValueError, r"y must have shape \(6, 2\), as the outputs, got \(5, 2\)"),
        (step(lambda x, y: (x, y[:, 0])), ValueError, r"y must have shape \(6, 2\), as the outputs, got \(6,\)"),
        (step(lambda x, y: (x, y.float())), TypeError, "y and the model must have the same dtype"),
        (step(lambda x, y: (x, y.numpy())), TypeError, "y must be a torch.Tensor, got ndarray"),
        (step(lambda x, y: (x, y / 0)), ValueError, "y must be finite, got NaN or infinity"),
        (step(lambda x, y: (x, y * 0 - 4)), ValueError, r"y must be above -C_L = -4, .* got -4"),
        (step(lambda x, y: (x * torch.nan, y)), ValueError, "model must have finite outputs at x"),
        (step(lambda x, y: (x, y), at=torch.ones(2, 2)), ValueError, r"at must have shape \(N, 3\), got \(2, 2\)"),
    ],
)
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_state_of_another_network_changes_nothing() -> None:
    optimizer = GramGaussNewton(task("mlp")[0], kernel="features")
    cnn = GramGaussNewton(task("cnn")[0], kernel="features").state_dict()
    limit = GramGaussNewton(task("mlp")[0], kernel="limit").state_dict()
    for state, message in [({}, "a GramGaussNewton's"), (cnn, "kernel_size 1 as"), (limit, "kernel='features'")]:
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict({**state, "damping": 3.0} if state else state)
    assert optimizer.damping == 1e-4


def test_inputs_that_require_gradients_get_none() -> None:
    model, x, y = task("mlp")
    x.requires_grad_()
    GramGaussNewton(model, damping=1e-2).step(x, y)
    assert x.grad is None


def test_parameters_of_a_fused_optimizer_are_refused() -> None:
    model, x, y = task("mlp")
    fused = FusedSGD(model, lr=0.1)
    with pytest.raises(ValueError, match=r"must not have parameters of a FusedSGD: call remove\(\)"):
        GramGaussNewton(model)
    fused.remove()
    GramGaussNewton(model, damping=1e-2).step(x, y)


def test_a_model_that_draws_random_numbers_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout())
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        GramGaussNewton(model).step(torch.ones(2, 3), torch.ones(2, 2))
