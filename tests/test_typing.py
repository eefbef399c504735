"""A user's script in the strictest terms of mypy, and under pyright: the public API is fully typed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import narrowdeep

SCRIPT = """\
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import narrowdeep
from narrowdeep import DeepNarrowCNN, DeepNarrowMLP
from narrowdeep.memory import MemoryPlan, plan
from narrowdeep.ntk import NTKRegressor, empirical_ntk, jacobian, limit_ntk_mlp, max_learning_rate
from narrowdeep.optim import FusedSGD
from narrowdeep.training import load_model, save_model


def fit(model: DeepNarrowMLP, batches: list[tuple[Tensor, Tensor]]) -> float:
    optimizer = torch.optim.Adam(model.param_groups(weight_decay=0.01), lr=1e-6)
    loss = torch.zeros(())
    for x, y in batches:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return loss.item()


def kernels(model: DeepNarrowMLP | DeepNarrowCNN, x: Tensor) -> dict[str, Tensor]:
    step: float = max_learning_rate(empirical_ntk(model, x, reduce="trace"))
    FusedSGD(model, lr=step * model.ntk_lr, momentum=0.9)
    regressor: NTKRegressor = NTKRegressor(limit_ntk_mlp, ridge=1e-3).fit(x.numpy(), np.zeros(len(x)))
    mean, deviation = regressor.predict(x.numpy(), return_std=True)
    print(narrowdeep.__version__, mean.shape, deviation.shape, limit_ntk_mlp(x).shape)
    return jacobian(model, x)


save_model(DeepNarrowMLP(2, 1, depth=100, scale=50.0, budget="1GiB", chunks=4), "model.safetensors")
loaded = load_model("model.safetensors")
layers: Callable[[], nn.Sequential] = loaded.to_sequential
needs: MemoryPlan = plan(loaded, batch_size=128)
assert_type(needs.total, int)
assert_type(loaded.hidden_states(torch.rand(5, 2), layers=[1, 99]), Tensor)
"""


INSTALLED = "site-packages" in narrowdeep.__file__
"""Or else a checkout, which type checkers are told of; an installed package they find by its py.typed."""
FOLDER = str(Path(narrowdeep.__file__).parent.parent)


def checked(script: str, folder: Path, *command: str) -> str:
    """What a type checker says of a script; nothing where it finds no error."""
    (folder / "script.py").write_text(script)
    settings = {} if INSTALLED else {"extraPaths": [FOLDER]}
    (folder / "pyrightconfig.json").write_text(json.dumps({**settings, "pythonVersion": "3.10"}))
    environment = os.environ if INSTALLED else {**os.environ, "MYPYPATH": FOLDER}
    program = [sys.executable, "-m", *command, "script.py"]
    done = subprocess.run(program, cwd=folder, capture_output=True, text=True, env=environment, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


@pytest.mark.parametrize(
    "command",
    [  # pyproject.toml's own settings do not count
        pytest.param(("mypy", "--strict", "--config-file=", "--follow-imports=silent"), id="mypy"),
        pytest.param(("pyright", "--pythonpath", sys.executable), id="pyright"),
    ],
)
def test_a_script_passes(command: tuple[str, ...], tmp_path: Path) -> None:
    pytest.importorskip(command[0])
    assert checked(SCRIPT, tmp_path, *command) == ""
    assert "script.py:34" in checked(SCRIPT.replace("return jacobian(model, x)", "return 1"), tmp_path, *command)
