"""``(K + lambda I) coefficients = residual``: by Cholesky in samples or in features, or by conjugate gradients.

All in float64. lambda is ``damping`` times the mean of K's diagonal: a damping means the same for every network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
_ROWS = 1024
"""Of a matrix that is symmetric, taken at a time."""
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


class _Symmetric:
    """A symmetric matrix and the Cholesky factor of it with lambda on its diagonal, in the memory of one.

    The matrix has the half above the diagonal, the last factor the half below it, and its diagonal is beside it.
    """

    def __init__(self, matrix: Tensor, mean: float) -> None:
        """``matrix`` is the caller's no more; what is below its diagonal is not read."""
        self._both, self.mean = matrix, mean
        self._diagonal = matrix.diagonal().clone()
        self._damping: float | None = None

    def __len__(self) -> int:
        return len(self._both)

    def __matmul__(self, v: Tensor) -> Tensor:
        out = self._diagonal[:, None] * v
        for begin, end in _blocks(len(self)):
            right = self._both[begin:end, begin:].clone()
            right[:, : end - begin].triu_(1)
            out[begin:end] += right @ v[begin:]
            out[begin:] += right.T @ v[begin:end]
        return out

    def solve(self, right: Tensor, damping: float) -> Tensor:
        """Raises: numpy.linalg.LinAlgError where it is singular."""
        if self._damping != damping:
            self._damping = None
            if not self._factorise(damping):
                raise self.singular(damping)
            self._damping = damping
        half = torch.linalg.solve_triangular(self._both, right, upper=False)
        return torch.linalg.solve_triangular(self._both.T, half, upper=True)

    def _factorise(self, damping: float) -> bool:
        for begin, end in _blocks(len(self)):
            size = end - begin
            below = self._both[begin:, begin:end]
            columns = self._both[begin:end, begin:].T.contiguous()
            square = columns[:size].tril_(-1)
            square += square.T.clone()
            square.diagonal().copy_(self._diagonal[begin:end] + damping * self.mean)
            columns.addmm_(self._both[begin:, :begin], self._both[begin:end, :begin].T, alpha=-1)
            factor, failed = torch.linalg.cholesky_ex(square)
            if failed:
                return False
            below[:size].triu_(1).add_(factor)
            below[size:] = torch.linalg.solve_triangular(factor.T, columns[size:], upper=True, left=False)
        pivots = self._both.diagonal()
        return bool(pivots.min() > pivots.max() * EPS**0.5)  # 1 / condition is at most the ratio's square

    def singular(self, damping: float) -> Exception:
        matrix = self._both.clone()
        matrix.diagonal().copy_(self._diagonal)
        values = torch.linalg.eigvalsh(matrix, UPLO="U")
        needed = (2 * len(values) * EPS * float(values[-1]) + 2 * max(0.0, -float(values[0]))) / self.mean
        kind = "indefinite" if -float(values[0]) > len(values) * EPS * float(values[-1]) else "singular"
        return np.linalg.LinAlgError(
            f"the kernel of these samples is numerically {kind} with damping={damping:g}: the smallest that works is "
            f"about damping={needed:.1e} (samples that coincide, or a kernel computed in float32, ask for more)"
        )


def _blocks(size: int) -> Iterator[tuple[int, int]]:
    return ((begin, min(begin + _ROWS, size)) for begin in range(0, size, _ROWS))


def add_gram(out: Tensor, rows: Tensor, columns: Tensor) -> None:
    """Add ``rows @ columns``, which is symmetric, to the half of ``out`` above the diagonal and to some below it."""
    for begin, end in _blocks(len(out)):
        out[begin:end, begin:].addmm_(rows[begin:end], columns[:, begin:])


class SampleSystem:
    """K itself, (N, N) for every output or (N out, N out); float64."""

    def __init__(self, kernel: Tensor) -> None:
        """``kernel`` is the caller's no more where it is float64; what is below its diagonal is not read.

        Raises: ValueError for a kernel that is not finite or has no positive diagonal.
        """
        kernel = kernel.double()
        if kernel.dim() == 4:
            samples, outputs = kernel.shape[1:3]
            kernel = kernel.transpose(1, 2).reshape(samples * outputs, samples * outputs)
        if not all(bool(rows.isfinite().all()) for rows in kernel.split(_ROWS)):
            raise ValueError("kernel must be finite, got NaN or infinity")
        self.mean = float(kernel.diagonal().mean())
        if not self.mean > 0:
            raise ValueError(f"kernel must have a diagonal above 0 on average, got {self.mean:g}")
        self._kernel = _Symmetric(kernel, self.mean)

    def solve(self, right: Tensor, damping: float) -> Tensor:
        return self._kernel.solve(right.reshape(len(self._kernel), -1), damping).reshape(right.shape)

    def product(self, v: Tensor) -> Tensor:
        return (self._kernel @ v.reshape(len(self._kernel), -1)).reshape(v.shape)


class FeatureSystem:
    """K = P P^T of fewer features than samples: ``(r - P (P^T P + lambda I)^-1 P^T r) / lambda``.

    P is kept, or made again at every use, the rows of one block of samples at a time; each rank has rows of its own.
    ``advance`` is called with the parts of P^T P that are done, of 1 in all.
    """

    def __init__(
        self,
        features: Callable[[Tensor], Tensor],
        x: Tensor,
        block: int,
        keep: bool = False,
        ranks: Ranks = ALONE,
        advance: Callable[[float], None] = lambda _: None,
    ) -> None:
        self._features, self._ranks, self._samples = features, ranks, len(x)
        own = x[ranks.share(len(x))]
        self._blocks: tuple[Tensor, ...] = own.split(block)
        if keep:
            self._features, self._blocks = _itself, tuple(features(part) for part in self._blocks)
        gram: Tensor | None = None
        for part in self._blocks:
            rows = self._features(part)
            if gram is None:
                gram = rows.new_zeros(rows.shape[1], rows.shape[1])
            add_gram(gram, rows.T, rows)
            advance(len(part) / max(1, len(own)))
        assert gram is not None  # there is a block, of no samples if need be
        ranks.sum_(gram)
        self.mean = float(gram.trace()) / len(x)
        self._gram = _Symmetric(gram, self.mean)

    def solve(self, right: Tensor, damping: float) -> Tensor:
        if damping == 0:  # there are directions in which K is 0
            raise self._gram.singular(damping)
        weights = self._gram.solve(self._projected(right), damping)
        return (right - self._expanded(weights)) / (damping * self.mean)

    def product(self, v: Tensor) -> Tensor:
        return self._expanded(self._projected(v))

    def _projected(self, v: Tensor) -> Tensor:
        """``P^T v``"""
        parts = v[self._ranks.share(self._samples)].split([len(block) for block in self._blocks])
        out = v.new_zeros(len(self._gram), v.shape[1])
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
