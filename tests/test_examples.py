"""Every example runs in a short form and leaves its picture; notebooks run from top to bottom and store no output."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

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
    "ddp": ["--depth", "30", "--steps", "5"],
}


def test_every_script_has_a_short_form() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SHORT)


@pytest.mark.parametrize("name", SHORT)
def test_a_script_draws_its_picture(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
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


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.name)
def test_a_notebook_runs_from_top_to_bottom(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    monkeypatch.setenv("MPLBACKEND", "agg")
    names: dict[str, object] = {}
    for cell in cells:
        exec("".join(cell["source"]), names)
    figure, error = names["figure"], names["error"]
    assert isinstance(figure, Figure)
    pyplot.close(figure)
    assert isinstance(error, dict)
    assert error[3000] < error[30]
