"""Neural tangent kernels: empirical, in the limit of infinite depth, and what they predict."""

from narrowdeep.ntk.classification import NTKClassifier
from narrowdeep.ntk.diagnostics import kernel_drift, layer_contributions, layer_deviation, zero_crossings
from narrowdeep.ntk.empirical import empirical_ntk, jacobian, ntk_vector_product
from narrowdeep.ntk.features import features
from narrowdeep.ntk.gaussian_process import LimitNTK
from narrowdeep.ntk.limit import limit_ntk_cnn, limit_ntk_mlp
from narrowdeep.ntk.linear import LinearizedModel, linearize
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
    "zero_crossings",
]
