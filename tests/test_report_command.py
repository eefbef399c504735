"""``narrowdeep report``: runs side by side."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from tests.test_cli import refused, run, train

FAST = ["--pool", 4, "--batch-size", 500, "--epochs", 2, "--no-plot"]


def cells(page: str) -> list[list[str]]:
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    return [[cell.strip() for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL)] for row in rows]


def test_the_page_compares_runs(tmp_path: Path) -> None:
    results = {depth: train(*FAST, "--depth", depth, "--out", tmp_path / f"<{depth}>") for depth in (3, 6)}
    out = tmp_path / "page.html"
    result = run("report", *(tmp_path / f"<{depth}>" for depth in results), "--out", out)
    assert (result.exit_code, result.stdout) == (0, f"page: {out}\n")
    page = out.read_text(encoding="utf-8")
    header, *rows = cells(page)
    assert header[:4] == ["run", "depth", "scale", "lr"]  # what differs; the rest is said once
    for row, (depth, result_of) in zip(rows, results.items(), strict=True):
        shown = dict(zip(header, row, strict=True))
        assert shown["run"] == f"{tmp_path}/&lt;{depth}&gt;"
        assert (shown["depth"], shown["epoch"]) == (str(depth), "2 of 2")
        assert shown["test loss"] == f"{result_of['metrics']['test_loss']:.4g}"
        assert shown["accuracy"] == f"{result_of['metrics']['test_accuracy']:.2%}"
    assert "batch_size = 500" in page
    assert page.count("data:image/png;base64,") == 1
    assert not re.search(r"(src|href)=\"?https?:", page)


def test_json_is_all_that_is_printed(tmp_path: Path) -> None:
    trained = train(*FAST, "--depth", 3, "--out", tmp_path / "run")
    result = run("report", tmp_path / "run", "--out", tmp_path / "page.html", "--json")
    found = json.loads(result.stdout)
    assert found["runs"] == [
        {"folder": str(tmp_path / "run"), "config": trained["config"], "metrics": trained["metrics"]}
    ]


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
    assert dict(zip(*cells(page), strict=True))["accuracy"] == "-"
