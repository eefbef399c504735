"""Every kernel under Triton's interpreter, in a process of its own (the mode is fixed when Triton is imported)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton")

from tests.gpu.interpreted import CASES, GRAMS, SECONDS


@pytest.fixture(scope="module")
def failures() -> dict[str, str | None]:
    process = subprocess.run(
        [sys.executable, "-m", "tests.gpu.interpreted"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return {line["case"]: line["failure"] for line in map(json.loads, process.stdout.splitlines())}


@pytest.mark.parametrize("case", [str(case) for case in [*CASES, *GRAMS, *SECONDS]])
def test_matches_reference(failures: dict[str, str | None], case: str) -> None:
    assert failures[case] is None
