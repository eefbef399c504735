"""What is loaded, and when: seconds differ from machine to machine, the modules that take them do not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import narrowdeep
from narrowdeep.cli import COMMANDS

SLOW = ("torch", "torch._dynamo", "sympy", "scipy", "sklearn", "pydantic", "rich", "jinja2", "matplotlib")
"""Each takes a good part of a second to load."""


def output(code: str) -> str:
    """What a process prints that runs ``code``."""
    folder = str(Path(narrowdeep.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    ).stdout


def loaded(code: str) -> set[str]:
    """Those of ``SLOW`` that a process has loaded after ``code``."""
    report = f"import json, sys\nprint(json.dumps([name for name in {SLOW!r} if name in sys.modules]))"
    return set(json.loads(output(f"{code}\n{report}").splitlines()[-1]))


def command(*arguments: str) -> str:
    return f"""
import sys
from narrowdeep.__main__ import main
sys.argv[1:] = {list(arguments)!r}
try:
    main()
except SystemExit as done:
    assert not done.code, done.code
"""


def test_the_package_loads_nothing() -> None:
    assert loaded("import narrowdeep; dir(narrowdeep); narrowdeep.__version__") == set()


def test_the_networks_load_torch_alone() -> None:
    code = """
import torch, narrowdeep
model = narrowdeep.DeepNarrowMLP(2, 1, 10, budget="1GiB")
model(torch.rand(3, 2)).sum().backward()
narrowdeep.ntk.limit_ntk_mlp(torch.rand(3, 2))
narrowdeep.memory, narrowdeep.optim
"""
    assert loaded(code) == {"torch"}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]], ids=lambda a: a[0])
def test_help_loads_nothing(arguments: list[str]) -> None:
    assert loaded(command(*arguments)) == set()


def test_no_command_loads_at_its_start_what_it_may_not_need() -> None:
    assert loaded("\n".join(command(name, "--help") for name in COMMANDS)) == {"torch", "pydantic", "rich"}


def test_commands_run_without_the_compiler_of_torch(tmp_path: Path) -> None:
    runs = [
        ("plan",),
        ("plan", "--depth", "10", "--device", "cuda", "--budget", "1GiB"),
        ("profile", "--depth", "10", "--no-eager"),
        ("ntk", "--depth", "10", "--draws", "1", "--points", "3", "--no-plot", "--out", f"{tmp_path}/kernel.npz"),
        ("reproduce",),
        ("record",),
        ("info",),
    ]
    assert loaded("\n".join(command(*run) for run in runs)) == {"torch", "pydantic", "rich"}


def test_names_of_commands_are_completed_at_once() -> None:
    code = """
import os
os.environ.update(_NARROWDEEP_COMPLETE="complete_bash", COMP_WORDS="narrowdeep re", COMP_CWORD="1")
""" + command()
    assert loaded(code) <= {"pydantic"}
    assert output(code).split()[:3] == ["reproduce", "record", "report"]


def test_options_of_a_command_are_completed() -> None:
    code = """
import os
os.environ.update(_NARROWDEEP_COMPLETE="complete_bash", COMP_WORDS="narrowdeep train --ep", COMP_CWORD="2")
""" + command()
    assert output(code).split()[0] == "--epochs"
