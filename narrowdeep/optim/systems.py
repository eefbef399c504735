"""``(K + lambda I) coefficients = residual``: by Cholesky in samples or in features, or by conjugate gradients.

All in float64. lambda is ``damping`` times the mean of K's diagonal: a damping means the same for every network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from narrowdeep.distributed.ranks import ALONE, Ranks
from narrowdeep.extras import optional

with optional():
    import scipy.sparse.linalg  # type: ignore[import-untyped]

EPS = torch.finfo(torch.float64).eps
_ITERATIONS = 2000
_TOLERANCE = 1e-6
"""Of the residual of conjugate gradients, relative to the right-hand side."""


class System(Protocol):
    mean: float
    """Of K's diagonal."""

    def solve(self, right: Tensor, damping: float) -> Tensor:
        """Coefficients of the shape of ``right``, (N, out).

        Raises: numpy.linalg.LinAlgError naming a damping that works.
        """

    def product(self, v: Tensor) -> Tensor:
        """``K v``, (N, out)."""


class _Cholesky:
    """Of a symmetric matrix with lambda on its diagonal; the last factor is kept."""

    def __init__(self, matrix: Tensor, mean: float) -> None:
        self.matrix, self.mean = matrix, mean
        self._factor: tuple[float, Tensor] | None = None

    def __call__(self, right: Tensor, damping: float) -> Tensor:
        if self._factor is None or self._factor[0] != damping:
            self._factor = None  # frees it before the next one is made
            regular = self.matrix.clone()
            regular.diagonal().add_(damping * self.mean)
            factor, failed = torch.linalg.cholesky_ex(regular)
            pivots = factor.diagonal()
            if failed or not pivots.min() > pivots.max() * EPS**0.5:  # 1 / condition is at most the ratio's square
                raise self.singular(damping)
            self._factor = damping, factor
        return torch.cholesky_solve(right, self._factor[1])

    def singular(self, damping: float) -> Exception:
        values = torch.linalg.eigvalsh(self.matrix)
        needed = (2 * len(values) * EPS * float(values[-1]) + 2 * max(0.0, -float(values[0]))) / self.mean
        kind = "indefinite" if -float(values[0]) > len(values) * EPS * float(values[-1]) else "singular"
        return np.linalg.LinAlgError(
            f"the kernel of these samples is numerically {kind} with damping={damping:g}: the smallest that works is "
            f"about damping={needed:.1e} (samples that coincide, or a kernel computed in float32, ask for more)"
        )


class SampleSystem:
    """K itself, (N, N) for every output or (N out, N out)."""

    def __init__(self, kernel: Tensor) -> None:
        """Raises: ValueError for a kernel that is not finite, symmetric and of a positive diagonal."""
        kernel = kernel.double()
        if kernel.dim() == 4:
            samples, outputs = kernel.shape[1:3]
            kernel = kernel.transpose(1, 2).reshape(samples * outputs, samples * outputs)
        if not kernel.isfinite().all():
            raise ValueError("kernel must be finite, got NaN or infinity")
        if (kernel - kernel.T).abs().max() > 1e-4 * kernel.abs().max():
            raise ValueError("kernel must be symmetric: kernel(x) is not equal to its transpose")
        self.mean = float(kernel.diagonal().mean())
        if not self.mean > 0:
            raise ValueError(f"kernel must have a diagonal above 0 on average, got {self.mean:g}")
        self._cholesky = _Cholesky(kernel, self.mean)

    def solve(self, right: Tensor, damping: float) -> Tensor:
        return self._cholesky(right.reshape(len(self._cholesky.matrix), -1), damping).reshape(right.shape)

    def product(self, v: Tensor) -> Tensor:
        matrix = self._cholesky.matrix
        return (matrix @ v.reshape(len(matrix), -1)).reshape(v.shape)


class FeatureSystem:
    """K = P P^T of fewer features than samples: ``(r - P (P^T P + lambda I)^-1 P^T r) / lambda``.

    P is kept, or made again at every use, the rows of one block of samples at a time; each rank has rows of its own.
    """

    def __init__(
        self, features: Callable[[Tensor], Tensor], x: Tensor, block: int, keep: bool = False, ranks: Ranks = ALONE
    ) -> None:
        self._features, self._ranks, self._samples = features, ranks, len(x)
        self._blocks: tuple[Tensor, ...] = x[ranks.share(len(x))].split(block)
        if keep:
            self._features, self._blocks = _itself, tuple(features(part) for part in self._blocks)
        gram: Tensor | None = None
        for part in self._blocks:
            rows = self._features(part)
            gram = rows.T @ rows if gram is None else gram.addmm_(rows.T, rows)
        assert gram is not None  # there is a block, of no samples if need be
        ranks.sum_(gram)
        self.mean = float(gram.trace()) / len(x)
        self._cholesky = _Cholesky(gram, self.mean)

    def solve(self, right: Tensor, damping: float) -> Tensor:
        if damping == 0:  # there are directions in which K is 0
            raise self._cholesky.singular(damping)
        weights = self._cholesky(self._projected(right), damping)
        return (right - self._expanded(weights)) / (damping * self.mean)

    def product(self, v: Tensor) -> Tensor:
        return self._expanded(self._projected(v))

    def _projected(self, v: Tensor) -> Tensor:
        """``P^T v``"""
        parts = v[self._ranks.share(self._samples)].split([len(block) for block in self._blocks])
        out = v.new_zeros(len(self._cholesky.matrix), v.shape[1])
        for block, part in zip(self._blocks, parts, strict=True):
            out.addmm_(self._features(block).T, part)
        self._ranks.sum_(out)
        return out

    def _expanded(self, weights: Tensor) -> Tensor:
        """``P weights``"""
        return self._ranks.rows(
            self._samples, lambda _: torch.cat([self._features(block) @ weights for block in self._blocks])
        )


def _itself(rows: Tensor) -> Tensor:
    return rows


class ProductSystem:
    """K known by its products alone: conjugate gradients on all outputs at once.

    A system that is nearly the same, and easily solved, makes them converge in few iterations (``preconditioner``).
    """

    def __init__(self, product: Callable[[Tensor], Tensor], mean: float, preconditioner: System | None = None) -> None:
        self._product, self.mean, self._preconditioner = product, mean, preconditioner

    def product(self, v: Tensor) -> Tensor:
        return self._product(v)

    def solve(self, right: Tensor, damping: float) -> Tensor:
        def operator(function: Callable[[Tensor], Tensor]) -> Any:
            def times(vector: NDArray[np.float64]) -> NDArray[np.float64]:
                given = torch.from_numpy(vector).to(right.device).reshape(right.shape)
                return function(given).reshape(-1).cpu().numpy()

            return scipy.sparse.linalg.LinearOperator((right.numel(), right.numel()), times, dtype=np.float64)

        regular = operator(lambda v: self._product(v) + damping * self.mean * v)
        near, inverse = self._preconditioner, None
        if near is not None and damping > 0:
            inverse = operator(lambda v: near.solve(v, damping))
        flat = right.reshape(-1).cpu().numpy()
        limits = {"rtol": _TOLERANCE, "maxiter": _ITERATIONS}
        solution, failed = scipy.sparse.linalg.cg(regular, flat, M=inverse, **limits)
        if failed:
            left = float(np.linalg.norm(regular @ solution - flat) / np.linalg.norm(flat))
            raise np.linalg.LinAlgError(
                f"conjugate gradients have not converged in {_ITERATIONS} iterations with damping={damping:g} (what is "
                f"left of the residual is {left:.1e}): try damping={max(10 * damping, 1e-6):.1e}, or a larger budget, "
                "in which the system can be factorised"
            )
        return torch.from_numpy(solution).to(right.device).reshape(right.shape)
