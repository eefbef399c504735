"""Pages of text: their code blocks and commands, and the short form of a command that a test can run."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

from typer.testing import CliRunner

from narrowdeep.cli import app

ROOT = Path(__file__).parent.parent


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[str]:
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
    "report": [],
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


def run_command(line: str) -> list[str] | None:
    """Run the short form of ``narrowdeep ...``: its arguments; None where it needs data that is not there."""
    arguments = short_form(line)
    if "--data" in arguments and "NARROWDEEP_DATA" not in os.environ:
        return None
    result = CliRunner().invoke(app, arguments)
    failed_record = arguments[0] == "record" and result.exit_code == 1  # at so small a depth it misses its goal
    assert result.exit_code == 0 or failed_record, (line, result.output)
    assert result.stdout, line
    return arguments
