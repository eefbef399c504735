"""Experiments: verdicts that follow the data, runs that resume, a page that opens offline."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from narrowdeep import DeepNarrowMLP
from narrowdeep.cli import app
from narrowdeep.experiments import EXPERIMENTS, Context, Experiment, Store, Verdict, reproduce
from narrowdeep.experiments.accumulation import AccumulationSettings, accumulated
from narrowdeep.experiments.base import slope
from narrowdeep.experiments.page import write_page
from narrowdeep.experiments.theorems import TheoremSettings
from narrowdeep.experiments.toy import ToySettings

pytest.importorskip("matplotlib")


@dataclass(frozen=True)
class Settings:
    pieces: int = 3


def _fake(stop_at: int | None, computed: list[int], reproduced: bool = True) -> Experiment:
    def run(settings: Settings, context: Context) -> dict[str, Any]:
        def piece(index: int) -> float:
            if index == stop_at:
                raise KeyboardInterrupt
            computed.append(index)
            return torch.rand((), generator=context.generator(index)).item()

        return {"values": [context.store.piece(f"part-{i}", partial(piece, i)) for i in range(settings.pieces)]}

    def draw(settings: Settings, result: dict[str, Any]) -> Any:
        from matplotlib.figure import Figure

        return Figure()

    return Experiment(
        name="fake",
        title="A <title>",
        source="nowhere",
        caption="caption",
        laptop=Settings(),
        full=Settings(4),
        run=run,
        draw=draw,
        verdict=lambda settings, result: Verdict(reproduced, f"{len(result['values'])} values"),
    )


def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path) -> None:
    computed: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        reproduce(_fake(2, computed), tmp_path)
    assert computed == [0, 1]
    resumed = reproduce(_fake(None, computed), tmp_path)
    assert computed == [0, 1, 2]
    again = reproduce(_fake(None, []), tmp_path / "fresh")
    assert resumed["result"] == again["result"]
    assert json.loads((tmp_path / "fake.json").read_text())["result"] == resumed["result"]


@pytest.mark.parametrize("change", [{"seed": 1}, {"full": True}, {"dtype": torch.float64}])
def test_pieces_of_other_settings_are_not_taken(tmp_path: Path, change: dict[str, Any]) -> None:
    computed: list[int] = []
    reproduce(_fake(None, computed), tmp_path)
    reproduce(_fake(None, computed), tmp_path, **change)
    assert len(computed) == (7 if "full" in change else 6)


def test_a_damaged_piece_is_computed_again(tmp_path: Path) -> None:
    computed: list[int] = []
    reproduce(_fake(None, computed), tmp_path)
    next((tmp_path / "pieces" / "fake").glob("part-1-*.json")).write_text('{"seconds": 1')
    reproduce(_fake(None, computed), tmp_path)
    assert computed == [0, 1, 2, 1]


def test_the_page_holds_its_pictures_and_nothing_from_outside(tmp_path: Path) -> None:
    reproduce(_fake(None, [], reproduced=False), tmp_path)
    page = write_page(tmp_path, ["missing", "fake"]).read_text()
    assert "Not reproduced" in page
    assert "A &lt;title&gt;" in page
    assert 'src="data:image/png;base64,iVBOR' in page
    assert "http" not in page
    assert "<script" not in page


def test_slope_of_a_power() -> None:
    assert slope([1, 10, 100], [3.0, 0.3, 0.03]) == pytest.approx(-1)


def _run(name: str, settings: Any, tmp_path: Path) -> dict[str, Any]:
    experiment = replace(EXPERIMENTS[name], laptop=settings)
    return reproduce(experiment, tmp_path)


def _doctored(name: str, settings: Any, result: dict[str, Any], change: Any) -> Verdict:
    result = copy.deepcopy(result)
    change(result)
    return EXPERIMENTS[name].verdict(settings, result)


@pytest.mark.parametrize("name", ["fig-3.1", "fig-3.2"])
def test_initialisation_is_the_one_defined(name: str, tmp_path: Path) -> None:
    record = reproduce(EXPERIMENTS[name], tmp_path)
    assert record["verdict"]["reproduced"]
    assert (tmp_path / f"{name}.png").stat().st_size > 5000

    def other_weight(result: dict[str, Any]) -> None:
        result["layers"][1]["weight"][0][0] = "Gaussian"

    def some_output(result: dict[str, Any]) -> None:
        result["largest_output"] = 1e-9

    for change in (other_weight, some_output):
        assert not _doctored(name, EXPERIMENTS[name].laptop, record["result"], change).reproduced


def test_toy_figure(tmp_path: Path) -> None:
    settings = ToySettings(
        depths=(20, 320), scales=(5.0, 320.0), trials=6, steps=400, samples=20, angles=7, tolerance=0.1
    )
    record = _run("fig-4.1", settings, tmp_path)
    assert record["verdict"]["reproduced"], record["verdict"]["text"]

    def drifted(result: dict[str, Any]) -> None:
        for trial in result["depths"]["320"]:
            trial["drift"] = 0.5

    def not_learned(result: dict[str, Any]) -> None:
        result["depths"]["20"][0]["learned"][3] = 1.0

    for change in (drifted, not_learned):
        verdict = _doctored("fig-4.1", settings, record["result"], change)
        assert not verdict.reproduced
        assert "Not so" in verdict.text


def test_accumulated_ends_with_the_output_and_starts_at_the_first_layer() -> None:
    model = DeepNarrowMLP(3, 2, 17, dtype=torch.float64)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.01 * torch.randn(param.shape, dtype=torch.float64))
    x = torch.randn(5, 3, dtype=torch.float64)
    values = accumulated(model, x)
    assert values.shape == (17, 5, 2)
    torch.testing.assert_close(values[-1], model(x), rtol=1e-9, atol=1e-9)
    weight, bias = model.layers()[0]
    torch.testing.assert_close(values[0], torch.relu(x @ weight.T + bias)[:, -2:] - model.scale)


def test_accumulation_figure(tmp_path: Path) -> None:
    settings = AccumulationSettings(depth=400, scale=400.0, steps=300, samples=20, tolerance=0.1, largest_share=0.1)
    record = _run("fig-5.1", settings, tmp_path)
    assert record["verdict"]["reproduced"], record["verdict"]["text"]

    def jump(result: dict[str, Any]) -> None:
        result["largest_added_by_a_layer"][2] = 0.4

    assert not _doctored("fig-5.1", settings, record["result"], jump).reproduced


def test_theorems(tmp_path: Path) -> None:
    settings = TheoremSettings(depths=(20, 60, 180), trials=3, steps=30, samples=6, image=3)
    record = _run("theorems", settings, tmp_path)
    drift = [trial["drift"] for trial in record["result"]["mlp"]["180"]]
    assert all(0 < value < 0.01 for value in drift)

    def flat(result: dict[str, Any]) -> None:
        for trials in result["mlp"].values():
            for trial in trials:
                trial["own_flow"] = 1e-3

    assert "3.3, MLP: trained network to descent with its initial" in _doctored(
        "theorems", settings, record["result"], flat
    ).text.split("Not as predicted")[1]


def test_command(tmp_path: Path) -> None:
    runner = CliRunner()
    listed = runner.invoke(app, ["reproduce"])
    assert listed.exit_code == 0
    assert all(name in listed.output for name in EXPERIMENTS)
    wrong = runner.invoke(app, ["reproduce", "fig-9", "--out", str(tmp_path)])
    assert wrong.exit_code == 2
    assert "fig-9" in wrong.output
    done = runner.invoke(app, ["reproduce", "fig-3.1", "--out", str(tmp_path), "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["fig-3.1"]["reproduced"] is True
    assert (tmp_path / "index.html").exists()


def test_a_store_takes_no_piece_of_another_key(tmp_path: Path) -> None:
    assert Store(tmp_path, {"a": 1}).piece("p", lambda: [1.5]) == [1.5]
    assert Store(tmp_path, {"a": 2}).piece("p", lambda: None) is None
    assert Store(tmp_path, {"a": 1}).piece("p", lambda: pytest.fail("computed again")) == [1.5]


def test_without_matplotlib_there_is_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reproduce(_fake(None, []), tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(EXPERIMENTS, "fake", _fake(None, []))
    done = CliRunner().invoke(app, ["reproduce", "fake", "--out", str(tmp_path), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["fake"]["reproduced"] is True
    assert done.stderr == "the picture is left out: it needs matplotlib (pip install 'narrowdeep[plots]')\n"
    assert not (tmp_path / "fake.png").exists()  # an older run's would not belong to these numbers
    assert "<img" not in (tmp_path / "index.html").read_text()


@pytest.mark.parametrize("content", ["", "[]", "{", '{"experiment": "fake"}', "\x00" * 9])
def test_a_damaged_record_is_left_out_of_the_page(tmp_path: Path, content: str) -> None:
    reproduce(_fake(None, []), tmp_path)
    (tmp_path / "other.json").write_text(content)
    page = write_page(tmp_path, ["other", "fake"]).read_text()
    assert page.count("<h2") == 1


def test_a_changed_piece_is_computed_again(tmp_path: Path) -> None:
    Store(tmp_path, {}).piece("p", lambda: [1.5])
    (path,) = tmp_path.glob("p-*.json")
    path.write_text(path.read_text().replace("1.5", "2.5"))
    assert Store(tmp_path, {}).piece("p", lambda: [1.5]) == [1.5]


def test_no_planted_link_is_followed(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("mine")
    out = tmp_path / "out"
    out.mkdir()
    for name in ("fake.json", "fake.png"):
        (out / name).symlink_to(mine)
    reproduce(_fake(None, []), out)
    assert mine.read_text() == "mine"
    assert json.loads((out / "fake.json").read_text())["verdict"]["reproduced"]


def test_missing_mnist_is_said_before_anything_runs(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["reproduce", "all", "--data", str(tmp_path), "--out", str(tmp_path / "out")])
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: data must hold")
    assert not (tmp_path / "out").exists()
