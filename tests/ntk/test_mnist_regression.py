"""The limit kernel on 10,000 MNIST images: accuracy, and minutes on two cores."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import pytest

from narrowdeep.data import load_task
from narrowdeep.ntk import NTKRegressor, limit_ntk_mlp


@pytest.mark.slow
def test_limit_kernel_regression_on_mnist(mnist_folder: Path) -> None:
    task = load_task("mnist", data=mnist_folder)
    start = time.perf_counter()
    model = NTKRegressor(partial(limit_ntk_mlp, out_features=10)).fit(task.x_train[:10000], task.y_train[:10000])
    prediction = model.predict(task.x_test)
    seconds = time.perf_counter() - start
    accuracy = (prediction.argmax(1) == task.y_test.argmax(1).numpy()).mean()
    print(f"accuracy {accuracy:.4f} in {seconds:.0f} s")
    assert accuracy > 0.965
