"""The closed-form limits against Monte Carlo, exact arithmetic at known points, and finite differences."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from narrowdeep.ntk.limit import limit_ntk_cnn, limit_ntk_mlp

DTYPES = (torch.float32, torch.float64)


def sampled_mean(covariance: Tensor, samples: int = 400_000) -> tuple[Tensor, Tensor]:
    """E[relu(g) relu(g)^T] for g ~ N(0, covariance) by sampling, and its standard error."""
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp_min(0).sqrt()
    draws = (torch.randn(samples, len(values), dtype=torch.float64) @ root.t()).relu()
    mean = draws.t() @ draws / samples
    return mean, ((draws.square().t() @ draws.square() / samples - mean.square()) / samples).sqrt()


@pytest.mark.parametrize(("rho", "beta", "out"), [(1.0, 1.0, 1), (0.5, 2.0, 3), (2.0, 0.0, 1)])
def test_mlp_limit_is_the_sampled_gaussian_mean(rho: float, beta: float, out: int) -> None:
    torch.manual_seed(0)
    x = torch.rand(6, 3, dtype=torch.float64)
    mean, error = sampled_mean(rho**2 / 3 * x @ x.t() + beta**2)
    deviation = limit_ntk_mlp(x, rho=rho, beta=beta, out_features=out) - (x @ x.t() + out + mean)
    assert (deviation.abs() < 4 * error).all()


@pytest.mark.parametrize(("channels", "height", "width", "f", "k"), [(1, 3, 3, 3, 1), (2, 3, 4, 3, 2), (1, 2, 5, 5, 3)])
def test_cnn_limit_is_the_sum_over_taps(channels: int, height: int, width: int, f: int, k: int) -> None:
    """By the theorem's own sum: taps outside, positions kept inside by explicit comparison, E by sampling."""
    torch.manual_seed(1)
    rho, beta = 0.6, 0.8
    x = torch.rand(2, channels, height, width, dtype=torch.float64)
    padded = torch.nn.functional.pad(x, (f // 2,) * 4)
    patches = torch.stack(
        [padded[:, :, i : i + f, j : j + f].flatten(1) for i in range(height) for j in range(width)], 1
    )
    flat = patches.flatten(0, 1)
    mean, error = sampled_mean(rho**2 * flat @ flat.t() + beta**2)
    places = [(i, j) for i in range(height) for j in range(width)]
    expected, tolerance = torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    for n in range(2):
        for m in range(2):
            for di in range(-(f // 2), f // 2 + 1):
                for dj in range(-(f // 2), f // 2 + 1):
                    kept = [p for p, (i, j) in enumerate(places) if 0 <= i + di < height and 0 <= j + dj < width]
                    for p in kept:
                        for q in kept:
                            (pi, pj), (qi, qj) = places[p], places[q]
                            a, b = n * len(places) + p, m * len(places) + q
                            expected[n, m] += x[n, :, pi, pj] @ x[m, :, qi, qj] + k + mean[a, b]
                            tolerance[n, m] += error[a, b]
    scale = (height * width) ** 2
    got = limit_ntk_cnn(x, rho=rho, beta=beta, kernel_size=f, out_channels=k)
    assert ((got - expected / scale).abs() < 4 * tolerance / scale).all()


def test_cnn_of_one_pixel_and_kernel_one_is_the_mlp() -> None:
    """1x1 images under 1x1 filters are an MLP whose u has no fan-in factor."""
    x = torch.rand(5, 3, dtype=torch.float64)
    expected = limit_ntk_mlp(x, rho=0.7 * math.sqrt(3), beta=0.4, out_features=2)
    got = limit_ntk_cnn(x[:, :, None, None], rho=0.7, beta=0.4, kernel_size=1, out_channels=2)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_known_values(dtype: torch.dtype) -> None:
    """Coinciding inputs: E = q/2. Orthogonal ones without bias: E = sqrt(q q') / (2 pi). beta alone: E = beta^2 / 2."""
    x = torch.tensor([[3.0, 0.0], [0.0, 5.0], [0.0, 0.0]], dtype=dtype)
    k = limit_ntk_mlp(x, rho=math.sqrt(2.0), beta=0.0, out_features=1)
    orthogonal = 1 + 15 / (2 * math.pi)
    expected = torch.tensor([[14.5, orthogonal, 1], [orthogonal, 38.5, 1], [1, 1, 1]], dtype=dtype)
    torch.testing.assert_close(k, expected)
    torch.testing.assert_close(
        limit_ntk_mlp(x, rho=0.0, beta=2.0, out_features=4), x @ x.t() + torch.tensor(6.0, dtype=dtype)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gap", [0.0, 1e-12, 1e-9, 1e-6, 1e-4, 1e-3])
def test_value_and_slope_at_nearly_coinciding_inputs(dtype: torch.dtype, gap: float) -> None:
    """Against the formula with s from a cross product, which does not cancel."""
    base = torch.tensor([[0.4, 0.7, 0.2]], dtype=torch.float64)
    away = torch.tensor([[0.3, -0.1, 0.5]], dtype=torch.float64)
    x1 = base.to(dtype)
    x2 = (base + gap * away).to(dtype).requires_grad_()
    k = limit_ntk_mlp(x1, x2, rho=1.5, beta=0.3)
    (slope,) = torch.autograd.grad(k, x2)
    a, b, w, beta2 = x1.double()[0], x2.detach().double()[0], 1.5**2 / 3, 0.09
    cross = torch.linalg.cross(a, b - a)  # |a x b|^2 = |a|^2 |b|^2 - <a, b>^2, without cancellation
    s = (w**2 * cross.dot(cross) + w * beta2 * (b - a).square().sum()).sqrt()
    c, q = w * a.dot(b) + beta2, w * b.dot(b) + beta2
    angle = torch.atan2(s, c)
    value = a.dot(b) + 1 + (s + (math.pi - angle) * c) / (2 * math.pi)
    gradient = a * (1 + w * (math.pi - angle) / (2 * math.pi)) + w * s / (2 * math.pi * q) * b
    eps = torch.finfo(dtype).eps
    assert abs(k.item() - value.item()) < 8 * eps * value.item()
    assert (slope[0].double() - gradient).abs().max() < 100 * eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_is_finite_at_coinciding_and_zero_inputs(dtype: torch.dtype) -> None:
    for beta in (0.0, 1.0):
        x = torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.0, 0.0], [2.0, 4.0]], dtype=dtype, requires_grad=True)
        limit_ntk_mlp(x, beta=beta).sum().backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()
        image = torch.ones(3, 1, 3, 3, dtype=dtype, requires_grad=True)
        limit_ntk_cnn(image, beta=beta).sum().backward()
        assert image.grad is not None
        assert image.grad.isfinite().all()


def test_gradient_against_finite_differences() -> None:
    torch.manual_seed(2)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    y = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: limit_ntk_mlp(a, b, rho=1.3, beta=0.4, out_features=2), (x, y))
    assert torch.autograd.gradcheck(limit_ntk_mlp, (x,))
    image = torch.rand(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    other = torch.rand(3, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(limit_ntk_cnn, (image, other))


def test_torch_func_transforms() -> None:
    torch.manual_seed(3)
    x, y = torch.rand(3, 2, dtype=torch.float64), torch.rand(4, 2, dtype=torch.float64)
    jacobian = torch.func.jacrev(limit_ntk_mlp)(x, y)
    assert jacobian.shape == (3, 4, 3, 2)
    for i in range(3):
        row = torch.func.jacrev(limit_ntk_mlp)(x[i : i + 1], y)[0, :, 0]
        torch.testing.assert_close(jacobian[i, :, i], row)
    stacked = torch.func.vmap(lambda a: limit_ntk_mlp(a[None], y)[0])(x)
    assert torch.func.vmap(lambda a: limit_ntk_mlp(a[None], y)[0])(x[:0]).shape == (0, len(y))
    torch.testing.assert_close(stacked, limit_ntk_mlp(x, y))
    twice = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(limit_ntk_mlp(twice, y).sum(), twice, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        torch.autograd.grad(first.sum(), twice)


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_change_nothing(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    x, y = torch.rand(37, 5, dtype=dtype), torch.rand(17, 5, dtype=dtype)
    image, other = torch.rand(7, 2, 3, 2, dtype=dtype), torch.rand(5, 2, 3, 2, dtype=dtype)
    cases: list[tuple[Any, Tensor, Tensor]] = [(limit_ntk_mlp, x, y), (limit_ntk_cnn, image, other)]
    for kernel, left, right in cases:
        whole, square = kernel(left, right), kernel(left)
        torch.testing.assert_close(square, kernel(left, left.clone()))
        assert torch.equal(square, square.t())
        grads = []
        for block in (1 << 21, 300):
            monkeypatch.setattr("narrowdeep.ntk.limit._BLOCK", block)
            torch.testing.assert_close(kernel(left, right), whole)
            torch.testing.assert_close(kernel(left), square)
            leaf = left.clone().requires_grad_()
            grads.append(torch.autograd.grad(kernel(leaf, right).square().sum(), leaf)[0])
        torch.testing.assert_close(grads[0], grads[1])


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 5),
    st.floats(0, 3),
    st.floats(0, 3),
    st.integers(0, 2**31 - 1),
    st.floats(1e-6, 1e4),
)
def test_kernel_is_symmetric_and_positive_semidefinite(
    n: int, features: int, rho: float, beta: float, seed: int, size: float
) -> None:
    x = size * torch.rand(n, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = torch.cat((x, x[:1]))
    k = limit_ntk_mlp(x, rho=rho, beta=beta)
    assert torch.equal(k, k.t())
    eigenvalues = torch.linalg.eigvalsh(k)
    assert eigenvalues[0] > -1e-13 * eigenvalues[-1]
    bound = k.diagonal().sqrt()
    assert (k <= bound[:, None] * bound * (1 + 1e-14)).all()


def test_negative_entries_act_as_zero_and_empty_sets_are_empty() -> None:
    x = torch.randn(6, 4)
    assert torch.equal(limit_ntk_mlp(x), limit_ntk_mlp(x.relu()))
    image = torch.randn(3, 1, 4, 3)
    assert torch.equal(limit_ntk_cnn(image), limit_ntk_cnn(image.relu()))
    assert limit_ntk_mlp(x[:0], x).shape == (0, 6)
    assert limit_ntk_mlp(x, x[:0]).shape == (6, 0)
    assert limit_ntk_mlp(x[:0]).shape == (0, 0)
    assert limit_ntk_cnn(image[:0], image).shape == (0, 3)
    assert limit_ntk_cnn(image, image[:0]).shape == (3, 0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: limit_ntk_mlp(torch.ones(2, 3), torch.ones(2, 4)), ValueError, r"same shape .*\(2, 3\) and \(2, 4\)"),
        (lambda: limit_ntk_mlp(torch.ones(3)), ValueError, r"x1 must have shape \(N, in\), got \(3,\)"),
        (lambda: limit_ntk_mlp(torch.ones(2, 3), torch.ones(2, 3).double()), TypeError, "same dtype"),
        (lambda: limit_ntk_mlp(torch.ones(2, 3, dtype=torch.int64)), TypeError, "x1 must be torch.float32"),
        (lambda: limit_ntk_mlp([[1.0]]), TypeError, "x1 must be a torch.Tensor, got list"),  # type: ignore[arg-type]
        (lambda: limit_ntk_mlp(torch.ones(2, 3).to_sparse()), TypeError, "x1 must be a dense tensor, got torch.sparse"),
        (lambda: limit_ntk_mlp(torch.ones(2, 0)), ValueError, "at least one feature"),
        (lambda: limit_ntk_mlp(torch.ones(2, 3), rho=-1.0), ValueError, "rho must be finite and not negative, got -1"),
        (lambda: limit_ntk_mlp(torch.ones(2, 3), beta=math.nan), ValueError, "beta must be finite"),
        (lambda: limit_ntk_mlp(torch.ones(2, 3), out_features=0), ValueError, "out_features must be at least 1, got 0"),
        (lambda: limit_ntk_cnn(torch.ones(2, 1, 3, 3), kernel_size=2), ValueError, "kernel_size must be odd, got 2"),
        (lambda: limit_ntk_cnn(torch.ones(2, 3, 3)), ValueError, r"x1 must have shape \(N, C, H, W\), got \(2, 3, 3\)"),
        (lambda: limit_ntk_cnn(torch.ones(2, 1, 3, 3), out_channels=1.5), TypeError, "must be an int"),  # type: ignore[arg-type]
    ],
)
def test_bad_input(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_arrays_of_any_byte_order_and_numbers_of_any_kind() -> None:
    x = np.random.default_rng(0).uniform(size=(5, 3))
    expected = limit_ntk_mlp(torch.tensor(x), rho=1.5, out_features=2)
    image = x.reshape(5, 1, 3, 1)
    for order in ("<f8", ">f8", "longdouble"):
        got = limit_ntk_mlp(x.astype(order), rho=np.float32(1.5), out_features=np.int64(2))
        assert torch.equal(got, expected)
        assert torch.equal(limit_ntk_cnn(image.astype(order)), limit_ntk_cnn(torch.tensor(image)))
    assert limit_ntk_mlp(x.astype(">f4")).dtype == torch.float32
    fixed = x.copy()
    fixed.flags.writeable = False
    assert torch.equal(limit_ntk_mlp(fixed[::-1]), limit_ntk_mlp(torch.tensor(x[::-1].copy())))
    with pytest.raises(TypeError, match="x1 must be torch.float32 or torch.float64, got uint8"):
        limit_ntk_mlp(x.astype(np.uint8))
    with pytest.raises(ValueError, match="rho must be finite and not negative, got an int of 1329 bits"):
        limit_ntk_mlp(x, rho=10**400)


def test_the_gradient_under_autocast_is_that_without() -> None:
    torch.manual_seed(5)
    x, y = torch.rand(4, 3, requires_grad=True), torch.rand(5, 3)
    (expected,) = torch.autograd.grad(limit_ntk_mlp(x, y).sum(), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (got,) = torch.autograd.grad(limit_ntk_mlp(x, y).sum(), x)
    assert torch.equal(got, expected)
