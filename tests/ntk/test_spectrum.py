"""Spectral predictions against descent carried out with torch.optim.SGD on a linear model."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from narrowdeep.ntk.spectrum import descent_filter, flow_filter, heavy_ball, loss_curve, max_learning_rate


def problem(outputs: int = 1, samples: int = 12, width: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(samples, width, dtype=torch.float64), torch.randn(samples, outputs, dtype=torch.float64)


def descend(phi: torch.Tensor, y: torch.Tensor, lr: float, momentum: float, n_steps: int) -> list[float]:
    """Losses 1/(2N) |phi theta - y|^2 along torch.optim.SGD."""
    theta = torch.zeros(phi.shape[1], y.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([theta], lr=lr, momentum=momentum)
    losses = []
    for step in range(n_steps + 1):
        loss = (phi @ theta - y).square().sum() / (2 * len(y))
        losses.append(loss.item())
        if step < n_steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return losses


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.93])
@pytest.mark.parametrize("outputs", [1, 3])
def test_loss_curve_is_descent_on_the_linear_model(momentum: float, outputs: int) -> None:
    phi, y = problem(outputs)
    kernel = phi @ phi.t()
    tau = 0.4 * max_learning_rate(kernel, momentum=momentum)
    expected = descend(phi, y, tau, momentum, 60)
    np.testing.assert_allclose(loss_curve(kernel, y, 60, tau=tau, momentum=momentum), expected, rtol=1e-9, atol=1e-20)
    full = torch.einsum("ij,ab->ijab", kernel, torch.eye(outputs, dtype=torch.float64))
    np.testing.assert_allclose(loss_curve(full, y, 60, tau=tau, momentum=momentum), expected, rtol=1e-9, atol=1e-20)


def test_loss_curve_from_another_start() -> None:
    phi, y = problem()
    kernel = phi @ phi.t()
    whole = loss_curve(kernel, y, 20, tau=0.01)
    np.testing.assert_allclose(loss_curve(kernel, 0 * y, 20, tau=0.01, initial=-y), whole, rtol=1e-12)
    assert loss_curve(kernel, y, 0, tau=0.01).shape == (1,)
    assert whole[0] == pytest.approx(y.square().sum().item() / (2 * len(y)))


def test_loss_curve_with_a_step_size_of_its_own_for_every_step() -> None:
    """One mode by hand: r = 1, v = 1; r = 1 - 0.5 = 0.5; v = 0.5 * 1 + 0.5 = 1; r = 0.5 - 0.25 = 0.25."""
    losses = loss_curve([[1.0]], [1.0], 2, tau=[0.5, 0.25], momentum=0.5)
    np.testing.assert_allclose(losses, [0.5, 0.125, 0.03125])
    with pytest.raises(ValueError, match="one for each of the 3 steps, got 2"):
        loss_curve([[1.0]], [1.0], 3, tau=[0.5, 0.25])
    with pytest.raises(ValueError, match="tau must be .*positive"):
        loss_curve([[1.0]], [1.0], 2, tau=[0.5, 0.0])


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_the_largest_rate_is_where_descent_turns_unstable(momentum: float) -> None:
    phi, y = problem()
    tau = max_learning_rate(phi @ phi.t(), momentum=momentum)
    below = descend(phi, y, 0.98 * tau, momentum, 1500)
    above = descend(phi, y, 1.02 * tau, momentum, 1500)
    assert below[-1] < below[0]
    assert above[-1] > 1e3 * above[0]


def test_largest_rate_by_lanczos_is_the_dense_one() -> None:
    torch.manual_seed(1)
    phi = torch.rand(1100, 20, dtype=torch.float64)
    kernel = phi @ phi.t()
    largest = torch.linalg.eigvalsh(phi.t() @ phi)[-1].item()
    assert max_learning_rate(kernel) == pytest.approx(2 * 1100 / largest, rel=1e-10)
    assert max_learning_rate(kernel.numpy(), momentum=0.9) == pytest.approx(3.8 * 1100 / largest, rel=1e-10)


def test_rate_of_a_full_kernel_counts_samples_not_outputs() -> None:
    kernel = torch.zeros(4, 4, 3, 3)
    for i in range(4):
        kernel[i, i] = torch.diag(torch.tensor([1.0, 2.0, 5.0]))
    assert max_learning_rate(kernel) == pytest.approx(2 * 4 / 5)


def test_heavy_ball_contracts_every_mode_at_the_optimal_rate() -> None:
    """Diagonal kernel, N = 3, eigenvalues 1, 4, 9: r = 3, momentum = 1/4, tau = 12/16; rate 1/2 a step in amplitude."""
    kernel = torch.diag(torch.tensor([1.0, 4.0, 9.0]))
    tau, momentum = heavy_ball(kernel)
    assert (tau, momentum) == pytest.approx((0.75, 0.25))
    for mode in torch.eye(3):
        losses = loss_curve(kernel, mode, 60, tau=tau, momentum=momentum)
        assert losses[60] / losses[40] == pytest.approx(0.25**20, rel=0, abs=9 * 0.25**20)
    tau, momentum = heavy_ball(kernel, smallest=4.0)
    assert (tau, momentum) == pytest.approx((12 / 25, 1 / 25))
    assert heavy_ball(torch.eye(5)) == pytest.approx((5.0, 0.0))


def test_heavy_ball_beats_plain_descent() -> None:
    phi, y = problem()
    kernel = phi @ phi.t()
    tau, momentum = heavy_ball(kernel)
    fast = loss_curve(kernel, y, 100, tau=tau, momentum=momentum)
    slow = loss_curve(kernel, y, 100, tau=0.5 * max_learning_rate(kernel))
    assert fast[-1] < 1e-3 * slow[-1]
    assert tau < max_learning_rate(kernel, momentum=momentum)


def test_heavy_ball_leaves_out_eigenvalues_that_are_rounding() -> None:
    x = torch.rand(6, 2, dtype=torch.float64)
    kernel = x @ x.t()  # rank 2 of 6
    values = torch.linalg.eigvalsh(x.t() @ x).sqrt()
    assert heavy_ball(kernel)[0] == pytest.approx(4 * 6 / (values.sum().item() ** 2), rel=1e-6)


def test_filters_at_their_limits() -> None:
    values = np.array([0.0, 1e-300, 1e-9, 0.3, 1.0, 2.0])
    np.testing.assert_allclose(flow_filter(values, 4, 8.0)[:3], 2.0, rtol=1e-8)
    np.testing.assert_allclose(flow_filter(values, 4, 1e9)[3:], 1 / values[3:])
    for steps in (0, 1, 2, 7):
        x = values / 2
        expected = [0.5 * sum((1 - v) ** i for i in range(steps)) for v in x]
        np.testing.assert_allclose(descent_filter(values, 4, steps, 2.0), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: max_learning_rate(torch.ones(2, 3)), ValueError, r"kernel must be square.*\(2, 3\)"),
        (lambda: max_learning_rate(torch.ones(0, 0)), ValueError, "not empty"),
        (lambda: max_learning_rate(torch.ones(3)), ValueError, r"\(N1, N2\) or \(N1, N2, out, out\), got \(3,\)"),
        (lambda: max_learning_rate(torch.zeros(2, 2)), ValueError, "positive eigenvalue"),
        (lambda: max_learning_rate(torch.eye(2) * math.nan), ValueError, "finite"),
        (lambda: max_learning_rate(torch.eye(2), momentum=1.0), ValueError, r"momentum must be in \[0, 1\), got 1.0"),
        (lambda: max_learning_rate(torch.ones(2, 2).triu()), ValueError, "kernel must be symmetric, .* differ by 1 "),
        (lambda: max_learning_rate(torch.eye(2), momentum="0.9"), TypeError, "momentum must be a number, got '0.9'"),  # type: ignore[arg-type]
        (lambda: loss_curve(torch.eye(2), torch.ones(2), 5, tau="1"), TypeError, "tau must be a number, got '1'"),  # type: ignore[arg-type]
        (lambda: heavy_ball(torch.tensor([[1.0, 2.0], [2.0, 1.0]])), ValueError, "semidefinite, got the eigenvalue -1"),
        (
            lambda: loss_curve(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), torch.ones(2), 5, tau=1.0),
            ValueError,
            "semidefinite, got the eigenvalue -1",
        ),
        (lambda: heavy_ball(torch.eye(2), smallest=2.0), ValueError, "smallest must be positive and at most"),
        (lambda: loss_curve(torch.eye(2), torch.ones(3), 5, tau=1.0), ValueError, r"y must have shape \(2,\)"),
        (lambda: loss_curve(torch.eye(2), torch.ones(2), 5, tau=-1.0), ValueError, "tau must be finite and positive"),
        (lambda: loss_curve(torch.eye(2), torch.ones(2), 1.5, tau=1.0), TypeError, "n_steps must be an int"),  # type: ignore[arg-type]
        (lambda: loss_curve(torch.eye(2), torch.ones(2), 1, tau=1.0, initial=torch.ones(3)), ValueError, "initial"),
    ],
)
def test_bad_input(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_numbers_and_arrays_of_any_kind() -> None:
    kernel = np.diag([1.0, 4.0]).astype(">f4")
    assert max_learning_rate(kernel, momentum=np.float32(0.5)) == pytest.approx(2 * 1.5 * 2 / 4)
    assert max_learning_rate(torch.diag(torch.tensor([1.0, 4.0])).bfloat16()) == pytest.approx(1.0)
    expected = loss_curve(kernel, [1.0, 2.0], 2, tau=[0.5, 0.25])
    for taus in (np.array([0.5, 0.25]), torch.tensor([0.5, 0.25])):
        assert loss_curve(kernel, [1.0, 2.0], np.int64(2), tau=taus) == pytest.approx(expected)
    with pytest.raises(TypeError, match="kernel must be real, got torch.complex64"):
        max_learning_rate(torch.eye(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match="y must be an array of real numbers, got dtype"):
        loss_curve(kernel, ["1", "2"], 2, tau=1.0)
    with pytest.raises(ValueError, match="y must be finite, got NaN or infinity"):
        loss_curve(kernel, [1.0, np.nan], 2, tau=1.0)
    with pytest.raises(ValueError, match="tau must be finite and positive, got an int of 1329 bits"):
        loss_curve(kernel, [1.0, 1.0], 2, tau=10**400)
