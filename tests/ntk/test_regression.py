"""NTKRegressor against closed forms, simulated training of the linear model, and scikit-learn's own checks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.linalg  # type: ignore[import-untyped]
import torch
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_predict
from sklearn.utils.estimator_checks import check_estimator

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
@pytest.mark.parametrize(
    "estimator", [NTKRegressor(limit_ntk_mlp, ridge=1e-3), NTKRegressor("precomputed", ridge=10.0)], ids=["limit", "K"]
)
def test_scikit_learn_checks(estimator: NTKRegressor) -> None:
    check_estimator(estimator)


def test_the_only_check_that_fails_without_ridge_is_the_documented_one() -> None:
    results = check_estimator(NTKRegressor(limit_ntk_mlp), on_fail=None, on_skip=None)
    failed = {r["check_name"]: r["exception"] for r in results if r["status"] == "failed"}
    assert set(failed) == {"check_fit_idempotent"}
    assert isinstance(failed["check_fit_idempotent"], np.linalg.LinAlgError)


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
