"""The system of kernel regression by conjugate gradients, each rank with a part of the kernel's rows."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from narrowdeep.checks import check_count, check_number
from narrowdeep.distributed.ranks import Ranks
from narrowdeep.distributed.tiles import array

_BLOCK_BYTES = 1 << 27
"""Of the kernel's rows that are read at a time."""


def solve(
    kernel: NDArray[Any] | Tensor,
    y: ArrayLike | Tensor,
    *,
    ridge: float = 0.0,
    tolerance: float = 1e-8,
    landmarks: int = 500,
    iterations: int = 2000,
    ranks: Ranks | None = None,
) -> Tensor:
    """``(K + ridge I)^-1 y`` for a kernel that is larger than memory, such as a file of ``write_kernel``.

    Conjugate gradients on all outputs at once, preconditioned by the Nystrom approximation of K from some of its rows
    (Williams and Seeger, NIPS 2000; Cutajar et al., ICML 2016). An iteration reads K once, each rank its share of the
    rows, a block at a time. ``k(x, X) @ solve(K, y)`` is what ``NTKRegressor`` predicts at the end of training.

    Arguments:
        kernel: (N, N), symmetric and positive semidefinite; the same on all ranks, which read their own rows alone.
        y: (N,) or (N, out).
        ridge: added to the diagonal of K, not negative. The smaller, the more iterations.
        tolerance: of the norm of the residual over that of y, for each output; above 0.
        landmarks: rows of K that the preconditioner is made of; N of them at most. Each rank keeps as many numbers for
            each of its own rows, and their square.
        iterations: at most.
        ranks: who shares the work; None: all of torch.distributed, or this process where that is not in use.

    Returns: float64, of the shape of y, the same on all ranks.

    Raises: TypeError or ValueError naming the argument, the rule and the value; ValueError where ranks have different
        ones; numpy.linalg.LinAlgError, saying what is left of the residual, where the tolerance is not reached;
        LostRankError.

    Examples:
        >>> import torch
        >>> from narrowdeep.distributed import solve
        >>> from narrowdeep.ntk import limit_ntk_mlp
        >>> x = torch.rand(50, 3, dtype=torch.float64)
        >>> K, y = limit_ntk_mlp(x), x.prod(1)
        >>> a = solve(K, y, ridge=1e-3)
        >>> torch.allclose(K @ a + 1e-3 * a, y)
        True
    """
    ranks = Ranks.of() if ranks is None else ranks
    ridge = check_number("ridge", ridge)
    tolerance = check_number("tolerance", tolerance, positive=True)
    most = check_count("iterations", iterations, 1)
    targets = torch.as_tensor(y).detach().to("cpu", torch.float64)
    count = len(targets)
    matrix = array(kernel)
    if matrix.shape != (count, count) or not count or targets.dim() > 2:
        raise ValueError(
            f"kernel must be (N, N) and y (N,) or (N, out), N at least 1, got {matrix.shape} and {tuple(targets.shape)}"
        )
    if not targets.isfinite().all():
        raise ValueError("y must be finite, got NaN or infinity")
    values = {"ridge": ridge, "tolerance": tolerance, "landmarks": landmarks, "iterations": most}
    ranks.require_same({**values, "y": hashlib.sha256(targets.contiguous().numpy().data).hexdigest()})
    share = ranks.share(count)
    right = targets.reshape(count, -1)[share]
    near = _Nystrom(matrix, min(check_count("landmarks", landmarks, 1), count), ridge, ranks)

    def dots(a: Tensor, b: Tensor) -> Tensor:
        found = (a * b).sum(0)
        ranks.sum_(found)
        return found

    def product(direction: Tensor) -> Tensor:
        whole = ranks.rows(count, lambda _: direction)
        size = max(1, _BLOCK_BYTES // (8 * count))
        blocks = (slice(begin, min(begin + size, share.stop)) for begin in range(share.start, share.stop, size))
        parts = [np.asarray(matrix[block], np.float64) @ whole.numpy() for block in blocks]  # of float64, no copy
        return torch.from_numpy(np.concatenate([*parts, direction[:0]])) + ridge * direction

    solution, residual = torch.zeros_like(right), right.clone()
    norms = dots(right, right).sqrt()
    direction = preconditioned = near(residual)
    slope = dots(residual, preconditioned)
    for _ in range(most):
        if bool((dots(residual, residual).sqrt() <= tolerance * norms).all()):
            break
        image = product(direction)
        step = _ratio(slope, dots(direction, image))
        solution, residual = solution + step * direction, residual - step * image
        preconditioned = near(residual)
        before, slope = slope, dots(residual, preconditioned)
        direction = preconditioned + _ratio(slope, before) * direction
    else:
        left = float(_ratio(dots(residual, residual).sqrt(), norms).max())
        raise np.linalg.LinAlgError(
            f"conjugate gradients have not converged in {most} iterations with ridge={ridge:g} (what is left of the "
            f"residual is {left:.1e}): a larger ridge, more landmarks or a larger tolerance takes fewer"
        )
    return ranks.rows(count, lambda _: solution).reshape(targets.shape)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """0 for an output that is solved."""
    return torch.where(b == 0, torch.zeros_like(a), a / b)


def _rows(kernel: NDArray[Any], where: slice | list[int]) -> Tensor:
    return torch.from_numpy(np.array(kernel[where], np.float64))


class _Nystrom:
    """``(L L^T + sigma I)^-1``, L L^T about K: from some rows of it, evenly spaced. Each rank has its own rows of L."""

    def __init__(self, kernel: NDArray[Any], landmarks: int, ridge: float, ranks: Ranks) -> None:
        count, share = len(kernel), ranks.share(len(kernel))
        chosen = [count * i // landmarks for i in range(landmarks)]
        rows = _rows(kernel, chosen)
        inner = rows[:, chosen]
        inner = (inner + inner.T) / 2
        scale = float(inner.diagonal().mean())
        if not scale > 0 or not rows.isfinite().all():
            raise ValueError(f"kernel must be finite, with a diagonal above 0, got a mean of {scale:g}")
        values, vectors = torch.linalg.eigh(inner)
        kept = values > landmarks * torch.finfo(torch.float64).eps * values[-1]
        self._factor = rows[:, share].T @ (vectors[:, kept] / values[kept].sqrt())
        diagonal = torch.from_numpy(np.array(kernel.diagonal()[share], np.float64))
        missed = (diagonal.sum() - self._factor.square().sum()).clamp(min=0)
        gram = self._factor.T @ self._factor
        ranks.sum_(missed, gram)
        self._sigma = max(ridge + float(missed) / count, torch.finfo(torch.float64).eps * scale)
        self._ranks, self._inverse = ranks, torch.linalg.cholesky(gram + self._sigma * torch.eye(len(gram)).double())

    def __call__(self, residual: Tensor) -> Tensor:
        projected = self._factor.T @ residual
        self._ranks.sum_(projected)
        return (residual - self._factor @ torch.cholesky_solve(projected, self._inverse)) / self._sigma
