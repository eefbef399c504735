"""The linear system of regression with a kernel matrix, solved once and asked for means and covariances."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np

from narrowdeep.extras import optional
from narrowdeep.ntk.checks import Array
from narrowdeep.ntk.spectrum import check_semidefinite

with optional():
    import scipy.linalg  # type: ignore[import-untyped]

Filter = Callable[[Array], Array]
"""Eigenvalues -> what stands for their inverse at the end of training, or on the way."""


class KernelSystem:
    """``K coefficients = y``, solved; a K that is singular says so when the solution is asked for.

    ``matrix`` is the caller's no more: it is symmetric to the last bit, and kept for what is asked later. ``samples``
    is N of the loss, the sum of the weights where there are some.
    """

    def __init__(self, matrix: Array, targets: Array, samples: float, ridge: float) -> None:
        self.matrix, self.targets, self.samples, self.ridge = (matrix + matrix.T) / 2, targets, samples, ridge
        factor, self._rcond = self._factorised()
        # The solution at the end of time; that on the way needs no inverse, and exists for a singular matrix too.
        self._solution = None if factor is None else scipy.linalg.lapack.dpotrs(factor, targets, lower=1)[0]

    def _factorised(self) -> tuple[Array | None, float]:
        """The Cholesky factor of ``K + ridge I``, None where it is numerically singular, and 1 / its condition."""
        regular = self.matrix.copy()
        regular.flat[:: len(regular) + 1] += self.ridge
        norm = scipy.linalg.lapack.dlange("1", regular.T)
        # The transposed view is in LAPACK's order, and the matrix is symmetric: no copy is made.
        factor, info = scipy.linalg.lapack.dpotrf(regular.T, lower=1, overwrite_a=1, clean=0)
        rcond = 0.0 if info else scipy.linalg.lapack.dpocon(factor, norm, uplo="L")[0]
        return (None if rcond < np.finfo(np.float64).eps else factor), rcond

    @property
    def solution(self) -> Array:
        """``(K + ridge I)^-1 y``."""
        if self._solution is None:
            raise self._singular()
        return self._solution

    @cached_property
    def factor(self) -> Array:
        """The Cholesky factor of ``K + ridge I``, lower."""
        factor, _ = self._factorised()
        if factor is None:
            raise self._singular()
        return factor

    def _singular(self) -> Exception:
        eigenvalues = self.modes[0] - self.ridge
        largest = max(float(eigenvalues[-1]), 1e-280)
        # Enough for the 1-norm condition number, at most rows times that in the 2-norm, with a margin of 8.
        size = len(self.matrix)
        hint = 16 * size * np.finfo(np.float64).eps * largest + 2 * max(0.0, -self._smallest)
        return np.linalg.LinAlgError(
            f"the kernel matrix of {self.samples:g} samples is numerically singular (reciprocal condition number "
            f"{self._rcond:.1e}, ridge={self.ridge:g}): pass a larger ridge (for example "
            f"ridge={max(hint, 2 * self.ridge):.1e}), drop samples that coincide, compute the kernel in float64, or "
            "predict at a finite time (t=... or n_steps=..., tau=...), which needs no inverse"
        )

    @cached_property
    def modes(self) -> tuple[Array, Array, Array]:
        """Eigenvalues of ``K + ridge I``, eigenvectors, and the targets in that basis."""
        eigenvalues, vectors = scipy.linalg.eigh(self.matrix)
        self._smallest = float(eigenvalues[0])
        check_semidefinite(self.matrix, self._smallest)
        # A kernel is positive semidefinite; what is below 0 is rounding.
        return np.maximum(eigenvalues, 0.0) + self.ridge, vectors, vectors.T @ self.targets

    def coefficients(self, weights: Filter | None) -> Array:
        if weights is None:
            return self.solution
        eigenvalues, vectors, targets = self.modes
        return vectors @ (weights(eigenvalues)[:, None] * targets)

    def explained(self, weights: Filter | None, cross: Array, diagonal: bool) -> Array:
        """What the training set takes off the prior covariance of points with ``cross = k(X, X_train)``.

        ``cross (2 G - G (K + ridge I) G) cross^T``, G what stands for the inverse: cross G cross^T where it is one.
        """
        if weights is None:
            half = scipy.linalg.solve_triangular(self.factor, cross.T, lower=True, check_finite=False)
            return np.square(half).sum(0) if diagonal else half.T @ half
        eigenvalues, vectors, _ = self.modes
        g = weights(eigenvalues)
        half, g = cross @ vectors, g * (2 - g * eigenvalues)
        return np.square(half) @ g if diagonal else (half * g) @ half.T
