"""NTKClassifier against RidgeClassifier's rule on kernels whose features are known, and scikit-learn's own checks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import GridSearchCV
from sklearn.utils.estimator_checks import check_estimator

from narrowdeep import DeepNarrowMLP
from narrowdeep.ntk import NTKClassifier, limit_ntk_mlp


def linear(a: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
    return a @ (a if b is None else b).T


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
@pytest.mark.filterwarnings("ignore:X has negative entries")
def test_scikit_learn_checks() -> None:
    check_estimator(NTKClassifier(limit_ntk_mlp, ridge=1e-3))


@pytest.mark.parametrize("labels", [["no", "yes"], [3, 1, 7]])
@pytest.mark.parametrize("weighted", [False, True])
def test_ridge_classification_with_a_linear_kernel(labels: list[object], weighted: bool) -> None:
    rng = np.random.default_rng(0)
    x, points = rng.normal(size=(40, 5)), rng.normal(size=(30, 5))
    y = np.array(labels)[np.arange(40) % len(labels)]
    weights = {"sample_weight": rng.uniform(0, 2, 40)} if weighted else {}
    expected = RidgeClassifier(alpha=2.0, fit_intercept=False).fit(x, y, **weights)
    got = NTKClassifier(linear, ridge=2.0).fit(x, y, **weights)
    np.testing.assert_allclose(got.decision_function(points), expected.decision_function(points), atol=1e-10)
    assert (got.predict(points) == expected.predict(points)).all()
    assert (got.classes_ == expected.classes_).all()


def test_digits() -> None:
    x, y = load_digits(return_X_y=True)
    x /= 16
    search = GridSearchCV(NTKClassifier(limit_ntk_mlp, ridge=1e-3), {"rho": [1.0, 16.0]}, cv=2).fit(x[:600], y[:600])
    assert search.best_params_ == {"rho": 16.0}
    assert search.score(x[600:], y[600:]) > 0.93


def test_a_network_as_the_kernel() -> None:
    """Of three outputs, which the three classes take."""
    torch.manual_seed(0)
    x = np.random.default_rng(0).uniform(size=(30, 2))
    y = np.digitize(x[:, 0], [0.33, 0.66])
    model = NTKClassifier(DeepNarrowMLP(2, 3, 30, dtype=torch.float64), ridge=1e-3).fit(x, y)
    assert model.score(x, y) > 0.85


def test_bad_input() -> None:
    x = np.eye(3)
    with pytest.raises(ValueError, match="y must have at least two classes, got one class"):
        NTKClassifier(linear, ridge=1.0).fit(x, [1, 1, 1])
    with pytest.raises(ValueError, match="kernel must be a callable or 'precomputed', got 'rbf'"):
        NTKClassifier("rbf", ridge=1.0).fit(x, [0, 1, 1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Unknown label type"):
        NTKClassifier(linear, ridge=1.0).fit(x, [0.5, 1.5, 2.5])
