"""Every command and block of the README, as pasted, in short form; the commands of docs/, and docstring examples."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from narrowdeep import DeepNarrowMLP
from narrowdeep.cli import COMMANDS, app
from narrowdeep.experiments import EXPERIMENTS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text: str = README) -> list[str]:
    lines = [line for block in blocks("sh", text) for line in block.splitlines()]
    return [line for line in lines if line.strip() and not line.startswith("#")]


def inline_commands(text: str) -> list[str]:
    """Those between backticks in running text."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return [" ".join(span.split()) for span in re.findall(r"`((?:narrowdeep|make|pip|python)\s[^`]+)`", prose)]


SHORT = {
    "train": ["--depth", "6", "--epochs", "1", "--no-plot"],
    "ntk": ["--depth", "5", "--draws", "1"],
    "plan": [],
    "profile": ["--depth", "5", "--no-eager"],
    "reproduce": [],
    "record": ["--depth", "30"],
    "info": [],
}
"""Options that come last, and so count, where a command would take minutes."""


def short_form(line: str) -> list[str]:
    arguments = shlex.split(line, comments=True)
    assert arguments[0] == "narrowdeep"
    options = list(SHORT[arguments[1]])
    if "--model" in arguments:
        options = []  # a saved model has its own depth
    elif "--resume" in arguments:
        options = ["--epochs", "2", "--no-plot"]
    elif "--lr" in arguments:
        options += ["--batch-size", "10000"]
    if "--data" in arguments:
        options += ["--data", os.environ.get("NARROWDEEP_DATA", "")]
    return [*arguments[1:], *options]


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.splitlines()[-1][:40])
def test_python_blocks_define_all_they_use(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(code, names)
    model = names["model"]
    assert isinstance(model, DeepNarrowMLP)
    if "optimizer.step()" in code:
        assert len([line for line in code.splitlines() if line.strip()]) <= 8
        x = torch.rand(500, 2)
        y = x.prod(1, keepdim=True)
        assert (model(x) - y).square().mean() < 0.5 * (y - y.mean()).square().mean()  # better than any constant
    if "kernel" in names:
        kernel = names["kernel"]
        assert isinstance(kernel, torch.Tensor)
        assert (kernel.shape, kernel.dtype) == ((200, 200), torch.float64)
    if "states" in names:
        states, again = names["states"], names["again"]
        assert isinstance(states, torch.Tensor)
        assert isinstance(again, DeepNarrowMLP)
        assert states.shape == (3, 5, 4)
        x = torch.rand(5, 2)
        torch.testing.assert_close(again(x), model(x), rtol=1e-3, atol=1e-3)


def test_shell_blocks_run_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one folder, after the Python blocks, as a reader does."""
    monkeypatch.chdir(tmp_path)
    toy = EXPERIMENTS["fig-4.1"]
    few = replace(toy.laptop, depths=(6, 12), scales=(5.0, 12.0), trials=2, steps=3, samples=6, angles=4)
    monkeypatch.setitem(EXPERIMENTS, "fig-4.1", replace(toy, laptop=few))
    exec(next(code for code in blocks("python") if "np.save" in code), {})
    ran = []
    for line in commands():
        if line.startswith("make "):
            continue
        arguments = short_form(line)
        if "--data" in arguments and "NARROWDEEP_DATA" not in os.environ:
            continue
        result = CliRunner().invoke(app, arguments)
        failed_record = arguments[0] == "record" and result.exit_code == 1  # at so small a depth it misses its goal
        assert result.exit_code == 0 or failed_record, (line, result.output)
        assert result.stdout, line
        ran.append(arguments[0])
    assert set(ran) == set(COMMANDS)
    for name in ("ntk.npz", "trained.npz", "cnn.npz", "runs/digits/checkpoint.safetensors"):
        assert Path(name).is_file()
    assert np.load("trained.npz")["kernel"].shape == (1, 1, 200, 200, 1, 1)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_every_page_parse(page: Path, tmp_path: Path) -> None:
    """Of docs/ and running text: a command and its options exist, a make target too."""
    text = page.read_text(encoding="utf-8")
    group = typer.main.get_command(app)
    for line in [*commands(text), *inline_commands(text)]:
        words = shlex.split(line.split(" # ")[0], comments=True)
        if words[0] == "make":
            if shutil.which("make"):
                make = ["make", "-n", f"VENV={tmp_path}", *words[1:]]
                done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=False)
                assert done.returncode == 0, (line, done.stderr)
        elif words[0] == "narrowdeep" and words[1] not in ("-h", "--help", "--version"):
            command = group.get_command(None, words[1])  # type: ignore[attr-defined]
            assert command is not None, line
            known = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
            assert {word for word in words if word.startswith("--")} <= {*known, "--help"}, line
        elif words[:2] == ["pip", "install"] and "[" in words[-1]:
            extra = words[-1].rstrip("]").partition("[")[2]
            assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE), line
    for code in blocks("python", text):
        compile(code, str(page), "exec")


def test_the_two_commands_come_first() -> None:
    assert [line.split("#")[0].strip() for line in commands()[:2]] == ["make demo", "make test"]


def test_names_of_the_table_exist() -> None:
    import narrowdeep

    for name in sorted(set(re.findall(r"`(narrowdeep\.\w+)\.(\w+)", README))):
        assert hasattr(getattr(narrowdeep, name[0].partition(".")[2]), name[1]), name


def test_docstring_examples() -> None:
    """None of ours is in the form of doctest; one that is must run."""
    import doctest
    import importlib
    import pkgutil

    import narrowdeep

    for module in pkgutil.walk_packages(narrowdeep.__path__, "narrowdeep."):
        if not module.name.endswith(("triton", "_C", "__main__")) and "triton" not in module.name:
            found = doctest.testmod(importlib.import_module(module.name))
            assert found.failed == 0, module.name


@pytest.mark.skipif(sys.platform != "linux", reason="the record needs Linux")
def test_plan_of_the_readme_fits_its_budget() -> None:
    plans = [line for line in commands() if line.startswith("narrowdeep plan")]
    assert len(plans) == 2
    for line in plans:
        result = CliRunner().invoke(app, shlex.split(line, comments=True)[1:])
        sizes = dict(re.findall(r"^(total|budget) +([\d.]+) GiB$", result.stdout, re.MULTILINE))
        assert float(sizes["total"]) <= float(sizes["budget"])
