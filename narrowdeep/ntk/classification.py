"""Classification by regression with a neural tangent kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from narrowdeep.extras import optional
from narrowdeep.ntk.checks import Array, as_array
from narrowdeep.ntk.estimator import KernelEstimator
from narrowdeep.ntk.regression import NTKRegressor

with optional():
    from sklearn.base import ClassifierMixin
    from sklearn.preprocessing import LabelBinarizer
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data


class NTKClassifier(ClassifierMixin, KernelEstimator):
    """The class with the largest output of an ``NTKRegressor`` on targets 1 for a sample's class and -1 for the others.

    With two classes there is one output, whose sign decides; as in scikit-learn's ``RidgeClassifier``.

    Arguments: as of ``NTKRegressor``.

    Attributes: ``classes_``, sorted; ``regressor_``, fitted; ``n_features_in_``.

    Examples:
        >>> import numpy as np
        >>> from narrowdeep.ntk import NTKClassifier, limit_ntk_mlp
        >>> X = np.random.default_rng(0).random((100, 2))
        >>> classifier = NTKClassifier(limit_ntk_mlp, ridge=1e-3).fit(X, np.where(X[:, 0] > X[:, 1], "right", "left"))
        >>> classifier.predict(np.array([[0.9, 0.1], [0.1, 0.9]])).tolist()
        ['right', 'left']
    """

    def fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> NTKClassifier:
        """Arguments: X and ``sample_weight`` as of ``NTKRegressor.fit``; y (N,), labels of any kind.

        Raises: as ``NTKRegressor.fit``; ValueError for labels of fewer than two classes.
        """
        X, y = (as_array(name, value) if isinstance(value, Tensor) else value for name, value in (("X", X), ("y", y)))
        X, y = validate_data(self, X, y, dtype=np.float64, allow_nd=True)
        check_classification_targets(y)
        binarizer = LabelBinarizer(neg_label=-1)
        targets = binarizer.fit_transform(y).astype(np.float64)
        self.classes_ = binarizer.classes_
        if len(self.classes_) < 2:
            raise ValueError(f"y must have at least two classes, got one class, {self.classes_[0]!r}")
        self.regressor_ = NTKRegressor(self.kernel, ridge=self.ridge, t=self.t, rho=self.rho, beta=self.beta)
        self.regressor_.fit(X, targets[:, 0] if len(self.classes_) == 2 else targets, sample_weight=sample_weight)
        return self

    def decision_function(self, X: ArrayLike) -> Array:
        """Outputs of the regressor: (M,) for two classes, positive for the second; (M, classes) for more."""
        check_is_fitted(self)
        if isinstance(X, Tensor):
            X = as_array("X", X)
        X = validate_data(self, X, dtype=np.float64, allow_nd=True, reset=False)
        outputs: Array = self.regressor_.predict(X)
        return outputs

    def predict(self, X: ArrayLike) -> Any:
        """Labels, (M,)."""
        scores = self.decision_function(X)
        return self.classes_[(scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(1)]
