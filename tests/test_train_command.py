"""``narrowdeep train`` with other runs, without a terminal or matplotlib, on a full disk, and when it is stopped."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from narrowdeep import files, training
from narrowdeep.cli import app

ROOT = Path(__file__).parent.parent
FAST = ["--task", "digits", "--pool", "4", "--depth", "4", "--batch-size", "500", "--epochs", "2", "--no-plot"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["train", *map(str, arguments)], env={"NARROWDEEP_DATA": None})


def train(*arguments: object) -> dict:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refused(*arguments: object, status: int = 2) -> str:
    result = run(*arguments)
    assert result.exit_code == status, result.output
    (text,) = result.stderr.splitlines()
    assert text.startswith("error: ")
    return text


@contextmanager
def running(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A run in a process of its own that has finished an epoch and goes on for long."""
    command = [sys.executable, "-m", "narrowdeep.cli", "train", *FAST, "--out", str(folder), "--epochs", "100000"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    try:
        deadline = time.monotonic() + 120
        while not training.read_metrics(folder):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.communicate()


def test_two_runs_in_one_folder(tmp_path):
    """The second one is told who works there, and loses nobody's lines."""
    folder = tmp_path / "run"
    with running(folder) as process:
        message = f"{folder} is in use by another run: process {process.pid} on "
        for arguments in ([*FAST, "--out", folder], ["--out", folder, "--resume", "--epochs", 9, "--no-plot"]):
            assert message in refused(*arguments)
        assert process.poll() is None
    epochs = [m.epoch for m in training.read_metrics(folder)]
    assert epochs == list(range(1, len(epochs) + 1))
    # A killed run locks nobody out.
    result = train("--out", folder, "--resume", "--epochs", epochs[-1] + 1, "--no-plot")
    assert result["epoch"] == epochs[-1] + 1
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoint.safetensors", "metrics.jsonl", "settings.toml"]


def test_a_run_that_began_in_the_meantime_is_kept(tmp_path, monkeypatch):
    """Between the first look at the folder and the lock on it."""
    lock, calls = files.folder_lock, []

    def locked(folder: Path):
        if not calls:
            calls.append(folder)
            (folder / "metrics.jsonl").write_text("")
        return lock(folder)

    monkeypatch.setattr(files, "folder_lock", locked)
    assert "out must not hold a run already" in refused(*FAST, "--out", tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_a_line_an_epoch_off_a_terminal(tmp_path):
    result = run(*FAST, "--epochs", 3, "--out", tmp_path)
    assert result.exit_code == 0
    lines = [text for text in result.stderr.splitlines() if " of 3: train loss " in text]
    for text, metrics in zip(lines, training.read_metrics(tmp_path), strict=True):
        assert text == (
            f"epoch {metrics.epoch} of 3: train loss {metrics.train_loss:.4g}, test loss {metrics.test_loss:.4g}, "
            f"accuracy {metrics.test_accuracy:.2%}; {metrics.samples_per_second:.0f} samples/s"
        )
    assert run(*FAST, "--out", tmp_path / "quiet", "--json").stderr == ""


def test_the_line_of_an_epoch_comes_when_it_ends(tmp_path):
    command = [sys.executable, "-m", "narrowdeep.cli", "train", *FAST, "--out", str(tmp_path), "--epochs", "100000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        assert process.stderr is not None
        for epoch in (1, 2, 3):
            assert process.stderr.readline().startswith(f"epoch {epoch} of 100000: train loss ")
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


def test_a_prediction_does_not_outlive_its_number_of_epochs(tmp_path):
    first = train(*FAST, "--lr", "auto", "--out", tmp_path)["config"]
    assert first["predicted_loss"] > 0
    same = train("--out", tmp_path, "--resume", "--no-plot", "--lr", "auto")["config"]
    assert same == first
    longer = train("--out", tmp_path, "--resume", "--no-plot", "--epochs", 3)["config"]
    assert longer == {**first, "epochs": 3, "predicted_loss": None}
    again = train("--out", tmp_path, "--resume", "--no-plot", "--lr", "auto", "--epochs", 4)["config"]
    assert again == {**first, "epochs": 4, "predicted_loss": None}
    train(*FAST, "--lr", 1e-5, "--out", tmp_path / "given")
    assert "lr must be 1e-05 as in the run" in refused("--out", tmp_path / "given", "--resume", "--lr", "auto")


def test_gauss_newton(tmp_path):
    arguments = ["--optimizer", "gauss-newton", "--depth", 200, "--scale", 1e6, "--pool", 4]
    arguments += ["--no-plot", "--out", tmp_path]
    first = train(*arguments)
    assert (first["config"]["epochs"], first["config"]["damping"], first["step"]) == (1, 1e-4, 1)
    train(*arguments[:-1], tmp_path / "other", "--damping", 0.01)
    assert first["metrics"]["train_loss"] == pytest.approx(first["metrics"]["predicted_train_loss"], rel=0.05)
    result = run("--resume", "--epochs", 2, "--out", tmp_path / "other", "--no-plot")
    assert result.exit_code == 0, result.output
    assert re.search(r"epoch 2 of 2: train loss .*; the kernel predicted \S+, \S+, \d+\.\d+%;", result.stderr)
    assert len(training.read_metrics(tmp_path / "other")) == 2


@pytest.mark.parametrize(("option", "value"), [("lr", "auto"), ("tau", 0.1), ("momentum", 0.5), ("decay", "linear")])
def test_gauss_newton_takes_no_step_size(tmp_path, option, value):
    text = refused("--optimizer", "gauss-newton", f"--{option}", value, "--out", tmp_path)
    assert text == f"error: {option} is not used by optimizer 'gauss-newton': leave it out, got {value}"
    assert "damping must be left out for optimizer 'sgd'" in refused(*FAST, "--damping", 1, "--out", tmp_path)


def test_a_singular_system_is_one_line(tmp_path):
    arguments = ["--optimizer", "gauss-newton", "--damping", 0, "--depth", 4, "--pool", 4, "--no-plot", "--json"]
    text = refused(*arguments, "--out", tmp_path, status=1)
    assert "numerically singular with damping=0: the smallest that works is about damping=" in text


def test_without_matplotlib_the_plot_is_left_out(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find(name, *a))
    result = run(*FAST[:-1], "--out", tmp_path)
    assert result.exit_code == 0
    assert "the plot is left out: it needs matplotlib" in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.safetensors", "metrics.jsonl", "settings.toml"]


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.Log, "sync", lambda _: None)
    monkeypatch.setattr(os, "write", full)
    text = refused(*FAST, "--out", tmp_path, "--json", status=1)
    assert text == f"error: {tmp_path / 'metrics.jsonl'} cannot be written: No space left on device"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.safetensors", "metrics.jsonl", "settings.toml"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr", "1e400"], "lr must be finite and positive, got inf"),
        (["--scale", "1e400"], "scale must "),
        (["--checkpoint", str(2**63)], "checkpoint must be below 2**63 in size, got 9223372036854775808"),
        (["--checkpoint", "9" * 400], "checkpoint must be below 2**63 in size, got 99999"),
        (["--rho", "inf"], "rho must be finite and not negative, got inf"),
        (["--seed", str(2**63)], "seed must be "),
        (["--depth", "9" * 400], "depth must be below 2"),
        (["--save-every", "inf"], "save-every must be finite, got inf"),
        (["--budget", "9" * 30], "budget must be at most 9223372036854775807 bytes"),
    ],
)
def test_numbers_that_are_too_large(tmp_path, arguments, message):
    assert message in refused(*FAST, *arguments, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_budget_changes_what_is_kept_and_no_number(tmp_path):
    """Parameters, their gradients and their momentum, and what steps of 500 samples take beside."""
    wide = [*FAST, "--depth", 150, "--epochs", 1]
    free = train(*wide, "--out", tmp_path / "free")
    assert free["config"]["budget"] is None
    message = refused(*wide, "--out", tmp_path / "run", "--budget", "1kB")
    found = re.search(r"budget must be at least \S+ \S+ \((\d+) bytes\) for this step, got 1000 B", message)
    assert found is not None, message
    assert not (tmp_path / "run").exists()
    least = int(found[1])
    width = 4 + 1 + 10  # images of 8x8, pooled
    parameters = 4 * (width * 5 + 148 * width * (width + 1) + 10 * (width + 1))
    assert 3 * parameters < least < 3 * parameters + 150 * 4 * width * 500
    assert "budget must be at least" in refused(*wide, "--out", tmp_path / "run", "--budget", least - 1)
    kept = train(*wide, "--out", tmp_path / "run", "--budget", least)
    assert kept["config"] == {**free["config"], "budget": least}
    for name in ("train_loss", "test_loss", "test_accuracy"):
        assert kept["metrics"][name] == pytest.approx(free["metrics"][name], rel=1e-5)
    model = training.load_model(tmp_path / "run" / "checkpoint.safetensors")
    assert (model.budget, model.optimizer) == (least, "momentum")
    resumed = ["--out", tmp_path / "run", "--resume", "--no-plot", "--epochs", 2]
    assert f"budget must be {least} as in the run" in refused(*resumed, "--budget", "1GiB")
    assert train(*resumed, "--budget", least)["epoch"] == 2


def test_a_budget_needs_checkpoint_auto(tmp_path):
    message = refused(*FAST, "--out", tmp_path / "run", "--budget", "1GB", "--checkpoint", 5)
    assert "budget needs checkpoint 'auto', got 5" in message


@pytest.mark.parametrize("after", [0.1, 0.4, 0.8, 1.2, 1.6, 2.0])
def test_ctrl_c_in_the_first_seconds_is_one_line(tmp_path, after):
    """While Python, torch and the data are loaded."""
    code = (
        "import os, signal, threading\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"threading.Timer({after}, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "from narrowdeep.__main__ import main\n"
        "main()"
    )
    command = [sys.executable, "-c", code, *["train", *FAST, "--epochs", "100000", "--out", str(tmp_path)]]
    result = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120
    )
    assert result.returncode == 130, result.stderr
    assert "Traceback" not in result.stderr
    if "steps are kept" not in result.stdout:  # training had not begun
        assert re.fullmatch(r"stopped\n", result.stderr)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
