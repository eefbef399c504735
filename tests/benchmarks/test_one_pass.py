"""The comparison of optimizers runs, and its picture and numbers are those of the runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import one_pass


def test_a_small_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, curves = tmp_path / "picture.png", tmp_path / "curves.json"
    settings = ["--depth", "20", "--epochs", "2", "--pool", "4", "--rho", "4", "--passes", "1", "--damping", "0.01"]
    monkeypatch.setattr(sys, "argv", ["one_pass", *settings, "--plot", str(picture), "--json", str(curves)])
    for _ in range(2):  # the second time from the file
        one_pass.main()
        found = json.loads(curves.read_text())
        assert {name: [point[0] for point in curve] for name, curve in found.items()} == {
            "Gauss-Newton": [0, 1],
            "SGD with momentum": [0, 1, 2],
            "SGD": [0, 1, 2],
        }
        starts = {curve[0][2] for curve in found.values()}
        assert len(starts) == 1  # of the same network
        assert found["Gauss-Newton"][1][2] < 0.8 * starts.pop()
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert f"loss {found['Gauss-Newton'][1][2]:.3g} after one pass" in capsys.readouterr().out
