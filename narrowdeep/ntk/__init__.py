"""Neural tangent kernels: empirical, in the limit of infinite depth, and what they predict.

``NTKRegressor`` and what reads a spectrum need scipy and scikit-learn (the extra ``ntk``) and are loaded when
they are first touched.
"""

import importlib
from typing import TYPE_CHECKING, Any

from narrowdeep.ntk.diagnostics import kernel_drift, layer_contributions, layer_deviation, zero_crossings
from narrowdeep.ntk.empirical import empirical_ntk, jacobian, ntk_vector_product
from narrowdeep.ntk.features import features
from narrowdeep.ntk.limit import limit_ntk_cnn, limit_ntk_mlp
from narrowdeep.ntk.linear import LinearizedModel, linearize

if TYPE_CHECKING:
    from narrowdeep.ntk.classification import NTKClassifier
    from narrowdeep.ntk.curvature import sharpness
    from narrowdeep.ntk.gaussian_process import LimitNTK
    from narrowdeep.ntk.regression import NTKRegressor
    from narrowdeep.ntk.spectrum import heavy_ball, loss_curve, max_learning_rate

__all__ = [
    "LimitNTK",
    "LinearizedModel",
    "NTKClassifier",
    "NTKRegressor",
    "empirical_ntk",
    "features",
    "heavy_ball",
    "jacobian",
    "kernel_drift",
    "layer_contributions",
    "layer_deviation",
    "limit_ntk_cnn",
    "limit_ntk_mlp",
    "linearize",
    "loss_curve",
    "max_learning_rate",
    "ntk_vector_product",
    "sharpness",
    "zero_crossings",
]

_LATER = {
    "LimitNTK": "gaussian_process",
    "NTKClassifier": "classification",
    "NTKRegressor": "regression",
    "heavy_ball": "spectrum",
    "loss_curve": "spectrum",
    "max_learning_rate": "spectrum",
    "sharpness": "curvature",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'narrowdeep.ntk' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"narrowdeep.ntk.{_LATER[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
