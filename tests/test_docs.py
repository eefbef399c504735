"""The docs site: its code runs from the top of a page to its end, its commands run in short form, and it builds."""

from __future__ import annotations

import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import narrowdeep
from tests.pages import ROOT, blocks, commands, run_command

DOCS = ROOT / "docs"
MODULES = (narrowdeep, *(getattr(narrowdeep, name) for name in narrowdeep.__all__ if name.islower()))
WITH_CODE = [page for page in sorted(DOCS.rglob("*.md")) if blocks("(?:python|sh)", page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: str(page.relative_to(DOCS)))
def test_code_of_a_page_runs_from_top_to_bottom(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    if page.name == "gpu.md" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    code = blocks("python", text)
    if importlib.util.find_spec("onnxruntime") is None:
        code = [block for block in code if "import onnxruntime" not in block]
    exec("\n".join(code), {"__name__": "page"})
    for line in commands(text):
        if line.startswith("narrowdeep "):
            run_command(line)


def test_every_public_name_has_examples() -> None:
    """Which ``test_docstring_examples`` runs."""
    for module in MODULES:
        for name in getattr(module, "__all__", ["FusedSGD"]):
            value = getattr(module, name)
            if inspect.isclass(value) or inspect.isfunction(value):
                assert "Examples:\n" in (inspect.getdoc(value) or ""), f"{module.__name__}.{name}"


def test_every_public_name_is_in_the_reference() -> None:
    for module in MODULES:
        page = (DOCS / "api" / f"{module.__name__.rpartition('.')[2]}.md").read_text(encoding="utf-8").splitlines()
        listed = {line.rpartition(".")[2] for line in page if line.startswith("::: ")}
        values = {name: getattr(module, name) for name in module.__all__}
        assert listed == {name for name, value in values.items() if inspect.isclass(value) or inspect.isfunction(value)}


@pytest.mark.skipif(importlib.util.find_spec("mkdocstrings") is None, reason="needs the extra docs")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    reference = (tmp_path / "site" / "api" / "memory.html").read_text(encoding="utf-8")
    assert "<strong>Returns:</strong> a MemoryPlan" in reference
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=\"?https?:", reference)  # nothing comes from elsewhere
