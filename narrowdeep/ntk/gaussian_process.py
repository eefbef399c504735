"""The kernels of infinite depth as a kernel object of scikit-learn."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch

from narrowdeep.extras import optional
from narrowdeep.ntk.checks import Array
from narrowdeep.ntk.limit import limit_ntk_cnn, limit_ntk_mlp

with optional():
    from sklearn.gaussian_process.kernels import Hyperparameter, Kernel

_STEP = 1e-4
"""Of the central differences in log rho and log beta, whose error is of the order of its square."""

Bounds = tuple[float, float] | Literal["fixed"]


class LimitNTK(Kernel):
    """``limit_ntk_mlp``, or ``limit_ntk_cnn`` of images, for GaussianProcessRegressor, KernelRidge and the like.

    ``GaussianProcessRegressor(1.0 * LimitNTK() + WhiteKernel())`` tunes rho and beta, and the variances, by the
    marginal likelihood; ``KernelRidge(kernel=LimitNTK())`` takes it as it is.

    Arguments:
        rho, beta: standard deviations of the initialisation, positive to be tuned.
        rho_bounds, beta_bounds: between which they are tuned, or "fixed".
        out_features: outputs (for images, output channels) of the network.
        image_shape: (C, H, W) of the images that the rows of X hold; None: the MLP's kernel.
        kernel_size: of the filters; used for images.

    Examples:
        >>> import numpy as np
        >>> from sklearn.kernel_ridge import KernelRidge
        >>> from narrowdeep.ntk import LimitNTK
        >>> X = np.random.default_rng(0).random((50, 2))
        >>> ridge = KernelRidge(kernel=LimitNTK(), alpha=1e-6).fit(X, X[:, 0] * X[:, 1])
        >>> round(float(ridge.predict(np.array([[0.5, 0.5]]))[0]), 2)
        0.25
    """

    def __init__(
        self,
        rho: float = 1.0,
        beta: float = 1.0,
        rho_bounds: Bounds = (1e-2, 1e2),
        beta_bounds: Bounds = (1e-2, 1e2),
        out_features: int = 1,
        image_shape: tuple[int, int, int] | None = None,
        kernel_size: int = 3,
    ) -> None:
        self.rho = rho
        self.beta = beta
        self.rho_bounds = rho_bounds
        self.beta_bounds = beta_bounds
        self.out_features = out_features
        self.image_shape = image_shape
        self.kernel_size = kernel_size

    @property
    def hyperparameter_rho(self) -> Any:
        return Hyperparameter("rho", "numeric", self.rho_bounds)

    @property
    def hyperparameter_beta(self) -> Any:
        return Hyperparameter("beta", "numeric", self.beta_bounds)

    def __call__(self, X: Any, Y: Any = None, eval_gradient: bool = False) -> Any:
        """k(X, Y), (N, M); with ``eval_gradient`` (Y None) also its derivatives in the logarithms of rho and beta that
        are not fixed, (N, N, 0 to 2), by central differences."""
        kernel = self._evaluate(X, Y, self.rho, self.beta)
        if not eval_gradient:
            return kernel
        if Y is not None:
            raise ValueError("Y must be None where eval_gradient is True")
        slopes = []
        for name in ("beta", "rho"):  # in the order of theta, which is the alphabet's
            if getattr(self, f"hyperparameter_{name}").fixed:
                continue
            values = [getattr(self, name) * np.exp(step) for step in (_STEP, -_STEP)]
            ends = [self._evaluate(X, None, **{"rho": self.rho, "beta": self.beta, name: v}) for v in values]
            slopes.append((ends[0] - ends[1]) / (2 * _STEP))
        return kernel, np.stack(slopes, -1) if slopes else np.empty((*kernel.shape, 0))

    def diag(self, X: Any) -> Array:
        """k(x, x) of each row, (N,)."""
        rows = [self._evaluate(X[i : i + 1], None, self.rho, self.beta)[0, 0] for i in range(len(X))]
        return np.array(rows, dtype=np.float64)

    def is_stationary(self) -> bool:
        return False

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rho={self.rho:.3g}, beta={self.beta:.3g})"

    def _evaluate(self, X: Any, Y: Any, rho: float, beta: float) -> Array:
        samples = [torch.tensor(np.atleast_2d(x), dtype=torch.float64) for x in (X, Y) if x is not None]
        if self.image_shape is None:
            kernel = limit_ntk_mlp(*samples, rho=rho, beta=beta, out_features=self.out_features)
        else:
            images = [x.reshape(len(x), *self.image_shape) for x in samples]
            sizes: dict[str, Any] = {"kernel_size": self.kernel_size, "out_channels": self.out_features}
            kernel = limit_ntk_cnn(*images, rho=rho, beta=beta, **sizes)
        return kernel.numpy()
