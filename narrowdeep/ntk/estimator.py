"""What the estimators with a neural tangent kernel share, and a network as a kernel or a start of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from narrowdeep.extras import optional
from narrowdeep.ntk.checks import Array
from narrowdeep.ntk.empirical import empirical_ntk
from narrowdeep.ntk.network import reading

with optional():
    from sklearn.base import BaseEstimator


class KernelEstimator(BaseEstimator):
    """The settings of an ``NTKRegressor``, and what scikit-learn is to know of them."""

    def __init__(
        self,
        kernel: Callable[..., Any] | nn.Module | Literal["precomputed"],
        *,
        ridge: float = 0.0,
        t: float | None = None,
        rho: float | None = None,
        beta: float | None = None,
    ) -> None:
        self.kernel = kernel
        self.ridge = ridge
        self.t = t
        self.rho = rho
        self.beta = beta

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.pairwise = self._precomputed()
        tags.input_tags.three_d_array = True
        return tags

    def _precomputed(self) -> bool:
        return isinstance(self.kernel, str) and self.kernel == "precomputed"


def kernel_of(model: nn.Module) -> Callable[..., Tensor]:
    """Its empirical kernel, of samples on the host."""
    device = next((param.device for param in model.parameters()), torch.device("cpu"))

    def kernel(x1: Tensor, x2: Tensor | None = None) -> Tensor:
        return empirical_ntk(model, x1.to(device), None if x2 is None else x2.to(device))

    return kernel


def outputs_of(initial: Callable[..., Any], data: Array) -> Any:
    """f0 of samples; a module is called in its own dtype, on its own device, without a trace."""
    x = torch.tensor(data, device="cpu")
    if not isinstance(initial, nn.Module):
        return initial(x)
    param = next((param for param in initial.parameters() if param.is_floating_point()), x)
    with reading(initial):
        return initial(x.to(param.device, param.dtype))
