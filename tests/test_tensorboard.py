"""``narrowdeep train --tensorboard``: the numbers of metrics.jsonl, each once, also of a run that went on."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from narrowdeep import training
from tests.test_cli import refused, run, train

FAST = ["--pool", 4, "--depth", 4, "--batch-size", 500, "--no-plot"]
# Of what TensorBoard itself imports.
pytestmark = pytest.mark.filterwarnings("default")


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value), as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def expected(folder: Path, field: str) -> list[tuple[int, Any]]:
    return [(m.step, pytest.approx(getattr(m, field), rel=1e-6)) for m in training.read_metrics(folder)]


def test_what_the_run_measured_is_there(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    train(*FAST, "--epochs", 3, "--tensorboard", "--out", tmp_path)
    found = scalars(tmp_path)
    fields = {
        "loss/train": "train_loss",
        "loss/test": "test_loss",
        "accuracy/train": "train_accuracy",
        "accuracy/test": "test_accuracy",
        "samples per second": "samples_per_second",
    }
    assert found == {tag: expected(tmp_path, field) for tag, field in fields.items()}
    assert len(found["loss/test"]) == 3


def test_what_the_kernel_predicted_is_there(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    train("--task", "toy", "--depth", 9, "--optimizer", "gauss-newton", "--no-plot", "--tensorboard", "--out", tmp_path)
    found = scalars(tmp_path)
    assert set(found) == {
        *("loss/train", "loss/test", "loss/train, predicted", "loss/test, predicted", "samples per second")
    }
    assert found["loss/test, predicted"] == expected(tmp_path, "predicted_test_loss")


def test_a_run_that_goes_on_has_every_epoch_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    train(*FAST, "--epochs", 2, "--out", tmp_path)  # without
    train("--resume", "--epochs", 4, "--no-plot", "--tensorboard", "--out", tmp_path)
    assert scalars(tmp_path)["loss/train"] == expected(tmp_path, "train_loss")
    train("--resume", "--epochs", 5, "--no-plot", "--tensorboard", "--out", tmp_path)
    assert scalars(tmp_path)["loss/train"] == expected(tmp_path, "train_loss")
    assert len(training.read_metrics(tmp_path)) == 5


def test_steps_done_again_replace_those_of_before(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    train(*FAST, "--epochs", 1, "--out", tmp_path / "run")
    saved = (tmp_path / "run" / training.CHECKPOINT).read_bytes()
    train("--resume", "--epochs", 3, "--no-plot", "--tensorboard", "--out", tmp_path / "run")
    (tmp_path / "run" / training.CHECKPOINT).write_bytes(saved)  # as a crash after the first epoch leaves it
    train("--resume", "--epochs", 2, "--no-plot", "--tensorboard", "--out", tmp_path / "run")
    found = scalars(tmp_path / "run")["loss/test"]
    assert found == expected(tmp_path / "run", "test_loss")
    assert len(found) == 2


def test_without_the_package_it_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    missing = "tensorboard"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == missing else find(name, *a))
    assert refused("train", *FAST, "--tensorboard", "--out", tmp_path / "run") == (
        "error: tensorboard must be installed: pip install 'narrowdeep[tensorboard]', or leave --tensorboard out"
    )
    assert not (tmp_path / "run").exists()
    assert run("train", *FAST, "--epochs", 1, "--out", tmp_path / "run").exit_code == 0
