"""Records at small sizes: their JSON, and verdicts that follow what was measured."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from narrowdeep.cli import app
from narrowdeep.experiments.records import RECORDS, Check, run_record

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is kept on Linux only")


def small(name: str, **changes: Any) -> dict[str, Any]:
    result = run_record(RECORDS[name], replace(RECORDS[name].settings, **changes))
    assert result["record"] == name
    assert result["depth"] == changes["depth"]
    assert result["peak_bytes"] > 2**26
    assert 0 < result["seconds_per_step"] < result["seconds"]
    assert (result["result"] == "pass") == all(check["passed"] for check in result["checks"].values())
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    return result


def failed(result: dict[str, Any]) -> set[str]:
    return {name for name, check in result["checks"].items() if not check["passed"]}


def test_a_check_compares_and_nan_fails() -> None:
    assert Check(1.0, 1.0).passed
    assert not Check(1.1, 1.0).passed
    assert Check(float("nan"), 1.0).to_dict() == {"measured": None, "at_most": 1.0, "passed": False}


def test_mlp_learns_what_its_kernel_predicts_in_one_pass() -> None:
    result = small("mlp-1m", depth=2000, tolerance=1e-3)
    assert result["result"] == "pass", result
    assert result["parameters"] == 2000 * 20 - 23
    assert result["details"]["loss"] < 1e-8
    assert result["details"]["test_loss"] < 1e-8
    # So much damping leaves more of the residual than that.
    assert failed(small("mlp-1m", depth=2000, tolerance=1e-3, damping=1e-2)) == {"training loss"}
    # At this depth the network is not linear to the record's own tolerance.
    assert "learned function off its own kernel's prediction" in failed(small("mlp-1m", depth=50))
    assert failed(small("mlp-1m", depth=2000, tolerance=1e-3, seconds=0.0)) == {"seconds"}


def test_wide_mlp_steps_within_its_memory() -> None:
    changes = {"depth": 400, "inputs": 5, "outputs": 2, "samples": 16, "chunks": 7}
    result = small("mlp-795", **changes)
    assert result["result"] == "pass", result
    assert result["details"]["loss"] < 0.6 * result["details"]["loss_before"]
    assert result["details"]["eager_bytes"] > 2 * 4 * result["parameters"]
    assert failed(small("mlp-795", **changes, gigabytes=0.01)) == {"peak, GB"}


def test_cnn_steps_as_its_kernel_predicts() -> None:
    result = small("cnn-1m", depth=100, samples=8, tolerance=0.01)
    assert result["result"] == "pass", result
    assert result["parameters"] == 100 * 84 - 2 * 54 - 2
    assert failed(small("cnn-1m", depth=20, samples=8, tolerance=1e-9)) == {"outputs off its own kernel's prediction"}


def test_cnn_within_budgets() -> None:
    settings = {"depth": 600, "samples": 64, "share": 0.8, "repeats": 2}
    result = small("cnn-20k", **settings, slow_down=0.0)
    assert "time over that of a step that saves every state" in failed(result)
    first, quarter = result["details"]["plans"]
    assert first["budget_bytes"] > quarter["budget_bytes"]
    states = 599 * 64 * 3 * 49 * 4
    assert states < result["details"]["eager_activation_bytes"] < 5 * states
    for part, plan in (("activation memory", first), ("with a quarter of the budget: activation memory", quarter)):
        check = result["checks"][f"{part} over that of eager layers"]
        assert check["passed"]
        assert check["measured"] == plan["activation_bytes"] / result["details"]["eager_activation_bytes"]


def test_command_prints_one_line_of_json() -> None:
    listed = CliRunner().invoke(app, ["record"])
    assert json.loads(listed.stdout) == {name: record.title for name, record in RECORDS.items()}
    assert CliRunner().invoke(app, ["record", "--json"]).stdout == listed.stdout
    wrong = CliRunner().invoke(app, ["record", "mlp-2m"])
    assert wrong.exit_code == 2
    assert wrong.stderr.startswith("error: name must be all or one of")
    done = CliRunner().invoke(app, ["record", "mlp-1m", "--depth", "30", "--seed", "3"])
    (line,) = done.stdout.splitlines()
    result = json.loads(line)
    assert (result["depth"], result["seed"], result["result"]) == (30, 3, "fail")
    assert done.exit_code == 1


def test_each_of_all_runs_in_its_own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def run(command: list[str], check: bool) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=-9 if "cnn-1m" in command else 0)

    monkeypatch.setattr(subprocess, "run", run)
    assert CliRunner().invoke(app, ["record", "all", "--seed", "5"]).exit_code != 0
    assert [command[4:] for command in commands] == [[name, "--seed", "5"] for name in RECORDS]
    assert all(command[:4] == [sys.executable, "-m", "narrowdeep.cli", "record"] for command in commands)
