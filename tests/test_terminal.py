"""A terminal shows a bar, in colour unless NO_COLOR is set; anything else a line an epoch and no bar."""

from __future__ import annotations

import re
from pathlib import Path

from typer.testing import CliRunner

from narrowdeep.cli import app

COLOUR = re.compile(r"\x1b\[[0-9;]*(3|4|9)[0-9]")
FAST = ["--pool", "4", "--depth", "4", "--batch-size", "500", "--epochs", "2", "--no-plot"]


def shown(folder: Path, **environment: str) -> str:
    terminal = {"FORCE_COLOR": "1", "TERM": "xterm-256color", **environment}
    result = CliRunner().invoke(app, ["train", *FAST, "--out", str(folder)], env=terminal)
    assert result.exit_code == 0
    assert not COLOUR.search(result.stdout)
    return result.stderr


def test_no_color(tmp_path: Path) -> None:
    assert COLOUR.search(shown(tmp_path / "colours"))
    plain = shown(tmp_path / "none", NO_COLOR="1")
    assert "━" in plain  # the bar is there
    assert not COLOUR.search(plain)


def test_a_log_has_a_line_an_epoch_and_nothing_else(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["train", *FAST, "--out", str(tmp_path / "run")])
    assert [line.partition(":")[0] for line in result.stderr.splitlines()] == ["epoch 1 of 2", "epoch 2 of 2"]
    quiet = CliRunner().invoke(app, ["train", *FAST, "--out", str(tmp_path / "quiet"), "--json"])
    assert quiet.stderr == ""
