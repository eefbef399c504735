"""``narrowdeep plan`` and ``narrowdeep profile``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from narrowdeep import DeepNarrowCNN, DeepNarrowMLP, memory
from narrowdeep.cli import app

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="the process's peak can be reset on Linux only")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def refused(*arguments: object) -> str:
    """The one line on standard error of a command that ends with status 2."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("command", ["plan", "profile"])
def test_help(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    for option in ("--budget", "--json", "--seed", "--device", "--dtype"):
        assert option in result.output


def test_plan_of_a_pipeline() -> None:
    """50 layers a rank; a state of 3 words and 6 units, of 40 samples in float64."""
    network = ["plan", "--inputs", 3, "--outputs", 2, "--batch-size", 40, "--dtype", "float64"]
    alone = json.loads(run(*network, "--depth", 52, "--json").stdout)
    assert "sent_bytes" not in alone
    ranks = [*network, "--depth", 202, "--ranks", 4]
    assert json.loads(run(*ranks, "--json").stdout) == alone | {"ranks": 4, "sent_bytes": 3 * 6 * 40 * 8}
    assert run(*ranks).stdout.splitlines()[-1] == "each of 4 ranks sends 5.62 KiB forward and as much backward a step"
    images = json.loads(run("plan", "--arch", "cnn", "--inputs", 1, "--form", "plain", "--ranks", 2, "--json").stdout)
    assert images["sent_bytes"] == 12 * 28 * 28 * 128 * 4
    line = refused("plan", "--depth", 5, "--ranks", 4)
    assert line == "error: ranks must be at most the number of hidden layers, 3, got 4"


def test_plan_is_the_function_s() -> None:
    result = run(
        "plan", "--inputs", 2, "--outputs", 1, "--depth", 700, "--budget", "3MB", "--optimizer", "adam", "--json"
    )
    assert result.exit_code == 0, result.output
    planned = memory.plan(DeepNarrowMLP(2, 1, 700), batch_size=128, budget="3MB", optimizer="adam")
    assert json.loads(result.stdout) == planned.to_dict()
    text = run("plan", "--inputs", 2, "--outputs", 1, "--depth", 700, "--budget", "3MB", "--optimizer", "adam")
    assert text.stdout == f"{planned}\n"


def test_plan_of_images() -> None:
    result = run(
        *("plan", "--arch", "cnn", "--inputs", 1, "--outputs", 1, "--depth", 50, "--image", "7x5", "--kernel-size", 5),
        *("--form", "plain", "--checkpoint", 10, "--dtype", "float64", "--json"),
    )
    assert result.exit_code == 0, result.output
    model = DeepNarrowCNN(1, 1, 50, kernel_size=5, form="plain", checkpoint=10, dtype=torch.float64)
    assert json.loads(result.stdout) == memory.plan(model, batch_size=128, input_shape=(1, 7, 5)).to_dict()


def test_plan_allocates_nothing_and_needs_no_gpu() -> None:
    result = run("plan", "--inputs", 2000, "--outputs", 10, "--depth", 1_000_000, "--device", "cuda", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["bytes"]["parameters"] > 10**13


def test_plan_counts_what_the_gpu_kernels_allocate() -> None:
    network = ("--inputs", 2, "--outputs", 1, "--depth", 200, "--checkpoint", 20, "--device", "cuda", "--json")
    state = 4 * 128 * 4
    workspace = json.loads(run("plan", *network).stdout)["bytes"]["workspace"]
    records = (198 + 8) * 20 * 4  # 16 weights and 4 biases a layer, and 8 spare layers
    assert workspace == (199 + 198) * state + records  # every h and G in one group
    image = ("--arch", "cnn", "--image", "7x7", *network)
    filters = 2 * 198 * 4 * 36 * 4  # for both directions; images that fit a warp need no padded states
    workspace = json.loads(run("plan", *image).stdout)["bytes"]["workspace"]
    assert workspace == 2 * 160 * state * 49 + filters  # 8 segments fit 32 MiB


@on_linux
def test_profile(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = tmp_path / "peak.png"
    arguments = ("profile", "--inputs", 2, "--outputs", 1, "--depth", 20, "--depth", 60, "--plot", figure)
    result = run(*arguments, "--json", "--no-eager", "--checkpoint", 7)
    assert result.exit_code == 0, result.output
    profiles = json.loads(result.stdout)["profiles"]
    assert [(p["depth"], p["plan"]["segment"], p["eager_bytes"]) for p in profiles] == [(20, 7, None), (60, 7, None)]
    assert figure.stat().st_size > 0
    lines = run(*arguments).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["depth", "20", "60"]


@on_linux
def test_profile_runs_what_the_budget_leaves() -> None:
    result = run("profile", "--depth", 100, "--batch-size", 2048, "--budget", "30MB", "--no-eager", "--json")
    assert result.exit_code == 0, result.output
    (entry,) = json.loads(result.stdout)["profiles"]
    assert entry["plan"]["total_bytes"] < 30_000_000
    assert entry["measured_bytes"] < 33_000_000


@pytest.mark.parametrize("command", ["plan", "profile"])
def test_bad_values(command: str) -> None:
    assert "device must be cpu, cuda or cuda:N, got 'tpu'" in refused(command, "--device", "tpu")
    assert "image must be HxW, such as 28x28, got '28'" in refused(command, "--arch", "cnn", "--image", "28")
    assert "budget must be a number and one of the units" in refused(command, "--budget", "much")
    assert "budget must be at least" in refused(command, "--budget", "1kB")
    assert "depth must be at least 2, got 1" in refused(command, "--depth", 1)
    assert "checkpoint must be 'auto', 'none' or an int, got 'some'" in refused(command, "--checkpoint", "some")
    assert "image must be left out without --arch cnn, got 28x28" in refused(command, "--image", "28x28")
    assert "kernel-size must be left out without --arch cnn, got 3" in refused(command, "--kernel-size", 3)


def test_unknown_optimizers_are_refused() -> None:
    names = "sgd, momentum, adam, fused-sgd, fused-momentum"
    assert refused("plan", "--optimizer", "lion") == f"error: optimizer must be one of {names}, got 'lion'"
    assert refused("plan", "--optimizer", "lion", "--budget", "1GiB").endswith("got 'lion'")


def test_plot_into_no_folder(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    message = refused("profile", "--depth", 3, "--no-eager", "--plot", tmp_path / "none" / "peak.png")
    assert "No such file or directory" in message


def test_plots_of_an_unknown_kind_are_refused_before_anything_is_measured(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    message = refused("profile", "--depth", 3, "--plot", tmp_path / "peak.docx")
    assert "plot must end in one of " in message
    assert not list(tmp_path.iterdir())
