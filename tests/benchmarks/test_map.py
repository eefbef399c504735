"""The map has the shapes that it should, its ratios are those of the times, and no cell is slower than eager layers."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

from benchmarks import crossover, map
from benchmarks.peak import Limits, measured_limits
from benchmarks.peers import Eager, Narrowdeep
from benchmarks.workloads import Workload, check, make_problem, truth

LIMITS = Limits(peak_flops=1e11, peak_flops_double=5e10, latency=1e-9, bandwidth=1e10, cache_bytes=1 << 20)


def cell(eager: float, ours: float, image: int = 0, batch: int = 1, measure: str = "forward") -> map.Cell:
    bounds = {"arithmetic": 0.001, "latency": 0.002, "bandwidth": 0.0}
    return map.Cell("net", 4, batch, image, 3, measure, {"eager": eager, "narrowdeep": ours}, bounds)


@pytest.mark.parametrize("short", [False, True])
def test_the_map_goes_from_the_least_to_the_greatest_shapes(short: bool) -> None:
    works = list(map.workloads(short))
    mlps, cnns = [w for w in works if not w.image], [w for w in works if w.image]
    assert len({w.name for w in works}) == len(works)
    assert {w.width for w in mlps} >= {4, 33, 128, 800}
    assert {w.width for w in cnns} >= {3, 12, 32}
    assert {w.kernel_size for w in cnns} >= {3, 7}
    for work in works:
        assert map.DEPTHS[0] <= work.depth <= map.DEPTHS[1]
        least = Workload(work.inputs, work.outputs, map.DEPTHS[0], work.batch, {}, work.image, work.kernel_size)
        assert (work.flops("forward") or 0) <= max(map.FORWARD_FLOPS, least.flops("forward") or 0)
    if not short:
        assert {w.batch for w in mlps} == {1, 2, 4, 8, 16, 37, 128, 1024}
        assert {w.batch for w in cnns} >= {1, 2, 8, 37, 512}
        assert {w.image for w in cnns} == {(s, s) for s in (1, 7, 16, 28)}
        assert {w.kernel_size for w in cnns} == {1, 3, 5, 7}


def test_a_cell_is_measured() -> None:
    work = Workload(2, 1, 6, 3, {}, image=(4, 3), kernel_size=5)
    cells = list(map.measured(work, (Eager, Narrowdeep), LIMITS))
    assert [c.measure for c in cells] == ["forward", "forward + backward"]
    for found in cells:
        assert found.seconds.keys() == {"eager", "narrowdeep"}
        assert found.ratio() == found.seconds["eager"] / found.seconds["narrowdeep"] > 0
        assert found.bounds["arithmetic"] == work.flops(found.measure) / 1e11  # type: ignore[operator, arg-type]


def test_ratios_and_bounds() -> None:
    assert cell(0.03, 0.01).ratio() == pytest.approx(3)
    name, share = cell(0.03, 0.01).bound()
    assert name == "latency"
    assert share == pytest.approx(0.2)
    shown = map.summary([cell(0.03, 0.01), cell(0.009, 0.01), cell(0.02, 0.01, image=7, measure="forward + backward")])
    assert "| eager | forward | 2 | 0.90x | 3.00x | 1 |" in shown
    assert "| eager | forward + backward | 1 | 2.00x | 2.00x | 0 |" in shown
    assert "0.90x of eager: net, forward (20% of the latency bound)" in shown


def test_the_command_writes_cells_and_a_picture(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    works = [Workload(2, 1, 5, 3, {}), Workload(1, 1, 4, 2, {}, image=(3, 3))]
    monkeypatch.setattr(map, "workloads", lambda short: works)
    monkeypatch.setattr(map, "measured_limits", lambda: asdict(LIMITS))
    monkeypatch.setattr(map, "SECONDS", 0.0)
    threads = torch.get_num_threads()
    try:
        map.main(["--short", "--json", str(tmp_path / "map.json"), "--plot", str(tmp_path / "map.png")])
    finally:
        torch.set_num_threads(threads)
    found = json.loads((tmp_path / "map.json").read_text())
    assert found["limits"] == asdict(LIMITS)
    assert [(c["width"], c["batch"], c["image"]) for c in found["cells"]] == [
        (4, 3, 0),
        (4, 3, 0),
        (3, 2, 3),
        (3, 2, 3),
    ]
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert "CNN 3 channels 3x3, 3x3 filters, L=4, B=2" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["offset", "plain"])
@pytest.mark.parametrize("image", [None, (4, 6)])
def test_torchs_operators_a_layer_at_a_time_find_the_truth(image, form) -> None:
    work = Workload(2, 2, 40, 3, {}, image=image, form=form)
    problem = make_problem(work)
    contender = crossover.Layered(problem)
    for measure in map.MEASURES:
        contender.run(measure)
        check(contender.answer(measure), truth(problem, measure), contender.tolerance)


@pytest.mark.slow
def test_no_shape_is_slower_than_eager_layers() -> None:
    """With a tenth for noise and for the few cells that docs/benchmarks.md lists."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        limits = Limits(**measured_limits())
        for work in map.workloads(short=True):
            for found in map.measured(work, (Eager, Narrowdeep), limits):
                assert found.ratio() > 0.9, (found.name, found.measure, found.ratio())
    finally:
        torch.set_num_threads(threads)
