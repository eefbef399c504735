"""``narrowdeep train --config`` and the settings beside a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from narrowdeep import training
from narrowdeep.commands.settings import SETTINGS
from tests.test_cli import run, train

FAST = ["--pool", 4, "--depth", 4, "--batch-size", 500, "--epochs", 2, "--no-plot"]


def test_the_settings_of_a_run_start_it_again(tmp_path: Path) -> None:
    first = train(*FAST, "--scale", 12.5, "--checkpoint", 2, "--out", tmp_path / "a")
    again = train("--config", tmp_path / "a" / SETTINGS, "--no-plot", "--out", tmp_path / "b")
    assert again["config"] == first["config"]
    numbers = [
        [dataclasses.replace(m, seconds=0, samples_per_second=0) for m in training.read_metrics(tmp_path / name)]
        for name in ("a", "b")
    ]
    assert numbers[0] == numbers[1]


def test_a_predicted_step_is_saved_as_a_number(tmp_path: Path) -> None:
    first = train(*FAST, "--lr", "auto", "--out", tmp_path / "a")["config"]
    again = train("--config", tmp_path / "a" / SETTINGS, "--no-plot", "--out", tmp_path / "b")["config"]
    assert (again["lr"], again["momentum"]) == (first["lr"], first["momentum"])


def test_the_command_line_comes_first(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('depth = 5\nbatch-size = 500\npool = 4\nepochs = 1\nform = "plain"\nplot = false\nscale = 7\n')
    config = train("--config", file, "--depth", 3, "--out", tmp_path / "run")["config"]
    assert (config["depth"], config["form"], config["scale"], config["batch_size"]) == (3, "plain", 7.0, 500)
    assert not (tmp_path / "run" / "curves.png").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dept = 5", "dept is no option of this command"),
        ("depth = [5]", "depth must be a number, text, true or false, got [5]"),
        ("depth = ", "cannot be read"),
        ('depth = "many"', "invalid value for '--depth'"),
        ('form = "round"', "invalid value for '--form'"),
        ("config = 1", "config is no option of this command"),
    ],
)
def test_a_bad_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text)
    result = run("train", "--config", file, "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert message.casefold() in " ".join(result.stderr.split()).casefold()
    assert not (tmp_path / "run").exists()


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    result = run("train", "--config", tmp_path / "none.toml", "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "cannot be read" in " ".join(result.stderr.split())
