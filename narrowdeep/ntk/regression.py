"""Regression with a neural tangent kernel: what an infinitely deep network learns (thesis Theorems 3.3 and 4.3)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from narrowdeep.checks import check_count, check_number
from narrowdeep.extras import optional
from narrowdeep.ntk.checks import Array, as_array, as_real
from narrowdeep.ntk.estimator import KernelEstimator, kernel_of, outputs_of
from narrowdeep.ntk.limit import CLIPPED
from narrowdeep.ntk.network import CAST_SAMPLES
from narrowdeep.ntk.spectrum import as_momentum, check_symmetric, descent_filter, flow_filter, kernel_matrix
from narrowdeep.ntk.system import Filter, KernelSystem

with optional():
    from sklearn.base import RegressorMixin
    from sklearn.utils import check_random_state
    from sklearn.utils.validation import check_is_fitted, validate_data

_BLOCK = 1 << 25
"""Entries of the kernel that a prediction holds at a time (256 MB)."""


class NTKRegressor(RegressorMixin, KernelEstimator):
    """Kernel regression, and the gradient flow that leads to it (thesis sections 2.1 and 3.2).

    With K = k(X, X) = Q diag(lambda) Q^T, a network that starts from f = f0 and has the constant NTK k learns

        f_ntk(x) = f0(x) + k(x, X) (K + ridge I)^-1 (y - f0(X))                       predict(X)
        f_t(x)   = the same with Q diag((1 - exp(-(lambda + ridge) t / N)) / (lambda + ridge)) Q^T
                   for the inverse                                                    predict(X, t=t)
        n steps  = with 1 - (1 - tau (lambda + ridge) / N)^n for 1 - exp(...)         predict(X, n_steps=n, tau=tau)

    by flow (or descent in steps of kernel time tau) on ``1/(2N) sum_n |f(x_n) - y_n|^2``, plus ``ridge / (2N)`` times
    the squared distance of the parameters from their start where a ridge is given. Compare a trained network with f_t:
    K is ill-conditioned, and f_ntk far away in time.

    Arguments:
        kernel: a callable ``k(X1, X2=None)`` that takes float64 tensors on the host, with the shape of X, and returns
            a tensor or array (N1, N2), or (N1, N2, out, out) for a matrix-valued kernel. ``limit_ntk_mlp`` is one;
            ``lambda a, b=None: empirical_ntk(model, a, b)`` is another, and casts X to the model's dtype here. Or an
            nn.Module: its empirical kernel as it is when ``fit`` and ``predict`` are called. Or "precomputed":
            ``fit(K, y)`` and ``predict(K_test_train)`` then take kernels in place of X.
        ridge: not negative, added to the diagonal of K.
        t: kernel time at which ``predict`` predicts where it is given none; None is the end of training.
        rho, beta: passed on to the kernel where they are not None, so that a search can tune them.

    Attributes: ``n_features_in_``; ``X_fit_`` (not with "precomputed").

    X is (N, features), or (N, channels, H, W) for kernels of images. y is (N,) or (N, out); predictions follow it.
    ``fit`` warns where a limit kernel is given negative entries, which it takes for 0: scale X to [0, 1]
    (``MinMaxScaler``), not to mean 0 (``StandardScaler``).

    Passes scikit-learn's ``check_estimator`` where ridge is positive. Without one, ``predict`` raises LinAlgError for a
    kernel matrix that is singular, as it should, and so do the checks that predict from one: with ``limit_ntk_mlp``
    ``check_fit_idempotent`` and ``check_sample_weight_equivalence_on_dense_data``, which repeats samples; with
    "precomputed" all 13 that fit a linear kernel of more samples than features.

    Examples:
        >>> import numpy as np
        >>> from narrowdeep.ntk import NTKRegressor, limit_ntk_mlp
        >>> X = np.random.default_rng(0).random((50, 2))
        >>> regressor = NTKRegressor(limit_ntk_mlp, ridge=1e-6).fit(X, X[:, 0] * X[:, 1])
        >>> mean, deviation = regressor.predict(np.array([[0.5, 0.5]]), return_std=True)
        >>> round(float(mean[0]), 2), bool(deviation[0] < 0.1)
        (0.25, True)
    """

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        tags.target_tags.single_output = True
        return tags

    def _evaluate(self, left: Array, right: Array | None) -> Any:
        if not callable(self.kernel):
            return left
        kernel: Callable[..., Any] = self.kernel
        if isinstance(self.kernel, nn.Module):
            kernel = kernel_of(self.kernel)
        settings = {name: getattr(self, name) for name in ("rho", "beta") if getattr(self, name) is not None}
        # Copies, because torch warns about arrays that cannot be written.
        tensors = [torch.tensor(x, device="cpu") for x in (left, right) if x is not None]
        token = CAST_SAMPLES.set(True)
        try:
            return kernel(*tensors, **settings)
        finally:
            CAST_SAMPLES.reset(token)

    def fit(
        self, X: ArrayLike, y: ArrayLike, initial: Any = None, sample_weight: ArrayLike | None = None
    ) -> NTKRegressor:
        """Evaluate the kernel on the training set, and solve for its coefficients. Keeps none of the caller's arrays.

        Arguments:
            X: (N, features), (N, channels, H, W), or K with "precomputed".
            y: (N,) or (N, out).
            initial: outputs f0 before training: of the shape of y; or an nn.Module or another callable that maps X to
                them, which ``predict`` calls as well. None: 0, what narrow networks start from.
            sample_weight: (N,), not negative: the loss is ``1/(2 sum w) sum_n w_n ||f(x_n) - y_n||^2``, so that a
                weight of 2 stands for two samples and 0 for none, and sample n is observed with variance ridge/w_n. At
                the end of training without a ridge, weights above 0 change nothing.

        Raises: TypeError for a setting that is not a number; ValueError for shapes, a ridge below 0 or a kernel that is
        not finite or not symmetric. A singular kernel raises in ``predict(X)``, the one prediction that needs the
        inverse.
        """
        if not callable(self.kernel) and not self._precomputed():
            raise ValueError(f"kernel must be a callable or 'precomputed', got {self.kernel!r}")
        ridge = check_number("ridge", self.ridge)
        self._time(None)
        for name in ("rho", "beta"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name))
                if not callable(self.kernel) or isinstance(self.kernel, nn.Module):
                    raise ValueError(f"{name} must be None where the kernel is no function of it, got {self.kernel!r}")
        if self._precomputed():
            X = as_array("X", X) if isinstance(X, Tensor) else X
        data, labels = validate_data(self, X, y, dtype=np.float64, allow_nd=True, multi_output=True, y_numeric=True)
        n = data.shape[0]
        seen = CLIPPED.set([])
        try:
            kernel = self._evaluate(data, None)
            clipped = CLIPPED.get()
        finally:
            CLIPPED.reset(seen)
        if clipped:
            warnings.warn(
                "X has negative entries, which a limit kernel takes for 0 as the first ReLU does: scale X to [0, 1], "
                f"got {float(data.min()):g}",
                UserWarning,
                stacklevel=2,
            )
        matrix = kernel_matrix(kernel)
        targets = labels.astype(np.float64)
        self._output_shape = labels.shape[1:]
        self._initial = initial if callable(initial) else None
        self._needs_initial = initial is not None and not callable(initial)
        targets = (targets - self._start(data, initial)).reshape(n, -1)
        outputs = targets.shape[1]
        if matrix.shape == (n * outputs, n * outputs):
            targets = targets.reshape(matrix.shape[0], -1)
        elif matrix.shape != (n, n):
            expected = f"({n}, {n}) or ({n}, {n}, {outputs}, {outputs})"
            raise ValueError(f"kernel must be square, {expected} for the {n} samples of y, got {_shape(kernel)}")
        if not np.isfinite(matrix).all():
            raise ValueError("kernel must be finite, got NaN or infinity")
        check_symmetric(matrix)
        if callable(self.kernel):
            self.X_fit_ = data.copy()
        self._rows = matrix.shape[0]
        self._outputs = matrix.shape[0] // n
        self._weighted = None if sample_weight is None else self._check_weights(sample_weight, data)
        total: float = n
        if self._weighted is not None:
            kept, roots = self._weighted
            matrix, targets = matrix[np.ix_(kept, kept)] * roots * roots[:, None], targets[kept] * roots[:, None]
            total = float(np.square(roots).sum()) / self._outputs
        self._system = KernelSystem(matrix, targets, total, ridge)
        return self

    def _check_weights(self, sample_weight: ArrayLike, data: Array) -> tuple[Any, Array]:
        """Rows of K with a weight above 0, and the roots of their weights."""
        weights = as_array("sample_weight", sample_weight)
        if weights.shape != (len(data),):
            raise ValueError(f"sample_weight must have shape ({len(data)},), got {weights.shape}")
        if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
            raise ValueError("sample_weight must be finite, not negative, and not zero for every sample")
        rows = np.repeat(weights, self._outputs)
        kept = np.flatnonzero(rows)
        return kept, np.sqrt(rows[kept])

    def _cross(self, matrix: Array) -> Array:
        """k(x, X_train) as the system takes it."""
        return matrix if self._weighted is None else matrix[:, self._weighted[0]] * self._weighted[1]

    def predict(
        self,
        X: ArrayLike,
        t: float | None = None,
        *,
        n_steps: int | None = None,
        tau: float | None = None,
        momentum: float = 0.0,
        return_std: bool = False,
        return_cov: bool = False,
        prior: Any = None,
        initial: Any = None,
    ) -> Any:
        """Predictions at the end of training, at time t, or after n_steps of kernel time tau.

        The covariance is that of a Gaussian process with covariance k, observed with variance ``ridge``:
        ``K** - K*X (K + ridge I)^-1 KX*``. At a finite time it is that of networks whose f0 is drawn from the process,
        trained until then on targets with noise of that variance (Lee et al., NeurIPS 2019, equation 13, for ridge 0).

        Arguments:
            X: (M, features), or k(X, X_train) with "precomputed".
            t: kernel time of the flow, not negative; None is the ``t`` of the estimator, and infinity the limit, f_ntk.
            n_steps, tau: gradient descent in place of the flow; both or neither, and not with t.
            momentum: of that descent, in [0, 1), in the convention of torch.optim.SGD.
            return_std, return_cov: also return standard deviations or the covariance; at most one of the two.
            prior: k(X, X), needed for either with "precomputed".
            initial: f0(X), (M,) or (M, out), needed where ``fit`` was given an array of them.

        Returns: (M,) or (M, out), float64. With return_std a pair with standard deviations of the same shape; with
        return_cov a pair with (M, M), the same for every output, or (M, M, out, out) for a matrix-valued kernel.

        Raises: numpy.linalg.LinAlgError when the kernel is numerically singular and neither t nor n_steps is given;
        ValueError for t < 0, n_steps < 0, tau <= 0, a bad combination, steps so long that descent overflows, or
        (with t or n_steps) an eigenvalue clearly below 0; TypeError for a t, n_steps or tau that is not a number.

        Examples:
            >>> import numpy as np
            >>> from narrowdeep.ntk import NTKRegressor, limit_ntk_mlp
            >>> X = np.random.default_rng(0).random((20, 2))
            >>> regressor = NTKRegressor(limit_ntk_mlp, ridge=1e-3).fit(X, X.prod(1))
            >>> regressor.predict(X, t=100.0).shape, regressor.predict(X, n_steps=10, tau=0.1).shape
            ((20,), (20,))
            >>> mean, covariance = regressor.predict(X[:3], return_cov=True)
            >>> covariance.shape
            (3, 3)
        """
        check_is_fitted(self)
        if return_std and return_cov:
            raise ValueError("return_std and return_cov must not both be True")
        uncertain = return_std or return_cov
        if uncertain and (prior is None) != bool(callable(self.kernel)):
            what = "left out: the kernel is evaluated" if callable(self.kernel) else "k(X, X) with 'precomputed'"
            raise ValueError(f"prior must be {what}, got {type(prior).__name__}")
        if self._precomputed() and isinstance(X, Tensor):
            X = as_array("X", X)
        data = validate_data(self, X, dtype=np.float64, allow_nd=True, reset=False)
        weights = self._weights(t, n_steps, tau, momentum)
        coefficients = self._system.coefficients(weights)
        samples = data.shape[0]
        if self._needs_initial and initial is None:
            raise ValueError("initial must be f0(X), as fit was given an array of it, got None")
        if initial is not None and not self._needs_initial:
            raise ValueError("initial must be left out where fit was given no array of it")
        start = self._start(data, initial if self._needs_initial else self._initial)
        out = np.empty((samples, math.prod(self._output_shape)))
        rows_kept = []
        size = max(1, _BLOCK // self._rows)
        for first in range(0, samples, size):
            rows = data[first : first + size]
            kernel = self._evaluate(rows, self.X_fit_ if callable(self.kernel) else None)
            matrix = kernel_matrix(kernel)
            if matrix.shape[1] != self._rows or matrix.shape[0] * coefficients.shape[1] != len(rows) * out.shape[1]:
                columns = self._rows // self._outputs
                raise ValueError(f"kernel must give {len(rows)} rows and {columns} columns, got {_shape(kernel)}")
            matrix = self._cross(matrix)
            out[first : first + size] = (matrix @ coefficients).reshape(len(rows), -1)
            if return_std:
                taken = self._system.explained(weights, matrix, True)
                before = self._prior(rows, prior, first, samples).diagonal()
                rows_kept.append(np.sqrt(np.maximum(before - taken, 0.0)).reshape(len(rows), -1))
            elif return_cov:
                rows_kept.append(matrix)
        mean = out.reshape(samples, *self._output_shape) + start
        if return_std:
            deviation = np.broadcast_to(np.concatenate(rows_kept), out.shape)
            return mean, deviation.reshape(mean.shape).copy()
        if return_cov:
            taken = self._system.explained(weights, np.concatenate(rows_kept), False)
            covariance = self._prior(data, prior, 0, samples) - taken
            outputs = len(covariance) // max(1, samples)
            if outputs > 1:
                covariance = covariance.reshape(samples, outputs, samples, outputs).transpose(0, 2, 1, 3)
            return mean, covariance
        return mean

    def _prior(self, rows: Array, prior: Any, first: int, samples: int) -> Array:
        """k(rows, rows) as a matrix; of "precomputed" ones the rows from ``first`` on."""
        if callable(self.kernel):
            return kernel_matrix(self._evaluate(rows, None))
        matrix = kernel_matrix(prior, "prior")
        outputs = self._outputs
        if matrix.shape != (samples * outputs,) * 2:
            raise ValueError(
                f"prior must be the kernel of the {samples} samples of X with themselves, got {_shape(prior)}"
            )
        part = slice(first * outputs, (first + len(rows)) * outputs)
        return matrix[part, part]

    def _start(self, data: Array, initial: Any) -> Array:
        """f0 of the samples in ``data``, in the shape of their targets."""
        shape = (data.shape[0], *self._output_shape)
        if initial is None:
            return np.zeros(shape)
        if callable(initial):
            if self._precomputed():
                raise ValueError("initial must be an array with 'precomputed', which has no X to call it on")
            initial = outputs_of(initial, data)
        start = as_array("initial", initial)
        if start.size == math.prod(shape) and start.ndim <= 2 and start.shape[:1] == shape[:1]:
            start = start.reshape(shape)  # (N, 1) and (N,) are the same outputs
        if start.shape != shape:
            raise ValueError(f"initial must have the shape of y, {shape}, got {start.shape}")
        if not np.isfinite(start).all():
            raise ValueError("initial must be finite, got NaN or infinity")
        return start

    def _time(self, t: Any) -> float:
        """Kernel time of a prediction; infinite is the end of training."""
        value = self.t if t is None else t
        if value is None:
            return math.inf
        time = as_real("t", value)
        if not time >= 0:
            raise ValueError(f"t must be finite and not negative (None or infinity is the limit), got {value}")
        return time

    def sample_y(self, X: ArrayLike, n_samples: int = 1, random_state: Any = 0, **arguments: Any) -> Array:
        """Functions drawn from what ``predict(X, return_cov=True)`` describes, at X.

        Arguments:
            X: (M, features), or k(X, X_train) with "precomputed".
            n_samples: functions, at least 1.
            random_state: an int, a numpy.random.RandomState or None, as in scikit-learn.
            arguments: as of ``predict``: a time, or ``prior`` and ``initial`` where it needs them.

        Returns: (M, n_samples) or (M, out, n_samples), float64, as of GaussianProcessRegressor.

        Examples:
            >>> import numpy as np
            >>> from narrowdeep.ntk import NTKRegressor, limit_ntk_mlp
            >>> X = np.random.default_rng(0).random((20, 2))
            >>> NTKRegressor(limit_ntk_mlp, ridge=1e-3).fit(X, X.prod(1)).sample_y(X[:5], 3).shape
            (5, 3)
        """
        count = check_count("n_samples", n_samples, 1)
        mean, covariance = self.predict(X, **arguments, return_cov=True)
        matrix = kernel_matrix(covariance, "covariance")
        values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
        columns = mean.size // max(1, len(matrix))  # outputs that are independent and alike
        normal = check_random_state(random_state).standard_normal((len(matrix), columns * count))
        drawn = (vectors * np.sqrt(np.maximum(values, 0.0))) @ normal
        return mean[..., None] + drawn.reshape(*mean.shape, count)

    def _weights(self, t: float | None, n_steps: int | None, tau: float | None, momentum: float) -> Filter | None:
        system, momentum = self._system, as_momentum(momentum)
        if (n_steps is None) != (tau is None):
            raise ValueError(f"n_steps and tau must be given together, got n_steps={n_steps} and tau={tau}")
        if n_steps is not None and tau is not None:
            if t is not None:
                raise ValueError(f"t must be None when n_steps is given, got t={t} and n_steps={n_steps}")
            steps, step = check_count("n_steps", n_steps, 0), check_number("tau", tau, positive=True)
            largest = system.modes[0][-1]
            if not np.isfinite(descent_filter(largest, system.samples, steps, step, momentum)):
                bound = 2 * (1 + momentum) * system.samples / largest
                raise ValueError(
                    f"tau must be below 2 (1 + momentum) N / lambda_max = {bound:g} for descent to be stable: "
                    f"{n_steps} steps of {tau} have overflowed"
                )
            return lambda values: descent_filter(values, system.samples, steps, step, momentum)
        if momentum:
            raise ValueError(f"momentum must be 0 without n_steps and tau, got {momentum}")
        time = self._time(t)
        return None if math.isinf(time) else lambda values: flow_filter(values, system.samples, time)


def _shape(kernel: Any) -> tuple[int, ...]:
    return tuple(np.shape(kernel))
