"""The times of commands are those of processes that end well, over what torch alone takes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import start
from narrowdeep.cli import COMMANDS

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs wait4")


def test_every_command_is_measured() -> None:
    with_runs = set(COMMANDS) - {"report"}  # which needs a run; it loads what train does
    assert {name.removeprefix("narrowdeep ") for name in start.CASES} >= with_runs


def test_the_time_of_a_process_is_its_processor_s(tmp_path: Path) -> None:
    busy = "import time\nwhile time.process_time() < 0.5: pass"
    assert 0.5 <= start.seconds(("-c", busy), tmp_path) < 5
    assert start.seconds(("-c", "import time; time.sleep(1)"), tmp_path) < 0.9
    with pytest.raises(RuntimeError, match="status 3 from"):
        start.seconds(("-c", "raise SystemExit(3)"), tmp_path)


def test_what_takes_longer_than_it_may_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times = {"base": [1.0, 0.9, 1.1], "quick": [1.3, 1.2, 1.5], "slow": [1.8, 1.6, 1.7]}
    monkeypatch.setattr(start, "seconds", lambda program, folder: times[program[0]].pop())
    monkeypatch.setattr(start, "CASES", {name: ((name,), ("base",), 0.5) for name in ("quick", "slow")})
    assert start.main(["--rounds", "3"]) == 1
    assert capsys.readouterr().out.splitlines()[2:] == ["| quick | 1.20 | 0.30 | 0.5 |", "| slow | 1.60 | 0.70 | 0.5 |"]
    times.update(base=[1.0], quick=[1.4])
    assert start.main(["--rounds", "1", "quick"]) == 0
