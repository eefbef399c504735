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


def loaded(code: str) -> set[str]:
    """Those of ``SLOW`` that a process has loaded after ``code``."""
    report = f"import json, sys\nprint(json.dumps([name for name in {SLOW!r} if name in sys.modules]))"
    folder = str(Path(narrowdeep.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True, env=environment
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


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
    assert loaded("\n".join(command(name, "--help") for name in COMMANDS)) == {"torch", "pydantic", "rich", "jinja2"}
