"""NTKRegressor against closed forms, simulated training of the linear model, and scikit-learn's own checks."""

from __future__ import annotations

import contextlib
import copy
import math
import re
from typing import Any

import numpy as np
import pytest
import scipy.linalg  # type: ignore[import-untyped]
import torch
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_predict
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from narrowdeep import DeepNarrowMLP
from narrowdeep.ntk.empirical import empirical_ntk
from narrowdeep.ntk.limit import limit_ntk_cnn, limit_ntk_mlp
from narrowdeep.ntk.regression import NTKRegressor


def features(a: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
    """A kernel whose feature map is known: 1, x, x^2 of every entry."""

    def phi(x: torch.Tensor) -> torch.Tensor:
        return torch.cat((torch.ones_like(x[:, :1]), x, x.square()), 1)

    return phi(a) @ phi(a if b is None else b).t()


def phi(x: np.ndarray) -> np.ndarray:
    return np.concatenate((np.ones_like(x[:, :1]), x, x**2), 1)


@pytest.fixture
def data() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.uniform(0.1, 1, (20, 3)), rng.normal(size=(20, 2)), rng.uniform(0.1, 1, (7, 3))


# Warnings that scikit-learn's checks provoke on purpose are theirs to judge.
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
@pytest.mark.filterwarnings("ignore:X has negative entries")
@pytest.mark.parametrize(
    "estimator", [NTKRegressor(limit_ntk_mlp, ridge=1e-3), NTKRegressor("precomputed", ridge=10.0)], ids=["limit", "K"]
)
def test_scikit_learn_checks(estimator: NTKRegressor) -> None:
    check_estimator(estimator)


def failed_checks(estimator: NTKRegressor) -> dict[str, Exception]:
    results = check_estimator(estimator, on_fail=None, on_skip=None)
    return {r["check_name"]: r["exception"] for r in results if r["status"] == "failed"}


@pytest.mark.filterwarnings("ignore:X has negative entries")
def test_the_only_checks_that_fail_without_ridge_are_the_documented_ones() -> None:
    failed = failed_checks(NTKRegressor(limit_ntk_mlp))
    assert set(failed) == {"check_fit_idempotent", "check_sample_weight_equivalence_on_dense_data"}
    for error in failed.values():
        assert isinstance(error, np.linalg.LinAlgError)


def test_precomputed_kernels_without_ridge_fail_the_checks_that_give_singular_ones() -> None:
    """As the docstring says: 13 checks, each with a kernel matrix x x^T of more samples than features."""
    failed = failed_checks(NTKRegressor("precomputed"))
    assert len(failed) == 13
    for error in failed.values():
        assert isinstance(error, np.linalg.LinAlgError)
        assert "is numerically singular" in str(error)


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_limit_in_time_solves_the_linear_system(data, ridge: float) -> None:
    X, y, test = data
    K = limit_ntk_mlp(torch.tensor(X)).numpy()
    expected = limit_ntk_mlp(torch.tensor(test), torch.tensor(X)).numpy() @ np.linalg.solve(K + ridge * np.eye(20), y)
    model = NTKRegressor(limit_ntk_mlp, ridge=ridge).fit(X, y)
    np.testing.assert_allclose(model.predict(test), expected, rtol=1e-7)
    one = NTKRegressor(limit_ntk_mlp, ridge=ridge).fit(X, y[:, 1])
    assert one.predict(test).shape == (7,)
    np.testing.assert_allclose(one.predict(test), expected[:, 1], rtol=1e-7)
    if ridge == 0:
        np.testing.assert_allclose(model.predict(X), y, rtol=1e-7)


@pytest.mark.parametrize("ridge", [0.0, 0.2])
@pytest.mark.parametrize("momentum_free_steps", [0, 1, 37])
def test_steps_are_gradient_descent_on_the_linear_model(data, ridge: float, momentum_free_steps: int) -> None:
    """theta <- theta - tau / N (phi^T (phi theta - y) + ridge theta), simulated. The kernel has rank 7 of 20."""
    X, y, test = data
    theta, tau = np.zeros((7, 2)), 0.2
    for _ in range(momentum_free_steps):
        theta -= tau / 20 * (phi(X).T @ (phi(X) @ theta - y) + ridge * theta)
    model = NTKRegressor(features, ridge=ridge).fit(X, y)
    got = model.predict(test, n_steps=momentum_free_steps, tau=tau)
    np.testing.assert_allclose(got, phi(test) @ theta, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("ridge", [0.0, 0.2])
@pytest.mark.parametrize("t", [0.0, 1e-9, 3.0, 500.0])
def test_flow_is_the_matrix_exponential(data, ridge: float, t: float) -> None:
    """d theta / dt = -(phi^T (phi theta - y) + ridge theta) / N from 0: an augmented matrix exponential."""
    X, y, test = data
    A = np.zeros((9, 9))
    A[:7, :7] = -(phi(X).T @ phi(X) + ridge * np.eye(7)) / 20
    A[:7, 7:] = phi(X).T @ y / 20
    theta = scipy.linalg.expm(A * t)[:7, 7:]
    got = NTKRegressor(features, ridge=ridge).fit(X, y).predict(test, t=t)
    np.testing.assert_allclose(got, phi(test) @ theta, rtol=1e-9, atol=1e-12)


def test_descent_with_small_steps_is_the_flow_and_both_end_at_the_limit(data) -> None:
    X, y, test = data
    model = NTKRegressor(limit_ntk_mlp, ridge=0.05).fit(X, y)
    np.testing.assert_allclose(
        model.predict(test, n_steps=10**9, tau=3e-9), model.predict(test, t=3.0), rtol=1e-6, atol=1e-9
    )
    end = model.predict(test)
    np.testing.assert_allclose(model.predict(test, t=1e6), end, rtol=1e-9)
    np.testing.assert_allclose(model.predict(test, n_steps=10**7, tau=0.3), end, rtol=1e-9)
    with pytest.raises(ValueError, match=r"tau must be below .* 1000000 steps of 100.0 have overflowed"):
        model.predict(test, n_steps=10**6, tau=100.0)


def test_matrix_valued_kernel_mixes_outputs(data) -> None:
    """Theta = k(x, x') B with B = [[2, 1], [1, 3]]: in B's eigenbasis, two scalar problems with kernels 2nd and 3rd."""
    X, y, test = data
    B = np.array([[2.0, 1.0], [1.0, 3.0]])
    values, vectors = np.linalg.eigh(B)

    def full(a: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
        return limit_ntk_mlp(a, b)[:, :, None, None] * torch.tensor(B)

    model = NTKRegressor(full, ridge=0.1).fit(X, y)
    rotated = y @ vectors
    predictions: list[dict[str, Any]] = [{}, {"t": 2.0}, {"n_steps": 5, "tau": 0.3}]
    for arguments in predictions:
        columns = [
            NTKRegressor(lambda a, b=None, v=v: v * limit_ntk_mlp(a, b), ridge=0.1)
            .fit(X, rotated[:, i])
            .predict(test, **arguments)
            for i, v in enumerate(values)
        ]
        np.testing.assert_allclose(model.predict(test, **arguments), np.stack(columns, 1) @ vectors.T, rtol=1e-8)


def test_precomputed_is_the_callable(data) -> None:
    X, y, test = data
    K = limit_ntk_mlp(torch.tensor(X)).numpy()
    cross = limit_ntk_mlp(torch.tensor(test), torch.tensor(X)).numpy()
    given, called = NTKRegressor("precomputed").fit(K, y), NTKRegressor(limit_ntk_mlp).fit(X, y)
    predictions: list[dict[str, Any]] = [{}, {"t": 2.0}]
    for arguments in predictions:
        np.testing.assert_allclose(given.predict(cross, **arguments), called.predict(test, **arguments), rtol=1e-12)
    full = np.einsum("ij,ab->ijab", K, np.eye(2))
    wide = NTKRegressor("precomputed").fit(full, y).predict(np.einsum("ij,ab->ijab", cross, np.eye(2)))
    np.testing.assert_allclose(wide, called.predict(test), rtol=1e-7)


def test_images_and_blocks(data, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    images, y = rng.uniform(size=(9, 1, 3, 3)), rng.normal(size=9)
    model = NTKRegressor(limit_ntk_cnn).fit(images, y)
    np.testing.assert_allclose(model.predict(images), y, rtol=1e-7)
    whole = model.predict(images + 0.1)
    monkeypatch.setattr("narrowdeep.ntk.regression._BLOCK", 20)
    np.testing.assert_allclose(model.predict(images + 0.1), whole, rtol=1e-10)


def test_inside_scikit_learn(data) -> None:
    X, y, _ = data
    search = GridSearchCV(NTKRegressor(limit_ntk_mlp), {"ridge": [1e-3, 1e-1]}, cv=3).fit(X, y)
    assert search.best_params_["ridge"] in (1e-3, 1e-1)
    K = limit_ntk_mlp(torch.tensor(X)).numpy()
    np.testing.assert_allclose(
        cross_val_predict(NTKRegressor("precomputed", ridge=0.1), K, y, cv=4),
        cross_val_predict(NTKRegressor(limit_ntk_mlp, ridge=0.1), X, y, cv=4),
        rtol=1e-10,
    )
    assert clone(NTKRegressor(limit_ntk_mlp, ridge=0.5)).ridge == 0.5


def test_singular_kernel_says_what_to_do_and_still_flows(data) -> None:
    X, y, test = data
    model = NTKRegressor(limit_ntk_mlp).fit(np.concatenate((X, X[:1])), np.concatenate((y, y[:1])))
    with pytest.raises(np.linalg.LinAlgError, match=r"21 samples is.* singular.*ridge.*coincide.*finite time"):
        model.predict(test)
    assert np.isfinite(model.predict(test, t=10.0)).all()
    assert np.isfinite(model.predict(test, n_steps=10, tau=0.1)).all()


def test_arguments_of_another_type_are_named(data) -> None:
    X, y, test = data
    with pytest.raises(TypeError, match="ridge must be a number, got '1'"):
        NTKRegressor(limit_ntk_mlp, ridge="1").fit(X, y)  # type: ignore[arg-type]
    model = NTKRegressor(limit_ntk_mlp).fit(X, y)
    with pytest.raises(TypeError, match="t must be a number, got '1'"):
        model.predict(test, t="1")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="tau must be a number, got True"):
        model.predict(test, n_steps=3, tau=True)


def test_kernels_that_are_none_are_refused() -> None:
    """Asymmetric, and indefinite (eigenvalues 3 and -1); rounding of float32 is neither."""
    y = np.ones(2)
    with pytest.raises(ValueError, match="kernel must be symmetric, got entries that differ by 1 "):
        NTKRegressor("precomputed").fit([[2.0, 1.0], [0.0, 2.0]], y)
    with pytest.raises(ValueError, match="positive semidefinite, got the eigenvalue -1"):
        NTKRegressor("precomputed").fit([[1.0, 2.0], [2.0, 1.0]], y).predict([[1.0, 1.0]], t=1.0)
    rounded = NTKRegressor("precomputed").fit([[1.0, 1.0], [1.0 + 1e-7, 1.0 - 1e-7]], y)
    np.testing.assert_allclose(rounded.predict([[1.0, 1.0]], t=100.0), [1.0], rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: m.predict(x, t=-1.0), "t must be finite and not negative .*got -1.0"),
        (lambda m, x: m.predict(x, t=np.nan), "t must be finite"),
        (lambda m, x: m.predict(x, n_steps=3), "n_steps and tau must be given together"),
        (lambda m, x: m.predict(x, t=1.0, n_steps=3, tau=1.0), "t must be None when n_steps is given"),
        (lambda m, x: m.predict(x, n_steps=-3, tau=1.0), "n_steps must be at least 0, got -3"),
        (lambda m, x: m.predict(x, n_steps=3, tau=0.0), "tau must be finite and positive, got 0.0"),
        (lambda m, x: m.predict(x[:, :2]), "2 features.*expecting 3"),
    ],
)
def test_bad_prediction(data, call, message: str) -> None:
    X, y, test = data
    with pytest.raises(ValueError, match=message):
        call(NTKRegressor(limit_ntk_mlp).fit(X, y), test)


@pytest.mark.parametrize(
    ("kernel", "ridge", "message"),
    [
        ("rbf", 0.0, "kernel must be a callable or 'precomputed', got 'rbf'"),
        (limit_ntk_mlp, -1.0, "ridge must be finite and not negative, got -1.0"),
        ("precomputed", 0.0, r"kernel must be square, \(20, 20\) or .*got \(20, 3\)"),
        (lambda a, b=None: a @ a.t() * torch.nan, 0.0, "kernel must be finite"),
    ],
)
def test_bad_fit(data, kernel, ridge: float, message: str) -> None:
    X, y, _ = data
    with pytest.raises(ValueError, match=message):
        NTKRegressor(kernel, ridge=ridge).fit(X, y)


def test_fit_keeps_none_of_the_callers_arrays(data) -> None:
    X, y, test = data
    K = limit_ntk_mlp(X).numpy().copy()
    cross = limit_ntk_mlp(test, X).numpy()
    called = NTKRegressor(limit_ntk_mlp, ridge=0.1).fit(X, y)
    given = NTKRegressor("precomputed", ridge=0.1).fit(K, y)
    expected = [called.predict(test), called.predict(test, t=2.0)]
    before = X.copy()
    K[:], X[:] = np.nan, np.nan
    for model, points in ((given, cross), (called, test)):
        np.testing.assert_allclose(model.predict(points), expected[0], rtol=1e-10)
        np.testing.assert_allclose(model.predict(points, t=2.0), expected[1], rtol=1e-10)
    K = limit_ntk_mlp(before).numpy()
    kept = K.copy()
    NTKRegressor("precomputed", ridge=0.1).fit(K, y)
    np.testing.assert_array_equal(K, kept)


@pytest.mark.parametrize("ridge", [0.0, 1e-300, 1e-17, 1e-16])
@pytest.mark.parametrize("case", ["coincide", "rank", "zero", "rounded", "large"])
def test_the_ridge_that_is_suggested_is_larger_and_works(data, case: str, ridge: float) -> None:
    X, y, _ = data
    K = {
        "coincide": lambda: limit_ntk_mlp(np.concatenate((X, X[:1]))).numpy(),
        "rank": lambda: X @ X.T,
        "zero": lambda: np.zeros((20, 20)),
        "rounded": lambda: limit_ntk_mlp(np.concatenate((X, X)).astype(np.float32)).double().numpy(),
        "large": lambda: 1e12 * X @ X.T,
    }[case]()
    target = np.resize(y[:, 0], len(K))
    model = NTKRegressor("precomputed", ridge=ridge).fit(K, target)
    if case == "zero" and ridge > 0:
        assert not model.predict(K).any()
        return
    with pytest.raises(np.linalg.LinAlgError, match="singular") as error:
        model.predict(K)
    found = re.search(r"for example ridge=([0-9.e+-]+)\)", str(error.value))
    assert found
    suggested = float(found.group(1))
    assert suggested > ridge
    assert suggested <= 1e-4 * max(np.abs(K).max(), 1e-270)
    assert np.isfinite(NTKRegressor("precomputed", ridge=suggested).fit(K, target).predict(K)).all()


def test_negative_inputs_of_a_limit_kernel_are_warned_of(data) -> None:
    X, y, _ = data
    scaled = StandardScaler().fit_transform(X)
    for kernel in (limit_ntk_mlp, lambda a, b=None: limit_ntk_mlp(a, b, rho=2.0)):
        with pytest.warns(UserWarning, match=r"X has negative entries, which a limit kernel takes for 0 .*got -"):
            NTKRegressor(kernel, ridge=1.0).fit(scaled, y)
        NTKRegressor(kernel, ridge=1.0).fit(X, y)
    NTKRegressor(features, ridge=1.0).fit(scaled, y)  # any other kernel may take them


def test_a_float32_model_as_kernel(data) -> None:
    """X is cast to the model's dtype, in a callable and as a module; truth is the float64 copy of the model."""
    X, y, test = data
    torch.manual_seed(0)
    model = DeepNarrowMLP(3, 2, 6)
    other = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    for net in (model, other):
        exact = copy.deepcopy(net).double()
        ridge = 0.1
        expected = NTKRegressor(lambda a, b=None, m=exact: empirical_ntk(m, a, b), ridge=ridge).fit(X, y).predict(test)
        called = NTKRegressor(lambda a, b=None, m=net: empirical_ntk(m, a, b), ridge=ridge).fit(X, y)
        np.testing.assert_allclose(called.predict(test), expected, rtol=1e-3, atol=1e-4)
        as_module = NTKRegressor(net, ridge=ridge).fit(X, y)
        np.testing.assert_allclose(as_module.predict(test), called.predict(test), rtol=1e-12)
    with pytest.raises(TypeError, match="x1 and first_weight must have the same dtype"):
        empirical_ntk(model, torch.tensor(X))


def test_numbers_arrays_and_byte_orders(data) -> None:
    X, y, test = data
    expected = NTKRegressor(limit_ntk_mlp, ridge=0.5).fit(X, y).predict(test)
    for order in (">f8", "<f8"):
        model = NTKRegressor(limit_ntk_mlp, ridge=np.float32(0.5)).fit(X.astype(order), y.astype(order))
        np.testing.assert_array_equal(model.predict(test.astype(order)), expected)
    tensors = NTKRegressor(limit_ntk_mlp, ridge=0.5).fit(torch.tensor(X), torch.tensor(y))
    np.testing.assert_array_equal(tensors.predict(torch.tensor(test)), expected)
    np.testing.assert_allclose(
        model.predict(test, n_steps=np.int64(7), tau=np.float32(0.25)),
        model.predict(test, n_steps=7, tau=0.25),
        rtol=1e-13,
    )
    for bad in (10**400, math.nan, math.inf):
        with pytest.raises(ValueError, match="ridge must be finite and not negative, got"):
            NTKRegressor(limit_ntk_mlp, ridge=bad).fit(X, y)


@pytest.mark.parametrize("mode", ["autocast", "device", "bfloat16"])
def test_global_modes_change_nothing(data, mode: str) -> None:
    X, y, test = data
    expected = NTKRegressor(limit_ntk_mlp, ridge=0.5).fit(X, y).predict(test)
    single = limit_ntk_mlp(X.astype(np.float32))
    images = torch.rand(3, 1, 4, 4)
    cnn = limit_ntk_cnn(images)
    context: Any = {
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        "device": lambda: torch.device("meta"),
        "bfloat16": contextlib.nullcontext,
    }[mode]()
    if mode == "bfloat16":
        torch.set_default_dtype(torch.bfloat16)
    try:
        with context:
            got = NTKRegressor(limit_ntk_mlp, ridge=0.5).fit(X, y).predict(test)
            assert torch.equal(limit_ntk_mlp(X.astype(np.float32)), single)
            assert torch.equal(limit_ntk_cnn(images), cnn)
    finally:
        torch.set_default_dtype(torch.float32)
    np.testing.assert_array_equal(got, expected)


# --- The posterior, a start, and settings that a search tunes ---------------------------------------------------------


@pytest.mark.parametrize("ridge", [1e-3, 0.3])
def test_the_posterior_is_the_closed_form(data, ridge: float) -> None:
    """K** - K*X (K + r)^-1 KX*, and at a finite time the same with the covariance of the trained linear model."""
    X, y, test = data
    K, cross, prior = limit_ntk_mlp(X).numpy(), limit_ntk_mlp(test, X).numpy(), limit_ntk_mlp(test).numpy()
    expected = prior - cross @ np.linalg.inv(K + ridge * np.eye(20)) @ cross.T
    called = NTKRegressor(limit_ntk_mlp, ridge=ridge).fit(X, y)
    given = NTKRegressor("precomputed", ridge=ridge).fit(K, y)
    extras: list[dict[str, Any]] = [{}, {"prior": prior}]
    for model, points, extra in zip((called, given), (test, cross), extras, strict=True):
        mean, cov = model.predict(points, return_cov=True, **extra)
        np.testing.assert_allclose(cov, expected, rtol=0, atol=1e-10)
        np.testing.assert_array_equal(mean, model.predict(points))
        mean, std = model.predict(points, return_std=True, **extra)
        assert std.shape == mean.shape == (7, 2)
        for column in std.T:
            np.testing.assert_allclose(column**2, np.diagonal(expected), rtol=0, atol=1e-10)
        assert np.abs(model.predict(points, t=0.0, return_cov=True, **extra)[1] - prior).max() < 1e-12
        # theta drawn from N(0, I), flow on targets with noise of variance r: theta_t = A theta + B (y + noise).
        rate, steps, tau = np.linalg.eigh(K), 9, 0.3
        g = rate[1] @ np.diag((1 - (1 - tau * (rate[0] + ridge) / 20) ** steps) / (rate[0] + ridge)) @ rate[1].T
        left = cross @ g
        late = prior - left @ cross.T - cross @ left.T + left @ (K + ridge * np.eye(20)) @ left.T
        got = model.predict(points, n_steps=steps, tau=tau, return_cov=True, **extra)[1]
        np.testing.assert_allclose(got, late, rtol=0, atol=1e-10)
        late_std = model.predict(points, n_steps=steps, tau=tau, return_std=True, **extra)[1]
        np.testing.assert_allclose(late_std[:, 0] ** 2, np.diagonal(late), rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="return_std and return_cov must not both be True"):
        called.predict(test, return_std=True, return_cov=True)
    with pytest.raises(ValueError, match=r"prior must be k\(X, X\) with 'precomputed', got NoneType"):
        given.predict(cross, return_std=True)
    with pytest.raises(ValueError, match="prior must be left out"):
        called.predict(test, return_std=True, prior=prior)


def test_the_posterior_of_a_matrix_valued_kernel_and_in_blocks(data, monkeypatch: pytest.MonkeyPatch) -> None:
    X, y, test = data
    B = np.array([[2.0, 1.0], [1.0, 3.0]])

    def full(a: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
        return limit_ntk_mlp(a, b)[:, :, None, None] * torch.tensor(B)

    K = np.kron(limit_ntk_mlp(X).numpy(), B)
    cross, prior = np.kron(limit_ntk_mlp(test, X).numpy(), B), np.kron(limit_ntk_mlp(test).numpy(), B)
    expected = prior - cross @ np.linalg.inv(K + 0.1 * np.eye(40)) @ cross.T
    model = NTKRegressor(full, ridge=0.1).fit(X, y)
    cov = model.predict(test, return_cov=True)[1]
    assert cov.shape == (7, 7, 2, 2)
    np.testing.assert_allclose(cov.transpose(0, 2, 1, 3).reshape(14, 14), expected, rtol=0, atol=1e-10)
    for block in (1 << 25, 80):
        monkeypatch.setattr("narrowdeep.ntk.regression._BLOCK", block)
        std = model.predict(test, return_std=True)[1]
        np.testing.assert_allclose(std.reshape(-1) ** 2, np.diagonal(expected), rtol=0, atol=1e-10)


def test_a_start_that_is_not_zero(data) -> None:
    """f0 + k (K + r)^-1 (y - f0): as an array, a callable and a module."""
    X, y, test = data
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2).double()
    f0, f0_test = (net(torch.tensor(x)).detach().numpy() for x in (X, test))
    shifted = NTKRegressor(limit_ntk_mlp, ridge=0.2).fit(X, y - f0)
    times: list[dict[str, Any]] = [{}, {"t": 3.0}]
    for arguments in times:
        expected = shifted.predict(test, **arguments) + f0_test
        array = NTKRegressor(limit_ntk_mlp, ridge=0.2).fit(X, y, initial=f0)
        np.testing.assert_allclose(array.predict(test, initial=f0_test, **arguments), expected, rtol=1e-12)
        for start in (net, lambda x: net(x).detach()):
            model = NTKRegressor(limit_ntk_mlp, ridge=0.2).fit(X, y, initial=start)
            np.testing.assert_allclose(model.predict(test, **arguments), expected, rtol=1e-12)
    with pytest.raises(ValueError, match=r"initial must be f0\(X\), as fit was given an array"):
        array.predict(test)
    with pytest.raises(ValueError, match=r"initial must have the shape of y, \(20, 2\), got \(20, 3\)"):
        NTKRegressor(limit_ntk_mlp).fit(X, y, initial=X)
    with pytest.raises(ValueError, match="initial must be left out"):
        shifted.predict(test, initial=f0_test)


def test_time_and_initialisation_are_settings(data) -> None:
    X, y, test = data
    model = NTKRegressor(limit_ntk_mlp, ridge=0.2, t=3.0, rho=2.0, beta=0.5).fit(X, y)
    fixed = NTKRegressor(lambda a, b=None: limit_ntk_mlp(a, b, rho=2.0, beta=0.5), ridge=0.2).fit(X, y)
    np.testing.assert_array_equal(model.predict(test), fixed.predict(test, t=3.0))
    np.testing.assert_array_equal(model.predict(test, t=1.0), fixed.predict(test, t=1.0))
    np.testing.assert_array_equal(model.predict(test, math.inf), fixed.predict(test))
    search = GridSearchCV(
        NTKRegressor(limit_ntk_mlp, ridge=0.1), {"t": [1.0, None], "rho": [0.5, 2.0], "beta": [0.0, 1.0]}, cv=2
    ).fit(X, y)
    assert set(search.best_params_) == {"t", "rho", "beta"}
    with pytest.raises(ValueError, match="rho must be None where the kernel is no function of it, got 'precomputed'"):
        NTKRegressor("precomputed", rho=1.0).fit(X @ X.T, y)
    with pytest.raises(ValueError, match="t must be finite and not negative .*got -2"):
        NTKRegressor(limit_ntk_mlp, t=-2).fit(X, y)


# --- Weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [{}, {"t": 30.0}, {"n_steps": 40, "tau": 0.5}])
@pytest.mark.parametrize("precomputed", [False, True])
def test_a_weight_counts_samples(data, way: dict[str, Any], precomputed: bool) -> None:
    """Weights 0, 1, 2, 3 against that many copies of each sample, with their covariance."""
    x, y, points = data
    times = np.arange(20) % 4
    copies = np.repeat(np.arange(20), times)

    def fitted(rows: np.ndarray, **weights: Any) -> Any:
        if not precomputed:
            model = NTKRegressor(limit_ntk_mlp, ridge=0.1).fit(x[rows], y[rows], **weights)
            return model.predict(points, return_cov=True, **way)
        kernel, cross = (limit_ntk_mlp(a, x[rows]).numpy() for a in (x[rows], points))
        prior = limit_ntk_mlp(points).numpy()
        model = NTKRegressor("precomputed", ridge=0.1).fit(kernel, y[rows], **weights)
        return model.predict(cross, return_cov=True, prior=prior, **way)

    expected, covariance = fitted(copies)
    got, with_weights = fitted(np.arange(20), sample_weight=times)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-9)
    np.testing.assert_allclose(with_weights, covariance, rtol=0, atol=1e-9)


def test_weights_of_a_matrix_kernel_and_an_initial_output(data) -> None:
    x, y, points = data

    def kernel(a: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
        return limit_ntk_mlp(a, b)[:, :, None, None] * torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)

    weights = np.arange(20) % 4
    copies = np.repeat(np.arange(20), weights)
    settings: dict[str, Any] = {"initial": lambda a: a[:, :2]}
    expected = NTKRegressor(kernel, ridge=0.1).fit(x[copies], y[copies], **settings).predict(points)
    model = NTKRegressor(kernel, ridge=0.1).fit(x, y, sample_weight=torch.tensor(weights), **settings)
    np.testing.assert_allclose(model.predict(points), expected, rtol=0, atol=1e-9)


def test_bad_weights(data) -> None:
    x, y, _ = data
    for weights, message in [
        (np.zeros(20), "sample_weight must be finite, not negative, and not zero for every sample"),
        (np.arange(20) - 1, "sample_weight must be finite, not negative"),
        (np.full(20, np.nan), "sample_weight must be finite, not negative"),
        (np.ones(19), r"sample_weight must have shape \(20,\), got \(19,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            NTKRegressor(limit_ntk_mlp, ridge=0.1).fit(x, y, sample_weight=weights)


# --- Momentum, and draws ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize("steps", [0, 1, 50])
def test_steps_with_momentum_are_those_of_torch_on_the_linear_model(data, ridge: float, steps: int) -> None:
    """SGD on weights w of explicit features, f = features w, from w = 0."""
    X, y, test = data
    features, at = (torch.tensor(np.concatenate([x, np.sin(x)], 1)) for x in (X, test))
    weights = torch.zeros(features.shape[1], 2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([weights], lr=0.5, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (features @ weights - torch.tensor(y)).square().sum() / 40 + ridge / 40 * weights.square().sum()
        loss.backward()
        optimizer.step()
    model = NTKRegressor("precomputed", ridge=ridge).fit((features @ features.T).numpy(), y)
    got = model.predict((at @ features.T).numpy(), n_steps=steps, tau=0.5, momentum=0.9)
    np.testing.assert_allclose(got, (at @ weights).detach().numpy(), rtol=0, atol=1e-10)


def test_momentum_needs_steps_that_are_stable(data) -> None:
    X, y, test = data
    model = NTKRegressor(limit_ntk_mlp, ridge=0.1).fit(X, y)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"momentum": 0.5}, "momentum must be 0 without n_steps and tau, got 0.5"),
        ({"momentum": 1.0, "n_steps": 1, "tau": 0.1}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"momentum": 0.5, "n_steps": 5000, "tau": 1e3}, r"tau must be below 2 \(1 \+ momentum\) N / lambda_max"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            model.predict(test, **arguments)


def test_draws_have_the_posterior_mean_and_covariance(data) -> None:
    X, y, test = data
    B = np.array([[2.0, 1.0], [1.0, 3.0]])

    def full(a: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
        return limit_ntk_mlp(a, b)[:, :, None, None] * torch.tensor(B)

    times: list[dict[str, Any]] = [{}, {"t": 5.0}]
    kernels: list[tuple[Any, dict[str, Any]]] = [(limit_ntk_mlp, time) for time in times]
    for kernel, arguments in [*kernels, (full, times[0])]:
        model = NTKRegressor(kernel, ridge=0.3).fit(X, y)
        mean, covariance = model.predict(test, return_cov=True, **arguments)
        drawn = model.sample_y(test, 40_000, random_state=1, **arguments)
        assert drawn.shape == (7, 2, 40_000)
        expected = np.kron(covariance, np.eye(2)) if covariance.ndim == 2 else covariance.transpose(0, 2, 1, 3)
        expected = expected.reshape(14, 14)
        size = np.sqrt(np.diagonal(expected).max())
        np.testing.assert_allclose(drawn.mean(-1), mean, rtol=0, atol=0.03 * size)
        np.testing.assert_allclose(np.cov(drawn.reshape(14, -1)), expected, rtol=0, atol=0.03 * size**2)
    one = NTKRegressor(limit_ntk_mlp, ridge=0.3).fit(X, y[:, 0])
    assert one.sample_y(test, 5).shape == (7, 5)
    np.testing.assert_array_equal(one.sample_y(test, 5), one.sample_y(test, 5))
    assert np.abs(one.sample_y(test, 5, random_state=2) - one.sample_y(test, 5)).max() > 1e-3
    # Where everything has been seen nothing is left to draw.
    known = NTKRegressor(limit_ntk_mlp, ridge=1e-8).fit(X, y)
    np.testing.assert_allclose(known.sample_y(X)[..., 0], y, rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="n_samples must be at least 1, got 0"):
        one.sample_y(test, 0)
    with pytest.raises(ValueError, match=r"prior must be k\(X, X\) with 'precomputed'"):
        NTKRegressor("precomputed", ridge=1.0).fit(X @ X.T, y).sample_y(test @ X.T)
