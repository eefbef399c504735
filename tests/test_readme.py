"""Every command and block of the README, as pasted, in short form; the commands of docs/, and docstring examples."""

from __future__ import annotations

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
from tests.pages import ROOT, blocks, commands, inline_commands, run_command

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("code", blocks("python", README), ids=lambda code: code.splitlines()[-1][:40])
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
    exec(next(code for code in blocks("python", README) if "np.save" in code), {})
    ran = []
    for line in commands(README):
        if line.startswith("make "):
            continue
        arguments = run_command(line)
        if arguments is not None:
            ran.append(arguments[0])
    assert set(ran) == set(COMMANDS)
    for name in ("ntk.npz", "trained.npz", "cnn.npz", "runs/digits/checkpoint.safetensors"):
        assert Path(name).is_file()
    assert np.load("trained.npz")["kernel"].shape == (1, 1, 200, 200, 1, 1)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
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
        elif words[0] == "narrowdeep":
            own = words[1].startswith("-")
            command = group if own else group.get_command(None, words[1])  # type: ignore[attr-defined]
            assert command is not None, line
            known = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
            assert {word for word in words if word.startswith("--")} <= {*known, "--help"}, line
        elif words[:2] == ["pip", "install"] and "[" in words[-1]:
            for extra in words[-1].rstrip("]").partition("[")[2].split(","):
                assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE), line
    for code in blocks("python", text):
        compile(code, str(page), "exec")


def test_the_two_commands_come_first() -> None:
    assert [line.split("#")[0].strip() for line in commands(README)[:2]] == ["make demo", "make test"]


def test_names_of_the_table_exist() -> None:
    import narrowdeep

    for name in sorted(set(re.findall(r"`(narrowdeep\.\w+)\.(\w+)", README))):
        assert hasattr(getattr(narrowdeep, name[0].partition(".")[2]), name[1]), name


def test_docstring_examples() -> None:
    """They run as written."""
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
    plans = [line for line in commands(README) if line.startswith("narrowdeep plan")]
    assert len(plans) == 2
    for line in plans:
        result = CliRunner().invoke(app, shlex.split(line, comments=True)[1:])
        sizes = dict(re.findall(r"^(total|budget) +([\d.]+) GiB$", result.stdout, re.MULTILINE))
        assert float(sizes["total"]) <= float(sizes["budget"])
