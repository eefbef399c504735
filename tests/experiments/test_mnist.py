"""Figure 4.2 and table 4.1 at small sizes: on MNIST where its files are at hand."""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from narrowdeep import DeepNarrowMLP
from narrowdeep.data import load_task
from narrowdeep.experiments import EXPERIMENTS, Context, Store, Verdict, mnist_table, reproduce
from narrowdeep.experiments.mnist_initialisation import InitialisationSettings
from narrowdeep.experiments.mnist_table import TableSettings, constant_loss, subset
from narrowdeep.ntk import empirical_ntk

pytest.importorskip("matplotlib")

needs_mnist = pytest.mark.skipif("NARROWDEEP_DATA" not in os.environ, reason="NARROWDEEP_DATA names no folder")


def _reproduce(name: str, settings: Any, out: Path) -> dict[str, Any]:
    return reproduce(replace(EXPERIMENTS[name], laptop=settings), out, data=Path(os.environ["NARROWDEEP_DATA"]))


def _small_table() -> TableSettings:
    settings = EXPERIMENTS["table-4.1"].laptop
    small: dict[str, Any] = {"depth": 60, "scale": 1e3, "rho": 2.0, "images": 192, "batch_size": 64, "damping": 1e-3}
    rows = [replace(row, **small, tolerance=0.35) for row in settings.rows]
    return TableSettings(rows=tuple(rows), test_images=200)


def _table_verdict(settings: TableSettings, accuracies: dict[str, float], template: dict[str, Any]) -> Verdict:
    result = {name: dict(template, accuracy=accuracy) for name, accuracy in accuracies.items()}
    return EXPERIMENTS["table-4.1"].verdict(settings, result)


def test_the_table_is_judged_by_test_accuracy_beside_the_thesis() -> None:
    settings = EXPERIMENTS["table-4.1"].full
    template = {
        "test_images": 10,
        "images": 20,
        "train_loss": 0.1,
        "predicted_train_loss": 0.1,
        "predicted_accuracy": 0.6,
    }
    good = {"digits-mlp": 0.9748, "digits-cnn": 0.9402, "binary-cnn": 0.9887}
    good |= {"digits-mlp-rho-14": 0.9748, "digits-cnn-rho-8": 0.9402}
    assert _table_verdict(settings, good, template).reproduced
    for name in good:
        verdict = _table_verdict(settings, good | {name: good[name] - 0.02}, template)
        assert not verdict.reproduced
        assert verdict.text.count("not reached") == 1


def test_the_full_table_has_the_thesiss_own_networks() -> None:
    rows = {row.name: row for row in EXPERIMENTS["table-4.1"].full.rows}
    printed = {  # L, C_L, rho, side of the pool, accuracy: table 4.1 and section 5.2
        "digits-mlp": (4000, 4.0, 1.0, 1, 0.9748),
        "digits-cnn": (4000, 4.0, 3**-0.5, 4, 0.9402),
        "binary-cnn": (20000, 20.0, 3**-0.5, 4, 0.9887),
    }
    for name, values in printed.items():
        r = rows[name]
        assert (r.depth, r.scale, r.rho, r.pool, r.thesis_accuracy) == values
        assert r.images is None
        assert r.passes == 1


@needs_mnist
def test_table_at_small_depth(tmp_path: Path) -> None:
    settings = _small_table()
    record = _reproduce("table-4.1", settings, tmp_path)
    assert record["verdict"]["reproduced"], record["verdict"]["text"]
    for row in settings.rows:
        found = record["result"][row.name]
        assert (found["images"], found["test_images"], len(found["passes"])) == (192, 200, 1)
        assert found["train_loss"] == pytest.approx(found["predicted_train_loss"], rel=0.05)
        assert found["train_loss"] < 0.7 * found["constant_loss"], row.name
        assert abs(found["accuracy"] - found["predicted_accuracy"]) <= 0.01  # two images
    again = _reproduce("table-4.1", settings, tmp_path / "again")
    for name, found in record["result"].items():
        other = again["result"][name]
        for one in (found, other, *found["passes"], *other["passes"]):
            assert one.pop("seconds") > 0
        assert found == other


@needs_mnist
def test_a_row_goes_where_its_kernel_says(tmp_path: Path) -> None:
    """Against ridge regression with the empirical kernel of the same network, in float64."""
    row = replace(_small_table().rows[2], name="row", depth=30, images=64, passes=2, damping=1e-2)
    settings = TableSettings(rows=(row,), test_images=50)
    first, second = _reproduce("table-4.1", settings, tmp_path)["result"]["row"]["passes"]
    assert first["train_loss"] == pytest.approx(first["predicted_train_loss"], rel=1e-2)
    assert second["train_loss"] < first["train_loss"]
    assert second["damping"] < first["damping"]
    context = Context(seed=0, store=Store(tmp_path, {}))
    task = load_task("mnist", data=os.environ["NARROWDEEP_DATA"], pool=row.pool, dtype=torch.float64)
    task = subset(task, images=64, test_images=50, seed=0)
    model = DeepNarrowMLP(49, 10, 30, scale=row.scale, rho=row.rho)
    model.reset_parameters(context.generator())
    model.double()
    kernel = empirical_ntk(model, task.x_train, reduce="trace") / 10
    ridge = row.damping * kernel.diagonal().mean()
    left = ridge * torch.linalg.solve(kernel + ridge * torch.eye(64), task.y_train)
    assert first["predicted_train_loss"] == pytest.approx(float(left.square().sum()) / 128, rel=1e-3)


@needs_mnist
def test_a_row_that_is_done_is_not_run_again(tmp_path: Path, monkeypatch: Any) -> None:
    rows = tuple(replace(row, depth=10, images=32) for row in _small_table().rows)
    settings = TableSettings(rows=rows, test_images=8)
    run, begun = mnist_table._run_row, []

    def stop_in_the_second(row: Any, *rest: Any) -> dict[str, Any]:
        begun.append(row.name)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return run(row, *rest)

    monkeypatch.setattr(mnist_table, "_run_row", stop_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        _reproduce("table-4.1", settings, tmp_path)
    _reproduce("table-4.1", settings, tmp_path)
    assert begun == [rows[0].name, rows[1].name, rows[1].name, rows[2].name]


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
