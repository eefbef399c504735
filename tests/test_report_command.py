"""``narrowdeep report``: runs side by side."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.func import functional_call, jacrev, vmap

from narrowdeep import DeepNarrowMLP, training
from narrowdeep.commands.kernels import run_kernels
from narrowdeep.data import load_task
from tests.test_cli import refused, run, train

FAST = ["--pool", 4, "--batch-size", 500, "--epochs", 2, "--no-plot"]


def tables(page: str) -> list[dict[str, dict[str, str]]]:
    """Of each table: run -> column -> what is in the cell."""
    found = []
    for table in re.findall(r"<table>(.*?)</table>", page, re.DOTALL):
        rows = re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
        cells = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL) for row in rows]
        header, *lines = [[cell.strip() for cell in row] for row in cells]
        found.append({line[0]: dict(zip(header, line, strict=True)) for line in lines})
    return found


def test_the_page_compares_runs(tmp_path: Path) -> None:
    trained = {depth: train(*FAST, "--depth", depth, "--out", tmp_path / f"<{depth}>") for depth in (3, 6)}
    out = tmp_path / "page.html"
    result = run("report", *(tmp_path / f"<{depth}>" for depth in trained), "--out", out)
    assert (result.exit_code, result.stdout) == (0, f"page: {out}\n")
    page = out.read_text(encoding="utf-8")
    results, settings, kernels = tables(page)
    names = [f"{tmp_path}/&lt;{depth}&gt;" for depth in trained]
    assert list(results) == list(settings) == list(kernels) == names
    for name, (depth, result_of) in zip(names, trained.items(), strict=True):
        assert list(settings[name]) == ["run", "depth", "scale", "lr"]  # what differs; the rest is said once
        assert settings[name]["depth"] == str(depth)
        assert results[name]["epoch"] == "2 of 2"
        assert results[name]["test loss"] == f"{result_of['metrics']['test_loss']:.4g}"
        assert results[name]["accuracy"] == f"{result_of['metrics']['test_accuracy']:.2%}"
    assert "batch_size = 500" in page
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r"(src|href)=\"?https?:", page)


def eager_kernel(model: DeepNarrowMLP, x: torch.Tensor) -> np.ndarray:
    """(N, N): scaled and averaged over outputs, from one Jacobian a sample of eager layers in float64."""
    layers = model.to_sequential().double()
    parameters = dict(layers.named_parameters())
    function = lambda p, sample: functional_call(layers, p, sample)  # noqa: E731
    jacobian = vmap(jacrev(function), (None, 0))(parameters, x)
    flat = torch.cat([part.flatten(2) for part in jacobian.values()], 2)
    return torch.einsum("iof,jof->ij", flat, flat).detach().numpy() / model.depth / model.scale**2 / flat.shape[1]


def test_kernels_are_those_of_the_networks(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = ["--depth", 5, "--scale", 3, "--dtype", "float64", "--form", "plain", "--decay", "linear"]
    settings = [*FAST, *options, "--momentum", 0.5, "--tau", 0.01, "--out", folder]
    train(*settings)
    found = run_kernels(folder)
    config = training.read_config(folder / training.CHECKPOINT)
    task = load_task("digits", pool=4, dtype=torch.float64)
    chosen = torch.randperm(len(task.x_train), generator=torch.Generator().manual_seed(0))[:128]
    x, y = task.x_train[chosen], task.y_train[chosen]
    drawn, trained = training.build_model(config, task), training.load_model(folder / training.CHECKPOINT)
    assert isinstance(drawn, DeepNarrowMLP)
    assert isinstance(trained, DeepNarrowMLP)
    before, now = eager_kernel(drawn, x), eager_kernel(trained, x)
    for values, kernel in ((found.before, before), (found.now, now)):
        expected = np.linalg.eigvalsh(kernel)[::-1] / 128
        np.testing.assert_allclose(values, expected, rtol=1e-9, atol=1e-12 * expected[0])
    assert found.moved == pytest.approx(np.linalg.norm(now - before) / np.linalg.norm(before), rel=1e-6)
    taus = [0.01 * (1 - i / 6) for i in range(6)]  # two epochs of three steps
    assert found.time == pytest.approx(sum(taus) / (1 - 0.5))
    with torch.no_grad():
        residual, velocity = (drawn(x) - y).numpy(), 0.0
        for tau in taus:
            velocity = 0.5 * velocity + residual
            residual = residual - tau / 128 * before @ velocity
        assert found.predicted == pytest.approx(np.square(residual).sum() / 256, rel=1e-9)
        assert found.loss == pytest.approx(float((trained(x) - y).square().sum()) / 256)


def test_a_run_of_one_pass_takes_no_kernel_time(tmp_path: Path) -> None:
    train("--task", "toy", "--depth", 9, "--optimizer", "gauss-newton", "--no-plot", "--out", tmp_path / "run")
    found = run_kernels(tmp_path / "run")
    assert (found.time, found.predicted) == (None, None)
    assert 0 < found.moved < 1
    assert run("report", tmp_path / "run", "--out", tmp_path / "page.html").exit_code == 0
    results, kernels = tables((tmp_path / "page.html").read_text(encoding="utf-8"))  # no setting differs
    assert kernels[str(tmp_path / "run")]["above 1/t"] == "-"
    assert results[str(tmp_path / "run")]["epoch"] == "1 of 1"


def test_kernels_that_cannot_be_computed_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(*FAST, "--depth", 3, "--out", tmp_path / "run")

    def gone(*arguments: object, **options: object) -> None:
        raise FileNotFoundError("data must be the folder that holds MNIST/raw")

    monkeypatch.setattr("narrowdeep.commands.kernels.load_task", gone)
    result = run("report", tmp_path / "run", "--out", tmp_path / "page.html")
    reason = "data must be the folder that holds MNIST/raw"
    assert (result.exit_code, result.stderr) == (0, f"the kernels of {tmp_path / 'run'} are left out: {reason}\n")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Tangent kernels" not in page
    assert page.count("data:image/png;base64,") == 1


def test_json_is_all_that_is_printed(tmp_path: Path) -> None:
    trained = train(*FAST, "--depth", 3, "--out", tmp_path / "run")
    expected = {"folder": str(tmp_path / "run"), "config": trained["config"], "metrics": trained["metrics"]}
    arguments = ["report", tmp_path / "run", "--out", tmp_path / "page.html", "--json"]
    assert json.loads(run(*arguments, "--no-kernels").stdout)["runs"] == [{**expected, "kernels": None}]
    (found,) = json.loads(run(*arguments).stdout)["runs"]
    kernels = found.pop("kernels")
    assert found == expected
    assert kernels == run_kernels(tmp_path / "run").to_dict()


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    assert "checkpoint.safetensors" in refused("report", tmp_path, "--out", tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_there_is_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train("--task", "toy", "--depth", 3, "--epochs", 1, "--no-plot", "--out", tmp_path / "run")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find(name, *a))
    result = run("report", tmp_path / "run", "--out", tmp_path / "page.html")
    assert result.exit_code == 0
    assert result.stderr == "the picture is left out: it needs matplotlib (pip install 'narrowdeep[plots]')\n"
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "data:image" not in page
    assert tables(page)[0][str(tmp_path / "run")]["accuracy"] == "-"
