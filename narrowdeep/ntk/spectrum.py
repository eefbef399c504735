"""What the eigenvalues of a kernel predict for gradient descent.

Conventions, the thesis's (sections 2.1 and 3.1.1): the loss is ``1/(2N) sum_n |f(x_n) - y_n|^2`` and steps are kernel
times. Descent with learning rate eta moves the outputs by ``-tau/N Theta (f - y)``, where ``tau = eta L C_L^2`` if
Theta is the scaled kernel, and ``tau = eta`` if it is the plain ``J J^T``. Momentum is ``torch.optim.SGD``'s:
``v <- momentum v + gradient``, ``theta <- theta - eta v``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from narrowdeep.checks import check_count, check_number
from narrowdeep.extras import optional
from narrowdeep.ntk.checks import Array, as_array, as_real

with optional():
    import scipy.linalg  # type: ignore[import-untyped]
    import scipy.sparse.linalg  # type: ignore[import-untyped]

_DENSE = 1000
"""Rows from which the largest eigenvalue alone is found by Lanczos iterations."""

_ROUNDING = 1e-6
"""How far entries of a kernel may be off, in units of the largest one: float32 and its sums. That moves eigenvalues by
at most rows times as much."""


def kernel_matrix(kernel: Tensor | ArrayLike, name: str = "kernel") -> Array:
    """(N1, N2) as it is; (N1, N2, out, out) as the matrix (N1 out, N2 out), sample first."""
    array = as_array(name, kernel)
    if array.ndim == 2:
        return array
    if array.ndim == 4:
        n1, n2, out1, out2 = array.shape
        return np.ascontiguousarray(array.transpose(0, 2, 1, 3)).reshape(n1 * out1, n2 * out2)
    raise ValueError(f"{name} must have shape (N1, N2) or (N1, N2, out, out), got {array.shape}")


def _square(kernel: Tensor | ArrayLike) -> tuple[Array, int]:
    """The kernel matrix of a training set and its number of samples."""
    array = as_array("kernel", kernel)
    matrix = kernel_matrix(array)
    if matrix.shape[0] != matrix.shape[1] or matrix.shape[0] == 0:
        raise ValueError(f"kernel must be square and not empty, got shape {array.shape}")
    if not np.isfinite(matrix).all():
        raise ValueError("kernel must be finite, got NaN or infinity")
    check_symmetric(matrix)
    return matrix, array.shape[0]


def check_symmetric(matrix: Array) -> None:
    """Raises: ValueError when a square kernel matrix is not symmetric up to rounding."""
    difference = float(np.abs(matrix - matrix.T).max())
    largest = float(np.abs(matrix).max())
    if difference > _ROUNDING * largest:
        raise ValueError(
            f"kernel must be symmetric, got entries that differ by {difference:g} from their transpose (largest entry "
            f"{largest:g})"
        )


def check_semidefinite(matrix: Array, smallest: float) -> None:
    """Raises: ValueError when the smallest eigenvalue of a kernel matrix is below 0 by more than rounding."""
    if smallest < -_ROUNDING * matrix.shape[0] * float(np.abs(matrix).max()):
        raise ValueError(f"kernel must be positive semidefinite, got the eigenvalue {smallest:g}")


def as_momentum(momentum: Any) -> float:
    number = as_real("momentum", momentum)
    if not 0 <= number < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}")
    return number


def _largest(matrix: Array) -> float:
    n = matrix.shape[0]
    if n < _DENSE:
        return float(scipy.linalg.eigh(matrix, eigvals_only=True, subset_by_index=(n - 1, n - 1))[0])
    # A fixed start keeps the result the same from run to run.
    return float(scipy.sparse.linalg.eigsh(matrix, k=1, return_eigenvectors=False, v0=np.ones(n))[0])


def max_learning_rate(kernel: Tensor | ArrayLike, *, momentum: float = 0.0) -> float:
    """The largest stable step of gradient descent on the loss ``1/(2N) sum_n |f(x_n) - y_n|^2``.

    ``tau = 2 (1 + momentum) N / lambda_max``, as ``neural_tangents.predict.max_learning_rate`` has it: beyond it the
    mode of the largest eigenvalue grows.

    Arguments:
        kernel: of the training set with itself, (N, N) or (N, N, out, out), positive semidefinite.
        momentum: in [0, 1), in the convention of torch.optim.SGD.

    Returns: a kernel time tau. With the scaled kernel of a narrow model the learning rate is
        ``eta = tau / (L C_L^2) = tau * model.ntk_lr``; with an unscaled kernel it is tau itself. For
        ``torch.nn.MSELoss``, the mean over N and outputs of the squares, multiply eta by out / 2.

    Raises: ValueError when the kernel is empty, not square, not finite or zero, or momentum is outside [0, 1).

    Examples:
        >>> import numpy as np
        >>> from narrowdeep.ntk import max_learning_rate
        >>> max_learning_rate(np.diag([4.0, 1.0]))  # 2 N / lambda_max
        1.0
    """
    momentum = as_momentum(momentum)
    matrix, n = _square(kernel)
    largest = _largest(matrix)
    if largest <= 0:
        raise ValueError(f"kernel must have a positive eigenvalue, got {largest} as the largest")
    return 2.0 * (1.0 + momentum) * n / largest


def heavy_ball(kernel: Tensor | ArrayLike, *, smallest: float | None = None) -> tuple[float, float]:
    """Step and momentum that contract the slowest mode of interest fastest (Polyak 1964).

    ``tau = 4 N / (sqrt(lambda_max) + sqrt(smallest))^2``, ``momentum = ((r - 1) / (r + 1))^2``,
    ``r = sqrt(lambda_max / smallest)``: every mode between the two then shrinks by sqrt(momentum) a step.

    Arguments:
        kernel: of the training set with itself, (N, N) or (N, N, out, out), positive semidefinite.
        smallest: the smallest eigenvalue that matters. Default: the smallest one above rounding,
            ``lambda_max * rows * 2.2e-16``. Kernels are ill-conditioned; what is learnt in n steps lies above about
            ``lambda_max (4/n)^2``, and a larger value here is the more robust choice.

    Returns: (tau, momentum), tau a kernel time as in ``max_learning_rate``.

    Examples:
        >>> import numpy as np
        >>> from narrowdeep.ntk import heavy_ball
        >>> tau, momentum = heavy_ball(np.diag([4.0, 1.0]))
        >>> round(tau, 3), round(momentum, 3)
        (0.889, 0.111)
    """
    matrix, n = _square(kernel)
    if smallest is None:
        eigenvalues = scipy.linalg.eigvalsh(matrix)
        check_semidefinite(matrix, float(eigenvalues[0]))
        largest = float(eigenvalues[-1])
        kept = eigenvalues[eigenvalues > largest * matrix.shape[0] * np.finfo(np.float64).eps]
        if largest <= 0:
            raise ValueError(f"kernel must have a positive eigenvalue, got {largest} as the largest")
        smallest = float(kept[0])
    else:
        smallest = as_real("smallest", smallest)
        largest = _largest(matrix)
        if not 0 < smallest <= largest * (1 + 1e-9):
            raise ValueError(f"smallest must be positive and at most lambda_max = {largest}, got {smallest}")
    root = math.sqrt(largest), math.sqrt(min(smallest, largest))
    return 4.0 * n / (root[0] + root[1]) ** 2, ((root[0] - root[1]) / (root[0] + root[1])) ** 2


def loss_curve(
    kernel: Tensor | ArrayLike,
    y: Tensor | ArrayLike,
    n_steps: int,
    *,
    tau: float | Sequence[float] | Tensor | Array,
    momentum: float = 0.0,
    initial: Tensor | ArrayLike | None = None,
) -> Array:
    """The training loss that gradient descent with momentum has while the kernel stays what it is.

    Each eigenmode of the kernel follows its own linear recurrence, ``v <- momentum v + r``,
    ``r <- r - tau lambda / N v``, with r the residual f - y in that mode.

    Arguments:
        kernel: of the training set with itself, (N, N) or (N, N, out, out).
        y: targets, (N,) or (N, out).
        n_steps: not negative.
        tau: kernel time of a step (see the top of this module), or of each one, (n_steps,).
        momentum: in [0, 1), in the convention of torch.optim.SGD.
        initial: outputs before the first step, in the shape of y; default 0, what narrow networks start from.

    Returns: (n_steps + 1,) float64: ``1/(2N) sum |f - y|^2`` before the first step and after each.

    Examples:
        >>> import numpy as np
        >>> from narrowdeep.ntk import loss_curve
        >>> loss_curve(np.eye(2), np.array([1.0, 1.0]), 2, tau=1.0)  # each step of tau / N = 1/2 halves the residual
        array([0.5    , 0.125  , 0.03125])
    """
    momentum, n_steps = as_momentum(momentum), check_count("n_steps", n_steps, 0)
    if isinstance(tau, Tensor) or (isinstance(tau, np.ndarray) and tau.ndim):
        tau = as_array("tau", tau).reshape(-1).tolist()
    if isinstance(tau, (list, tuple)):
        if len(tau) != n_steps:
            raise ValueError(f"tau must be a number, or one for each of the {n_steps} steps, got {len(tau)}")
        taus = [check_number("tau", value, positive=True) for value in tau]
    else:
        taus = [check_number("tau", tau, positive=True)] * n_steps
    matrix, n = _square(kernel)
    eigenvalues, modes = scipy.linalg.eigh(matrix)
    check_semidefinite(matrix, float(eigenvalues[0]))
    residual = modes.T @ residuals(matrix, n, y, initial)
    rates = eigenvalues[:, None] / n
    velocity = np.zeros_like(residual)
    losses = np.empty(n_steps + 1)
    losses[0] = np.square(residual).sum()
    for i in range(n_steps):
        velocity = momentum * velocity + residual
        residual = residual - taus[i] * rates * velocity
        losses[i + 1] = np.square(residual).sum()
    return losses / (2 * n)


def residuals(matrix: Array, n: int, y: Tensor | ArrayLike, initial: Tensor | ArrayLike | None = None) -> Array:
    """``initial - y`` as columns the kernel matrix acts on: (N, out) for a scalar kernel, (N out, 1) for a full one."""
    targets = as_array("y", y)
    if targets.ndim not in (1, 2) or targets.shape[0] != n:
        raise ValueError(f"y must have shape ({n},) or ({n}, out), got {targets.shape}")
    start = np.zeros_like(targets) if initial is None else as_array("initial", initial)
    if start.shape != targets.shape:
        raise ValueError(f"initial must have the shape of y, {targets.shape}, got {start.shape}")
    for name, values in (("y", targets), ("initial", start)):
        if not np.isfinite(values).all():
            raise ValueError(f"{name} must be finite, got NaN or infinity")
    difference = (start - targets).reshape(n, -1)
    if matrix.shape[0] == n:
        return difference
    if difference.size != matrix.shape[0]:
        raise ValueError(f"y must have {matrix.shape[0] // n} outputs, as the kernel has, got {difference.shape[1]}")
    return difference.reshape(-1, 1)


def flow_filter(eigenvalues: Array, n: float, t: float) -> Array:
    """``(1 - exp(-lambda t / N)) / lambda``, with its limit t / N at lambda = 0."""
    x = np.asarray(eigenvalues) * (t / n)
    safe = np.where(x == 0, 1.0, x)
    return (t / n) * np.where(x == 0, 1.0, -np.expm1(-safe) / safe)


def descent_filter(eigenvalues: Array, n: float, n_steps: int, tau: float, momentum: float = 0.0) -> Array:
    """``(1 - (1 - tau lambda / N)^n_steps) / lambda``, with its limit n_steps tau / N at lambda = 0.

    With momentum ``1 - (...)^n_steps`` is what so many steps of it have learned.
    """
    if momentum:
        values = np.asarray(eigenvalues, dtype=np.float64)
        velocity, learned = np.zeros_like(values), np.zeros_like(values)
        with np.errstate(over="ignore", invalid="ignore"):
            for _ in range(n_steps):
                velocity = momentum * velocity + (1.0 - values * learned)
                learned = learned + (tau / n) * velocity
        return learned
    x = np.asarray(eigenvalues) * (tau / n)
    small = np.where((x == 0) | (x > 0.5), 0.25, x)
    near = -np.expm1(n_steps * np.log1p(-small)) / small
    safe = np.where(x > 0.5, x, 1.0)
    with np.errstate(over="ignore"):  # past the largest stable step the curve truly grows without bound
        far = (1.0 - (1.0 - safe) ** n_steps) / safe
    return (tau / n) * np.where(x == 0, float(n_steps), np.where(x > 0.5, far, near))
