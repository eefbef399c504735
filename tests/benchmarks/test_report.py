"""The report's arithmetic on numbers made up here."""

from __future__ import annotations

import json

import pytest

from benchmarks import report


def entry(workload, measure, peer, seconds, floors, flops=None, dependent=1, traffic=1):
    work = {"flops": flops, "dependent": dependent, "traffic": traffic}
    info = {"workload": workload, "measure": measure, "peer": peer, **work, "floors": floors, "error": 1e-6}
    return {"extra_info": info, "stats": {"min": seconds, "mean": 10 * seconds}}


def run_of(*entries, peak=2e11):
    machine = {"cpu": {"brand_raw": "Abacus"}, "machine": "x", "threads": 2, "vector": "AVX512", "torch": "2.10"}
    limits = {
        "peak_flops": peak,
        "peak_flops_double": peak / 2,
        "latency": 1e-9,
        "bandwidth": 2e10,
        "cache_bytes": 10**6,
    }
    return {"machine_info": {**machine, "limits": limits}, "benchmarks": list(entries)}


FLOORS = {"eager": 8, "JAX scan": 5, "peak": 0.5}


@pytest.fixture
def first():
    return run_of(
        entry("net", "forward", "eager", 0.08, FLOORS, 8 * 10**8),
        entry("net", "forward", "JAX scan", 0.04, FLOORS, 8 * 10**8),
        entry("net", "forward", "narrowdeep", 0.01, FLOORS, 8 * 10**8),
        entry("net", "NTK", "torch.func", 3.0, {"torch.func": 150}),
        entry("net", "NTK", "narrowdeep", 0.0125, {"torch.func": 150}),
    )


def test_ratios_are_of_least_times_and_floors_are_judged(first):
    forward, kernel = report.read_rows([first])
    assert forward.ratio("eager") == pytest.approx(8)
    assert forward.ratio("JAX scan") == pytest.approx(4)
    assert forward.ratio("peak") == pytest.approx(8e8 / 0.01 / 2e11)
    assert forward.ratio("torch.compile") is None
    assert forward.missed() == ["JAX scan", "peak"]
    assert kernel.ratio("torch.func") == pytest.approx(240)
    assert kernel.ratio("peak") is None
    assert kernel.missed() == []


def test_a_later_file_replaces_whole_rows(first):
    again = run_of(entry("net", "forward", "narrowdeep", 0.02, FLOORS, 8 * 10**8), peak=1e11)
    forward, kernel = report.read_rows([first, again])
    assert forward.ratio("eager") is None  # a ratio across two runs would mean nothing
    assert forward.ratio("peak") == pytest.approx(8e8 / 0.02 / 1e11)
    assert kernel.ratio("torch.func") == pytest.approx(240)


def test_table_shows_floors_and_bold_misses(first):
    lines = report.table(report.read_rows([first])).splitlines()
    assert lines[0] == "| work | measure | narrowdeep, ms | bound | of FMA peak | eager | JAX scan | torch.func |"
    ratios = "8.00x (floor 8x) | **4.00x, below 5x** |  |"
    assert lines[2] == f"| net | forward | 10 | arithmetic, 40% | **40%, below 50%** | {ratios}"
    assert lines[3] == "| net | NTK | 12.5 |  |  |  |  | 240x (floor 150x) |"


@pytest.mark.parametrize(
    ("work", "bound"),
    [
        ({"flops": 10**9, "dependent": 10**6, "traffic": 10**7}, "arithmetic, 50%"),  # 5, 1 and 0.5 ms of 10
        ({"flops": 10**8, "dependent": 2 * 10**6, "traffic": 10**7}, "latency, 20%"),
        ({"flops": 10**8, "dependent": 10**6, "traffic": 10**8}, "bandwidth, 50%"),
        ({"flops": 10**6, "dependent": 10**3, "traffic": 10**6}, "arithmetic, 0%"),  # it fits in the cache
    ],
)
def test_a_row_is_bound_by_what_takes_longest(work, bound):
    (row,) = report.read_rows([run_of(entry("net", "forward", "narrowdeep", 0.01, {}, **work))])
    assert row.bound() == bound


def test_a_floor_whose_peer_did_not_run_is_not_called_kept(first):
    first["benchmarks"] = [b for b in first["benchmarks"] if b["extra_info"]["peer"] != "JAX scan"]
    row = report.read_rows([first])[0]
    assert report.cell(row, "JAX scan") == "not measured"
    assert row.missed() == ["peak"]
    assert row.kept() == ["eager"]


def test_command_prints_the_table_and_draws_the_chart(first, tmp_path, capsys):
    source, chart = tmp_path / "bench.json", tmp_path / "bench.png"
    source.write_text(json.dumps(first))
    report.main([str(source), "--plot", str(chart)])
    shown = capsys.readouterr().out
    assert "Abacus, 2 threads, AVX512, torch 2.10, measured in registers 200 GFLOP/s in float32, 1.00 ns" in shown
    assert "below its floor: net, forward, JAX scan" in shown
    assert "2 floors kept, 2 missed" in shown
    assert chart.read_bytes().startswith(b"\x89PNG")
