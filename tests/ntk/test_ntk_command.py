"""``narrowdeep ntk``: the file it writes against the library, its plot, its refusals."""

from __future__ import annotations

import json
import math
import os
import re
import struct
import sys
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


def header(path: str, text: str) -> None:
    """A .npy file with this header and 64 bytes of numbers."""
    Path(path).write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + bytes(64))


@pytest.mark.parametrize("dtype", [">f8", ">f4", np.longdouble, np.float16, ">i2", np.uint8, np.bool_])
def test_inputs_of_any_real_type(dtype: str, tmp_path: Path) -> None:
    x = np.array([[0, 1], [1, 1], [1, 0]])
    np.save(tmp_path / "x.npy", x.astype(dtype))
    out = tmp_path / "k.npz"
    summary("--inputs", tmp_path / "x.npy", "--depth", 5, "--draws", 1, "--dtype", "float64", "--seed", 2, "--out", out)
    torch.manual_seed(2)
    model = DeepNarrowMLP(2, 1, 5, dtype=torch.float64)
    expected = empirical_ntk(model, torch.tensor(x, dtype=torch.float64))
    np.testing.assert_allclose(load(out)["kernel"][0, 0], expected.numpy(), rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("1e300.npy", r"inputs must hold numbers that float32 can hold, got 1e\+300 at \[1, 0\] in 1e300.npy"),
        ("1e30.npy", r"the kernel must be finite, got \S+: the inputs \(the largest is 1e\+30\), scale, rho or beta"),
        ("complex.npy", "inputs must hold real numbers, got complex128 in complex.npy"),
        ("objects.npy", "inputs must be a .npy file of numbers, got objects.npy: .*Python objects"),
        ("long.npy", "got long.npy: mmap length is greater than file size"),
        ("longer.npy", "inputs must be a .npy file of numbers, got longer.npy: "),
        ("negative.npy", "inputs must be a .npy file of numbers, got negative.npy: "),
        ("nested.npy", "inputs must be a .npy file of numbers, got nested.npy: "),
        ("broken.npy", "inputs must be a .npy file of numbers, got broken.npy: "),
        ("fifo.npy", "got fifo.npy, which is not a regular file"),
        ("folder.npy", "got folder.npy, which is not a regular file"),
    ],
)
def test_inputs_that_are_no_numbers(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for value in (1e300, 1e30):
        np.save(f"{value:g}.npy".replace("+", ""), np.array([[1, 2], [value, 0]]))
    np.save("complex.npy", np.ones((2, 2), complex))
    np.save("objects.npy", np.array([[1, None]], dtype=object), allow_pickle=True)
    for path, shape in {"long": "1000000000000, 2", "longer": f"1{'0' * 400}, 2", "negative": "-4, 2"}.items():
        header(f"{path}.npy", f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({shape}), }}\n")
    header("nested.npy", "(" * 9000)
    header("broken.npy", "{[]: 1}\n")
    os.mkfifo("fifo.npy")
    Path("folder.npy").mkdir()
    result = run("--inputs", name, "--depth", 5, "--draws", 1)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert re.search(message, line)
    assert not Path("ntk.npz").exists()


def test_no_file_but_out_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mine = {name: Path(name) for name in ("results.npz.tmp", "results.png.tmp", "elsewhere")}
    for path in mine.values():
        path.write_text("mine")
    assert run("--out", "results.npz", "--depth", 1).exit_code == 2
    assert all(path.read_text() == "mine" for path in mine.values())
    Path("results.npz").symlink_to("elsewhere")
    before = os.umask(0o027)
    try:
        assert run("--out", "results.npz", "--depth", 3, "--draws", 1, "--points", 3).exit_code == 0
    finally:
        os.umask(before)
    assert all(path.read_text() == "mine" for path in mine.values())
    for name in ("results.npz", "results.png"):
        assert not Path(name).is_symlink()
        assert Path(name).stat().st_mode & 0o777 == 0o640
    assert sorted(p.name for p in Path().iterdir()) == sorted([*mine, "results.npz", "results.png"])


def test_without_matplotlib_there_is_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("--depth", 3, "--draws", 1, "--json", "--out", tmp_path / "k.npz")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["plot"] is None
    assert result.stderr == "the plot is left out: it needs matplotlib (pip install 'narrowdeep[plots]')\n"
    assert [p.name for p in tmp_path.iterdir()] == ["k.npz"]
