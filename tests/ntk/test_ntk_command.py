"""``narrowdeep ntk``: the file it writes against the library, its plot, its refusals."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from narrowdeep import DeepNarrowCNN, DeepNarrowMLP
from narrowdeep.cli import app
from narrowdeep.ntk import empirical_ntk, limit_ntk_cnn, limit_ntk_mlp
from narrowdeep.training import save_model


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["ntk", *(str(a) for a in arguments)])


def load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def summary(*arguments: object) -> dict:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return json.loads(result.stdout)


def test_fresh_networks_on_the_arc(tmp_path: Path) -> None:
    out = tmp_path / "k.npz"
    arguments = ("--depth", 20, "--depth", 80, "--draws", 3, "--points", 7, "--dtype", "float64", "--out", out)
    facts = summary(*arguments, "--seed", 5)
    assert (facts["depth"], facts["draws"], facts["file"]) == ([20, 80], 3, str(out))
    assert Path(facts["plot"]).read_bytes().startswith(b"\x89PNG")
    file = load(out)
    assert file["kernel"].shape == (2, 3, 7, 1, 1)
    np.testing.assert_allclose(file["angle"], np.arange(1, 8) * math.pi / 16)
    np.testing.assert_allclose(file["x"], np.stack((np.cos(file["angle"]), np.sin(file["angle"])), 1))
    x, x0 = torch.tensor(file["x"]), torch.tensor(file["x0"])[None]
    np.testing.assert_allclose(file["limit"], limit_ntk_mlp(x0, x)[0].numpy(), rtol=1e-14)
    torch.manual_seed(5)
    fresh = [DeepNarrowMLP(2, 1, depth, dtype=torch.float64) for depth in (20, 80) for _ in range(3)]
    expected = torch.stack([empirical_ntk(model, x0, x)[0] for model in fresh]).unflatten(0, (2, 3))
    np.testing.assert_allclose(file["kernel"], expected.numpy(), rtol=1e-12)
    distance = np.abs(file["kernel"][..., 0, 0] - file["limit"]).max((1, 2)) / file["limit"].max()
    np.testing.assert_allclose(facts["largest_relative_distance_to_limit"], distance)
    assert summary(*arguments, "--seed", 5)["plot"]
    np.testing.assert_array_equal(load(out)["kernel"], file["kernel"])
    summary(*arguments, "--seed", 6)
    assert not np.array_equal(load(out)["kernel"], file["kernel"])


def test_saved_model_and_inputs_of_ones_own(tmp_path: Path) -> None:
    model = DeepNarrowMLP(3, 2, 9, rho=0.7, beta=0.3, dtype=torch.float64)
    save_model(model, tmp_path / "model.safetensors")
    x = torch.rand(5, 3, dtype=torch.float64)
    np.save(tmp_path / "x.npy", x.numpy())
    out = tmp_path / "k.npz"
    facts = summary("--model", tmp_path / "model.safetensors", "--inputs", tmp_path / "x.npy", "--out", out)
    assert facts["plot"] is None
    file = load(out)
    np.testing.assert_allclose(file["kernel"][0, 0], empirical_ntk(model, x).numpy(), rtol=1e-13)
    limit = limit_ntk_mlp(x, rho=0.7, beta=0.3, out_features=2)
    np.testing.assert_allclose(file["limit"], limit.numpy(), rtol=1e-13)


@pytest.mark.parametrize("saved", [True, False])
def test_convolution_networks(saved: bool, tmp_path: Path) -> None:
    x = torch.rand(3, 2, 4, 5, dtype=torch.float64)
    np.save(tmp_path / "x.npy", x.numpy())
    torch.manual_seed(5)
    model = DeepNarrowCNN(2, 2, 6, kernel_size=5, rho=0.7, beta=0.3, dtype=torch.float64)
    if saved:
        save_model(model, tmp_path / "m.safetensors")
        network: tuple = ("--model", tmp_path / "m.safetensors")
    else:
        network = ("--arch", "cnn", "--depth", 6, "--kernel-size", 5, "--rho", 0.7, "--beta", 0.3, "--draws", 1)
        network += ("--out-features", 2, "--dtype", "float64", "--seed", 5)
    facts = summary(*network, "--inputs", tmp_path / "x.npy", "--out", tmp_path / "k.npz")
    assert facts["plot"] is None
    file = load(tmp_path / "k.npz")
    np.testing.assert_allclose(file["kernel"][0, 0], empirical_ntk(model, x).numpy(), rtol=1e-12)
    limit = limit_ntk_cnn(x, rho=0.7, beta=0.3, kernel_size=5, out_channels=2)
    np.testing.assert_allclose(file["limit"], limit.numpy(), rtol=1e-12)


def test_text_and_help(tmp_path: Path) -> None:
    result = run("--depth", 4, "--draws", 1, "--no-plot", "--out", tmp_path / "k.npz")
    assert result.exit_code == 0
    assert "depth 4: largest distance to the limit" in result.stdout
    assert not (tmp_path / "k.png").exists()
    text = run("--help").output
    for option in ("--json", "--seed", "--device", "--dtype", "--model", "--depth", "--inputs"):
        assert option in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--depth", 1), "depth must be at least 2, got 1"),
        (("--device", "tpu"), "device must be cpu, cuda or cuda:N, got 'tpu'"),
        (("--out", "kernels.csv"), "out must end in .npz, got kernels.csv"),
        (("--out", "nowhere/k.npz"), "out must be in a folder that exists"),
        (("--model", "missing.safetensors"), "missing.safetensors"),
        (("--model", "wide.safetensors"), "model must have 2 inputs, got 3: give --inputs"),
        (("--model", "wide.safetensors", "--depth", 3), "depth is the saved model's own"),
        (("--model", "wide.safetensors", "--rho", 0), "rho is the saved model's own"),
        (("--model", "wide.safetensors", "--beta", 0), "beta is the saved model's own"),
        (("--model", "wide.safetensors", "--scale", 0), "scale is the saved model's own"),
        (("--model", "wide.safetensors", "--out-features", 0), "out-features is the saved model's own"),
        (("--model", "wide.safetensors", "--dtype", "float64"), "dtype must be the saved model's, float32, .*float64"),
        (("--out-features", 0), "out_features must be"),
        (("--inputs", "flat.npy", "--points", 9), "points must be left out with --inputs, got 9"),
        (("--inputs", "text.npy"), "inputs must be a .npy file of numbers, got text.npy"),
        (("--inputs", "empty.npy"), "inputs must be a .npy file of numbers, got empty.npy"),
        (("--out", "folder.npz"), "out must be a file, got the folder folder.npz"),
        (("--out", "k" * 252 + ".npz"), "out must be a file that can be written, got kkk.*: File name too long"),
        (("--inputs", "flat.npy"), r"inputs must hold one array \(N, in\), not empty, got \(4,\)"),
        (("--inputs", "nan.npy"), "inputs must hold finite numbers"),
        (("--inputs", "wide.safetensors"), "wide.safetensors|pickle"),
        (("--inputs", "missing.npy"), "missing.npy"),
        (("--arch", "cnn"), "inputs must be given for a CNN"),
        (("--arch", "cnn", "--inputs", "flat.npy"), r"one array \(N, C, H, W\), not empty, got \(4,\)"),
        (("--kernel-size", 3), "kernel-size must be left out without --arch cnn, got 3"),
        (("--model", "wide.safetensors", "--arch", "cnn"), "arch is the saved model's own"),
    ],
)
def test_refusals_are_one_line(arguments, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(DeepNarrowMLP(3, 1, 3), Path("wide.safetensors"))
    np.save("flat.npy", np.ones(4))
    Path("text.npy").write_text("1 2\n3 4\n")
    Path("empty.npy").touch()
    Path("folder.npz").mkdir()
    np.save("nan.npy", np.full((2, 2), np.nan))
    result = run(*arguments)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert re.search(message, line)
    assert not Path("ntk.npz").exists()
    assert not list(Path().glob("*.tmp"))


def test_a_kaiming_model_is_not_compared_with_the_limit(tmp_path: Path) -> None:
    save_model(DeepNarrowMLP(2, 1, 5, init="kaiming", form="plain"), tmp_path / "m.safetensors")
    arguments = ("--model", tmp_path / "m.safetensors", "--points", 5, "--out", tmp_path / "k.npz")
    facts = summary(*arguments)
    assert facts["largest_relative_distance_to_limit"] is None
    assert Path(facts["plot"]).exists()
    assert set(load(tmp_path / "k.npz")) == {"depth", "kernel", "x", "x0", "angle"}
    assert "no limit" in run(*arguments).stdout


def test_a_failed_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    result = run("--depth", 3, "--draws", 1, "--json", "--out", tmp_path / "k.npz")
    assert result.exit_code == 2
    assert result.stderr == f"error: {tmp_path / 'k.npz'} cannot be written: No space left on device\n"
    assert not list(tmp_path.iterdir())
