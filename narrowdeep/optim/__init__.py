"""Optimizers for networks that are deep, narrow and nearly linear in their parameters.

``GramGaussNewton`` needs scipy (the extra ``ntk``) and is loaded when it is first touched.
"""

import importlib
from typing import TYPE_CHECKING, Any

from narrowdeep.optim.fused_sgd import FusedSGD

if TYPE_CHECKING:
    from narrowdeep.optim.gauss_newton import GaussNewtonStep, GramGaussNewton

__all__ = ["FusedSGD", "GaussNewtonStep", "GramGaussNewton"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'narrowdeep.optim' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module("narrowdeep.optim.gauss_newton"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
