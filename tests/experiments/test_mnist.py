"""Figure 4.2 and table 4.1 at small sizes: on MNIST where its files are at hand."""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from narrowdeep.data import load_task
from narrowdeep.experiments import EXPERIMENTS, Context, Store, Verdict, reproduce
from narrowdeep.experiments.mnist_initialisation import InitialisationSettings
from narrowdeep.experiments.mnist_table import (
    TableSettings,
    constant_loss,
    kernel_accuracy,
    mnist_config,
    subset,
    train_to_end,
)
from narrowdeep.training import Trainer

pytest.importorskip("matplotlib")

needs_mnist = pytest.mark.skipif("NARROWDEEP_DATA" not in os.environ, reason="NARROWDEEP_DATA names no folder")


def _reproduce(name: str, settings: Any, out: Path) -> dict[str, Any]:
    return reproduce(replace(EXPERIMENTS[name], laptop=settings), out, data=Path(os.environ["NARROWDEEP_DATA"]))


def _small_table() -> TableSettings:
    settings = EXPERIMENTS["table-4.1"].laptop
    rows = [replace(r, depth=30, images=192, batch_size=32, epochs=12, tolerance=0.35) for r in settings.rows]
    return TableSettings(rows=tuple(rows), probe=20, test_images=200, kernel_images=192)


def _table_verdict(settings: TableSettings, accuracies: dict[str, float], template: dict[str, Any]) -> Verdict:
    result = {name: dict(template, accuracy=accuracy) for name, accuracy in accuracies.items()}
    return EXPERIMENTS["table-4.1"].verdict(settings, result)


def test_the_table_is_judged_by_test_accuracy_beside_the_thesis() -> None:
    settings = EXPERIMENTS["table-4.1"].laptop
    template = {
        "test_images": 10,
        "images": 20,
        "as_printed": False,
        "tau": 0.1,
        "momentum": 0.9,
        "kernel_accuracy": 0.6,
    }
    good = {"digits-mlp": 0.96, "digits-cnn": 0.93, "binary-cnn": 0.9887}
    assert _table_verdict(settings, good, template).reproduced
    good["digits-cnn"] = 0.56  # judged by what the kernel predicts
    assert _table_verdict(settings, good, template).reproduced
    for name in good:
        verdict = _table_verdict(settings, good | {name: good[name] - 0.05}, template)
        assert not verdict.reproduced
        assert verdict.text.count("not reached") == 1


def test_the_full_table_has_the_thesiss_own_settings() -> None:
    rows = {row.name: row for row in EXPERIMENTS["table-4.1"].full.rows}
    printed = {  # L, C_L, rho, learning rate, epochs, accuracy: table 4.1
        "digits-mlp": (4000, 4.0, 1.0, 1e-5, 1500, 0.9748),
        "digits-cnn": (4000, 4.0, 3**-0.5, 1e-5, 2000, 0.9402),
        "binary-cnn": (20000, 20.0, 3**-0.5, 1e-8, 1000, 0.9887),
    }
    for name, values in printed.items():
        r = rows[name]
        assert (r.depth, r.scale, r.rho, r.lr, r.epochs, r.thesis_accuracy) == values
        assert r.images is None


@needs_mnist
def test_table_at_small_depth(tmp_path: Path) -> None:
    settings = _small_table()
    record = _reproduce("table-4.1", settings, tmp_path)
    assert record["verdict"]["reproduced"], record["verdict"]["text"]
    for row in settings.rows:
        found = record["result"][row.name]
        assert found["steps"] == 12 * 6
        assert found["train_losses"][-1] < 0.95 * found["train_losses"][0], row.name
        assert found["tau"] == pytest.approx(found["lr"] * row.depth * row.scale**2)
        assert found["tau"] < found["largest_tau"]
    again = _reproduce("table-4.1", settings, tmp_path / "again")
    for name, found in record["result"].items():
        other = again["result"][name]
        assert other.pop("training_seconds") > 0
        assert {k: v for k, v in found.items() if k != "training_seconds"} == other


@needs_mnist
def test_a_learning_rate_of_the_thesis_is_taken_where_it_is_stable(tmp_path: Path) -> None:
    row = replace(_small_table().rows[2], depth=10, scale=10.0, epochs=1)
    rates = {"stable": 1e-5, "unstable": 1e-2}  # tau = 0.01 and 10
    rows = tuple(replace(row, name=name, lr=lr) for name, lr in rates.items())
    result = _reproduce("table-4.1", TableSettings(rows=rows, probe=4, test_images=8, kernel_images=8), tmp_path)[
        "result"
    ]
    assert result["stable"]["as_printed"]
    assert (result["stable"]["lr"], result["stable"]["momentum"]) == (1e-5, 0.0)
    assert not result["unstable"]["as_printed"]
    assert result["unstable"]["tau"] < result["unstable"]["largest_tau"]


@needs_mnist
def test_a_row_that_was_stopped_goes_on_with_the_same_numbers(tmp_path: Path, monkeypatch: Any) -> None:
    row = replace(_small_table().rows[2], depth=10, epochs=3)
    context = Context(seed=0, store=Store(tmp_path, {}))
    task = load_task(row.task, data=os.environ["NARROWDEEP_DATA"], pool=row.pool)
    task = subset(task, images=64, test_images=8, seed=0)
    config = replace(mnist_config(row, row.rho, row.task, row.arch, row.pool, context), lr=1e-6)
    whole = train_to_end(config, task, tmp_path / "whole", context, "whole")

    step, steps = Trainer.step, 0

    def stop_in_the_fourth(self: Trainer) -> Any:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Trainer, "step", stop_in_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        train_to_end(config, task, tmp_path / "stopped", context, "stopped")
    monkeypatch.undo()
    resumed = train_to_end(config, task, tmp_path / "stopped", context, "resumed")
    assert resumed.step_count == whole.step_count == 6
    for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


@needs_mnist
def test_initialisations_at_small_depth(tmp_path: Path) -> None:
    settings = InitialisationSettings(
        pools=(4, 4), rhos=(14.0, 4.0), images=128, batch_size=128, epochs=30, probe=4, depth=30, rates=(1e-3, 1e3)
    )
    record = _reproduce("fig-4.2", settings, tmp_path)
    for arch in ("mlp", "cnn"):
        found = record["result"][arch]
        curves = found["curves"]
        assert len(curves["ntk"]["losses"]) == 30
        assert curves["ntk"]["losses"][-1] < found["constant_loss"]
        assert curves["1000"]["diverged"]
        assert not curves["0.001"]["diverged"]

    def verdict(change: Any) -> Verdict:
        result = copy.deepcopy(record["result"])
        for arch in ("mlp", "cnn"):
            result[arch]["curves"]["ntk"]["losses"][-1] = 0.1
            result[arch]["curves"]["0.001"]["losses"][-1] = result[arch]["constant_loss"]
        change(result)
        return EXPERIMENTS["fig-4.2"].verdict(settings, result)

    def he_trains(result: dict[str, Any]) -> None:
        result["cnn"]["curves"]["0.001"]["losses"][-1] = 0.1

    def ours_overflows(result: dict[str, Any]) -> None:
        result["mlp"]["curves"]["ntk"]["diverged"] = True

    assert verdict(lambda result: None).reproduced
    assert not verdict(he_trains).reproduced
    assert not verdict(ours_overflows).reproduced


@needs_mnist
def test_the_best_constant_loses_as_much_as_said() -> None:
    task = load_task("mnist01", data=os.environ["NARROWDEEP_DATA"], pool=4)
    share = task.y_train.double().mean().item()
    assert constant_loss(task) == pytest.approx(share * (1 - share) / 2)


def test_the_kernel_learns_what_it_can_in_its_time() -> None:
    digits = load_task("digits")
    digits = replace(digits, x_train=digits.x_train[:200], y_train=digits.y_train[:200])
    row = replace(EXPERIMENTS["table-4.1"].laptop.rows[0], rho=16.0)
    early, late = (kernel_accuracy(row, digits, time=t, images=200) for t in (0.01, 1e4))
    assert early < 0.6
    assert late > 0.8
