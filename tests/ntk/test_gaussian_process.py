"""LimitNTK in scikit-learn's own machines, against NTKRegressor and derivatives by autograd in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import WhiteKernel
from sklearn.kernel_ridge import KernelRidge

from narrowdeep.ntk import LimitNTK, NTKRegressor, limit_ntk_cnn, limit_ntk_mlp

IMAGES: dict[str, Any] = {"image_shape": (1, 3, 4), "kernel_size": 3, "out_features": 2}


@pytest.fixture
def data() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.uniform(0, 1, (15, 12)), rng.normal(size=15), rng.uniform(0, 1, (6, 12))


def test_kernel_ridge_and_gaussian_processes_are_ntk_regression(data) -> None:
    x, y, points = data
    expected = NTKRegressor(lambda *a: limit_ntk_mlp(*a, rho=2.0, beta=0.5), ridge=0.1).fit(x, y)
    mean, deviation = expected.predict(points, return_std=True)
    kernel = LimitNTK(2.0, 0.5)
    np.testing.assert_allclose(KernelRidge(alpha=0.1, kernel=kernel).fit(x, y).predict(points), mean, atol=1e-10)
    process = GaussianProcessRegressor(kernel, alpha=0.1, optimizer=None).fit(x, y)
    got, spread = process.predict(points, return_std=True)
    np.testing.assert_allclose(got, mean, atol=1e-9)
    np.testing.assert_allclose(spread, deviation, atol=1e-9)


@pytest.mark.parametrize("settings", [{}, IMAGES])
def test_values_and_diagonal(data, settings: dict[str, Any]) -> None:
    x, _, points = data
    kernel = LimitNTK(1.5, 0.7, **settings)
    a, b = torch.tensor(x), torch.tensor(points)
    if settings:
        a, b = a.reshape(-1, 1, 3, 4), b.reshape(-1, 1, 3, 4)
        expected = limit_ntk_cnn(a, b, rho=1.5, beta=0.7, out_channels=2)
    else:
        expected = limit_ntk_mlp(a, b, rho=1.5, beta=0.7)
    np.testing.assert_array_equal(kernel(x, points), expected)
    np.testing.assert_allclose(kernel.diag(x), kernel(x).diagonal(), rtol=1e-12)


def explicit(x: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """The MLP's kernel from its formula, theta = (log beta, log rho)."""
    beta2, rho2 = (2 * theta).exp()
    gram = x @ x.T
    c = rho2 / x.shape[1] * gram + beta2
    q = c.diagonal()
    off = torch.eye(len(x), dtype=torch.bool)
    s = (q[:, None] * q - c * c).masked_fill(off, 1.0).sqrt().masked_fill(off, 0.0)  # no slope of a root at 0
    return gram + 1 + (s + (torch.pi - torch.atan2(s, c)) * c) / (2 * torch.pi)


def test_slopes_are_those_of_autograd(data) -> None:
    x = data[0]
    kernel = LimitNTK(2.0, 0.5)
    value, slopes = kernel(x, eval_gradient=True)
    theta = torch.tensor(kernel.theta)
    expected = torch.func.jacfwd(lambda t: explicit(torch.tensor(x), t))(theta)
    np.testing.assert_allclose(value, explicit(torch.tensor(x), theta), rtol=1e-10)
    np.testing.assert_allclose(slopes, expected, atol=1e-6 * float(expected.abs().max()))


def test_fixed_bounds_leave_slopes_out(data) -> None:
    x = data[0]
    both = LimitNTK(2.0, 0.5)(x, eval_gradient=True)[1]
    for names, columns in [(("rho",), [0]), (("beta",), [1]), (("rho", "beta"), [])]:
        fixed: dict[str, Any] = {f"{name}_bounds": "fixed" for name in names}
        kernel = LimitNTK(2.0, 0.5, **fixed)
        assert kernel.n_dims == len(columns)
        np.testing.assert_array_equal(kernel(x, eval_gradient=True)[1], both[..., columns])


def test_the_marginal_likelihood_is_climbed(data) -> None:
    """Targets drawn from the kernel of rho = 5: tuned from rho = 1, theirs is as likely as the true one."""
    rng = np.random.default_rng(1)
    x = rng.uniform(0, 1, (60, 3))
    truth = LimitNTK(5.0, 1.0)(x) + 1e-2 * np.eye(60)
    y = np.linalg.cholesky(truth) @ rng.normal(size=60)
    process = GaussianProcessRegressor(LimitNTK(beta_bounds="fixed") + WhiteKernel(1e-2, "fixed")).fit(x, y)
    values = [process.log_marginal_likelihood(np.log([rho])) for rho in (1.0, 5.0)]
    assert process.log_marginal_likelihood_value_ >= max(values)
    assert 2 < process.kernel_.k1.rho < 15
    assert clone(process.kernel_) == process.kernel_
    assert repr(LimitNTK(2.0, 0.5)) == "LimitNTK(rho=2, beta=0.5)"


def test_slopes_of_two_sets_are_refused(data) -> None:
    with pytest.raises(ValueError, match="Y must be None where eval_gradient is True"):
        LimitNTK()(data[0], data[2], eval_gradient=True)
