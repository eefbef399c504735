"""Every example runs in a short form and leaves its picture; notebooks run from top to bottom and store no output."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.image import imread

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"

SHORT = {
    "authors_toy": ["--layers", "30", "--steps", "5"],
    "training_loop": ["--depth", "30", "--steps", "5"],
    "ntk_regression": ["--samples", "10"],
    "compare_with_kernel": ["--depth", "30", "--steps", "5"],
    "deep_cnn": ["--depth", "20", "--epochs", "1"],
    "digits_in_one_pass": ["--depth", "100"],
    "lightning_module": ["--depth", "30", "--epochs", "1"],
    "ddp": ["--depth", "30", "--steps", "5"],
}


def test_every_script_has_a_short_form() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SHORT)


@pytest.mark.filterwarnings("default")  # of Lightning
@pytest.mark.parametrize("name", SHORT)
def test_a_script_draws_its_picture(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name.startswith("lightning"):
        pytest.importorskip("lightning")
    picture = tmp_path / "picture.png"
    monkeypatch.setattr(sys, "argv", [name, *SHORT[name], "--out", str(picture)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    pixels = imread(picture)
    assert pixels.shape[0] > 300
    assert pixels.std() > 0.05  # something is drawn
    assert capsys.readouterr().out


def test_the_network_does_what_its_kernel_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--depth", "300", "--steps", "50", "--out", str(tmp_path / "picture.png")])
    runpy.run_path(str(EXAMPLES / "compare_with_kernel.py"), run_name="__main__")
    words = capsys.readouterr().out.replace(",", "").replace(";", "").split()
    last, predicted = float(words[2]), float(words[4])
    assert last == pytest.approx(predicted, rel=0.02)


def test_the_authors_network_and_ours_take_the_same_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--layers", "40", "--steps", "8", "--out", str(tmp_path / "picture.png")])
    runpy.run_path(str(EXAMPLES / "authors_toy.py"), run_name="__main__")
    difference = capsys.readouterr().out.partition("more than ")[2].partition(";")[0]
    assert float(difference) < 1e-11


def test_digits_are_learned_in_one_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--depth", "300", "--out", str(tmp_path / "picture.png")])
    runpy.run_path(str(EXAMPLES / "digits_in_one_pass.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert float(said.partition("%")[0]) > 95
    ((after, predicted),) = re.findall(r"before it, (\S+) after, (\S+) predicted", said)
    assert float(after) == pytest.approx(float(predicted), rel=0.05)


def test_an_example_says_what_it_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning", None)
    with pytest.raises(SystemExit, match="needs lightning, which is not installed: pip install lightning"):
        runpy.run_path(str(EXAMPLES / "lightning_module.py"), run_name="__main__")


def the_kernel_nears_its_limit(names: dict[str, Any]) -> bool:
    return names["error"][3000] < names["error"][30]


def training_goes_as_foreseen(names: dict[str, Any]) -> bool:
    ends = names["ends"]
    one, heavy, descent = (ends[name] for name in ("one step of Gauss-Newton", "heavy ball", "descent"))
    assert heavy[0] == pytest.approx(heavy[1], rel=0.05)
    assert descent[0] == pytest.approx(descent[1], rel=0.05)
    assert one[0] == pytest.approx(one[1], rel=0.5)  # near the rounding of float32
    return one[0] < 0.1 * heavy[0] < 0.01 * descent[0]


NOTEBOOKS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "kernels": the_kernel_nears_its_limit,
    "training": training_goes_as_foreseen,
}


def test_every_notebook_has_a_claim() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.ipynb")} == set(NOTEBOOKS)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_from_top_to_bottom(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = EXAMPLES / f"{name}.ipynb"
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    monkeypatch.setenv("MPLBACKEND", "agg")
    names: dict[str, Any] = {}
    for cell in cells:
        exec("".join(cell["source"]), names)
    assert isinstance(names["figure"], Figure)
    pyplot.close(names["figure"])
    assert NOTEBOOKS[name](names)
