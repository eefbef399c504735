"""Without the packages of an extra, what needs none of them works, and what does names the extra to install."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import narrowdeep
from narrowdeep.extras import EXTRAS

ROOT = Path(__file__).parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def run(code: str, without: Sequence[str] = tuple(EXTRAS)) -> subprocess.CompletedProcess[str]:
    """Python code in a process in which the packages ``without`` cannot be imported."""
    block = f"import sys\nfor name in {list(without)!r}:\n    sys.modules[name] = None\n"
    folder = str(Path(narrowdeep.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])}
    return subprocess.run([sys.executable, "-c", block + code], capture_output=True, text=True, env=environment)


def extras_of_pyproject() -> dict[str, list[str]]:
    section = PYPROJECT.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    lines = re.findall(r"^(\w+) = \[(.*?)\](?: #.*)?$", section, re.MULTILINE)
    return {name: re.findall(r'"([^"]+)"', packages) for name, packages in lines}


def test_the_table_is_that_of_pyproject() -> None:
    names = {"sklearn": "scikit-learn", "pydantic_core": "pydantic"}
    found = {name: [re.split(r"[>=<;]", p)[0] for p in packages] for name, packages in extras_of_pyproject().items()}
    for module, extra in EXTRAS.items():
        assert names.get(module, module) in found[extra], module


def test_the_core_needs_torch_and_numpy_alone() -> None:
    done = run(
        """
import torch, narrowdeep
from narrowdeep import memory, ntk, optim
model = narrowdeep.DeepNarrowMLP(2, 1, 10)
x = torch.rand(4, 2)
optimizer = optim.FusedSGD(model, lr=model.ntk_lr)
model(x).sum().backward()
assert ntk.empirical_ntk(model, x, reduce="trace").shape == (4, 4)
assert ntk.limit_ntk_mlp(x).shape == (4, 4)
assert ntk.kernel_drift(model, model, x) == 0
assert memory.plan(model, batch_size=4).total > 0
assert narrowdeep.DeepNarrowCNN(1, 2, 5)(torch.rand(3, 1, 4, 4)).shape == (3, 2)
"""
    )
    assert done.returncode == 0, done.stderr


MISSING = {
    "import narrowdeep; narrowdeep.ntk.NTKRegressor": ("sklearn", "ntk"),
    "from narrowdeep.ntk import heavy_ball": ("scipy", "ntk"),
    "from narrowdeep.ntk.regression import NTKRegressor": ("sklearn", "ntk"),
    "from narrowdeep.training import save_model": ("pydantic", "training"),
    "import narrowdeep; narrowdeep.training": ("pydantic", "training"),
    "from narrowdeep.data import load_task; load_task('digits')": ("sklearn", "ntk"),
    "from narrowdeep.cli import app": ("typer", "cli"),
}


def test_what_is_missing_is_named_with_its_extra() -> None:
    code = f"""
for code in {list(MISSING)!r}:
    try:
        exec(code)
    except ImportError as error:
        print(error)
"""
    assert run(code).stdout.splitlines() == [
        f"this needs {package}, which is not installed: pip install 'narrowdeep[{extra}]'"
        for package, extra in MISSING.values()
    ]


def test_model_files_need_training_alone() -> None:
    missing = [name for name, extra in EXTRAS.items() if extra != "training"]
    code = """
import tempfile, torch, narrowdeep
from narrowdeep.training import load_model, save_model
model = narrowdeep.DeepNarrowMLP(2, 1, 10)
with tempfile.TemporaryDirectory() as folder:
    save_model(model, f"{folder}/model.safetensors")
    again = load_model(f"{folder}/model.safetensors")
assert torch.equal(again.hidden_weight, model.hidden_weight)
"""
    done = run(code, missing)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("missing", ["typer", "rich", "scipy"])
def test_a_command_says_it_in_one_line(missing: str, tmp_path: Path) -> None:
    options = ["train", "--depth", "5", "--epochs", "1", "--out", str(tmp_path / "run"), "--no-plot", "--lr", "auto"]
    done = run(f"from narrowdeep.__main__ import main\nsys.argv[1:] = {options!r}\nmain()", [missing])
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        f"error: the command line needs {missing}, which is not installed: pip install 'narrowdeep[cli]'\n"
    )
