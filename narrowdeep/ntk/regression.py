"""Regression with a neural tangent kernel: what an infinitely deep network learns (thesis Theorems 3.3 and 4.3)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal

import numpy as np
import scipy.linalg  # type: ignore[import-untyped]
import torch
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from narrowdeep.ntk.spectrum import (
    Array,
    check_real,
    check_semidefinite,
    check_steps,
    check_symmetric,
    descent_filter,
    flow_filter,
    kernel_matrix,
)

_BLOCK = 1 << 25
"""Entries of the kernel that a prediction holds at a time (256 MB)."""


class _System:
    """``K coefficients = y`` and its regularisations; factorised when first asked, then kept."""

    def __init__(self, matrix: Array, targets: Array, samples: int, ridge: float) -> None:
        self.matrix, self.targets, self.samples, self.ridge = matrix, targets, samples, ridge

    @cached_property
    def solution(self) -> Array:
        """``(K + ridge I)^-1 y`` by Cholesky."""
        regular = self.matrix.copy()
        size = regular.shape[0]
        regular.flat[:: size + 1] += self.ridge
        norm = scipy.linalg.lapack.dlange("1", regular.T)
        # The transposed view is in LAPACK's order, and the matrix is symmetric: no copy is made.
        factor, info = scipy.linalg.lapack.dpotrf(regular.T, lower=1, overwrite_a=1, clean=0)
        rcond = 0.0 if info else scipy.linalg.lapack.dpocon(factor, norm, uplo="L")[0]
        if rcond < np.finfo(np.float64).eps:
            hint = max(size * float(np.abs(self.matrix).max()), np.finfo(np.float64).tiny) * 1e-12
            raise np.linalg.LinAlgError(
                f"the kernel matrix of {self.samples} samples is numerically singular (reciprocal condition number "
                f"{rcond:.1e}, ridge={self.ridge:g}): pass a larger ridge (for example ridge={hint:.1e}), drop samples "
                "that coincide, compute the kernel in float64, or predict at a finite time (t=... or n_steps=..., "
                "tau=...), which needs no inverse"
            )
        return scipy.linalg.lapack.dpotrs(factor, self.targets, lower=1)[0]

    @cached_property
    def modes(self) -> tuple[Array, Array, Array]:
        """Eigenvalues of ``K + ridge I``, eigenvectors, and the targets in that basis."""
        eigenvalues, vectors = scipy.linalg.eigh(self.matrix)
        check_semidefinite(self.matrix, float(eigenvalues[0]))
        # A kernel is positive semidefinite; what is below 0 is rounding.
        return np.maximum(eigenvalues, 0.0) + self.ridge, vectors, vectors.T @ self.targets

    def filtered(self, weights: Callable[[Array], Array]) -> Array:
        eigenvalues, vectors, targets = self.modes
        return vectors @ (weights(eigenvalues)[:, None] * targets)


class NTKRegressor(RegressorMixin, BaseEstimator):
    """Kernel regression, and the gradient flow that leads to it (thesis sections 2.1 and 3.2).

    With K = k(X, X) = Q diag(lambda) Q^T, a network that starts from f = 0 and has the constant NTK k learns

        f_ntk(x) = k(x, X) (K + ridge I)^-1 y                                       predict(X)
        f_t(x)   = k(x, X) Q diag((1 - exp(-(lambda + ridge) t / N)) / (lambda + ridge)) Q^T y      predict(X, t=t)
        n steps  = the same with 1 - (1 - tau (lambda + ridge) / N)^n               predict(X, n_steps=n, tau=tau)

    by flow (or descent in steps of kernel time tau) on ``1/(2N) sum_n |f(x_n) - y_n|^2``, plus ``ridge / (2N)`` times
    the squared distance of the parameters from their start where a ridge is given. Compare a trained network with f_t:
    K is ill-conditioned, and f_ntk far away in time.

    Arguments:
        kernel: a callable ``k(X1, X2=None)`` that takes float64 tensors on the host, with the shape of X, and returns
            a tensor or array (N1, N2), or (N1, N2, out, out) for a matrix-valued kernel. ``limit_ntk_mlp`` is one;
            ``lambda a, b=None: empirical_ntk(model, a, b)`` is another, for a float64 model. Or "precomputed":
            ``fit(K, y)`` and ``predict(K_test_train)`` then take kernels in place of X.
        ridge: not negative, added to the diagonal of K.

    Attributes: ``n_features_in_``; ``X_fit_`` (not with "precomputed").

    X is (N, features), or (N, channels, H, W) for kernels of images. y is (N,) or (N, out); predictions follow it.

    Passes scikit-learn's ``check_estimator`` where ridge is positive. Without one, the checks that predict from samples
    that coincide (``check_fit_idempotent``) or from a kernel matrix of low rank (``check_estimators_dtypes`` with
    "precomputed") raise LinAlgError, as they should.
    """

    def __init__(self, kernel: Callable[..., Any] | Literal["precomputed"], *, ridge: float = 0.0) -> None:
        self.kernel = kernel
        self.ridge = ridge

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.pairwise = isinstance(self.kernel, str) and self.kernel == "precomputed"
        tags.input_tags.three_d_array = True
        tags.target_tags.multi_output = True
        tags.target_tags.single_output = True
        return tags

    def _evaluate(self, left: Array, right: Array | None) -> Tensor | ArrayLike:
        if not callable(self.kernel):
            return left
        # Copies, because torch warns about arrays that cannot be written.
        tensors = [torch.tensor(left)] if right is None else [torch.tensor(left), torch.tensor(right)]
        return self.kernel(*tensors)

    def fit(self, X: ArrayLike, y: ArrayLike) -> NTKRegressor:
        """Evaluate the kernel on the training set.

        Raises: TypeError for a ridge that is not a number; ValueError for shapes, a ridge below 0 or a kernel that is
        not finite or not symmetric. A singular kernel raises in
        ``predict(X)``, the one prediction that needs the inverse.
        """
        if not callable(self.kernel) and not (isinstance(self.kernel, str) and self.kernel == "precomputed"):
            raise ValueError(f"kernel must be a callable or 'precomputed', got {self.kernel!r}")
        check_real("ridge", self.ridge)
        if not (math.isfinite(self.ridge) and self.ridge >= 0):
            raise ValueError(f"ridge must be finite and not negative, got {self.ridge!r}")
        data, labels = validate_data(self, X, y, dtype=np.float64, allow_nd=True, multi_output=True, y_numeric=True)
        n = data.shape[0]
        kernel = self._evaluate(data, None)
        matrix = kernel_matrix(kernel)
        targets = labels.astype(np.float64).reshape(n, -1)
        outputs = targets.shape[1]
        if matrix.shape == (n * outputs, n * outputs):
            targets = targets.reshape(matrix.shape[0], -1)
        elif matrix.shape != (n, n):
            expected = f"({n}, {n})" if outputs == 1 else f"({n}, {n}) or ({n}, {n}, {outputs}, {outputs})"
            raise ValueError(f"kernel must be square, {expected} for the {n} samples of y, got {_shape(kernel)}")
        if not np.isfinite(matrix).all():
            raise ValueError("kernel must be finite, got NaN or infinity")
        check_symmetric(matrix)
        if callable(self.kernel):
            self.X_fit_ = data
        self._system = _System(matrix, targets, n, float(self.ridge))
        self._output_shape = labels.shape[1:]
        return self

    def predict(
        self, X: ArrayLike, t: float | None = None, *, n_steps: int | None = None, tau: float | None = None
    ) -> Array:
        """Predictions at the end of training, at time t, or after n_steps of kernel time tau.

        Arguments:
            X: (M, features), or k(X, X_train) with "precomputed".
            t: kernel time of the flow, finite and not negative; None is the limit, f_ntk.
            n_steps, tau: gradient descent in place of the flow; both or neither, and not with t.

        Returns: (M,) or (M, out), float64.

        Raises: numpy.linalg.LinAlgError when the kernel is numerically singular and neither t nor n_steps is given;
        ValueError for t < 0, n_steps < 0, tau <= 0, a bad combination, steps so long that descent overflows, or
        (with t or n_steps) an eigenvalue clearly below 0; TypeError for a t, n_steps or tau that is not a number.
        """
        check_is_fitted(self)
        data = validate_data(self, X, dtype=np.float64, allow_nd=True, reset=False)
        coefficients = self._coefficients(t, n_steps, tau)
        samples = data.shape[0]
        out = np.empty((samples, math.prod(self._output_shape)))
        size = max(1, _BLOCK // self._system.matrix.shape[0])
        for start in range(0, samples, size):
            rows = data[start : start + size]
            kernel = self._evaluate(rows, self.X_fit_ if callable(self.kernel) else None)
            matrix = kernel_matrix(kernel)
            if matrix.shape[1] != coefficients.shape[0] or matrix.shape[0] * coefficients.shape[1] != (
                len(rows) * out.shape[1]
            ):
                raise ValueError(
                    f"kernel must give {len(rows)} rows and {self._system.samples} columns, got {_shape(kernel)}"
                )
            out[start : start + size] = (matrix @ coefficients).reshape(len(rows), -1)
        return out.reshape(samples, *self._output_shape)

    def _coefficients(self, t: float | None, n_steps: int | None, tau: float | None) -> Array:
        system = self._system
        if (n_steps is None) != (tau is None):
            raise ValueError(f"n_steps and tau must be given together, got n_steps={n_steps} and tau={tau}")
        if n_steps is not None and tau is not None:
            if t is not None:
                raise ValueError(f"t must be None when n_steps is given, got t={t} and n_steps={n_steps}")
            check_steps(n_steps)
            check_real("tau", tau)
            if not (math.isfinite(tau) and tau > 0):
                raise ValueError(f"tau must be finite and positive, got {tau}")
            largest = system.modes[0][-1]
            if not np.isfinite(descent_filter(largest, system.samples, n_steps, tau)):
                raise ValueError(
                    f"tau must be below 2 N / lambda_max = {2 * system.samples / largest:g} for descent to be stable: "
                    f"{n_steps} steps of {tau} have overflowed"
                )
            return system.filtered(lambda values: descent_filter(values, system.samples, n_steps, tau))
        if t is None:
            return system.solution
        check_real("t", t)
        if not (math.isfinite(t) and t >= 0):
            raise ValueError(f"t must be finite and not negative (None is the limit), got {t}")
        return system.filtered(lambda values: flow_filter(values, system.samples, t))


def _shape(kernel: Any) -> tuple[int, ...]:
    return tuple(np.shape(kernel))
