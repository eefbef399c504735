"""No kernel spills, the hot loops are dense, and docs/gpu_static.json is what this Triton compiles.

The table has the figures of the Triton that comes with the torch in use, and of the newest.
"""

from __future__ import annotations

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from importlib import metadata
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from benchmarks.gpu import modelled, static_figures
from benchmarks.gpu.static_figures import TABLE, Entry, Figures, entries, key, measure_all
from narrowdeep.ops import triton_common
from narrowdeep.ops.mlp import triton as mlp

F32 = torch.float32
VERSION = metadata.version("triton")
ENTRIES = list(entries())
REQUIRED = {
    "mlp forward float32 plain n=4 sm_90": 0.55,
    "mlp forward float32 plain n=8 sm_90": 0.65,
    "mlp forward float32 plain n=16 sm_90": 0.70,
    "mlp backward float32 plain n=8 sm_90": 0.45,
    "mlp backward float32 plain n=16 sm_90": 0.45,
}


TABLES: dict[str, dict[str, Any]] = json.loads(TABLE.read_text())


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    if VERSION not in TABLES:
        pytest.skip(f"the tables are of triton {', '.join(TABLES)}, installed is {VERSION}")
    return TABLES[VERSION]


@pytest.fixture(params=TABLES)
def any_table(request: pytest.FixtureRequest) -> dict[str, Any]:
    return TABLES[request.param]


def test_table_is_complete_and_nothing_spills(any_table: dict[str, Any]) -> None:
    table = any_table
    assert set(table) == {str(entry) for entry in ENTRIES}
    assert {name: f["spills"] for name, f in table.items() if f["spills"]} == {}
    for name, figures in table.items():
        # What a program may use: 64 KiB of shared memory on sm_75, 255 registers a thread, 65,536 a program.
        assert figures["shared"] <= 64 << 10, name
        assert figures["registers"] * 32 * figures["warps"] <= 65_536, name


@pytest.mark.parametrize("name", REQUIRED)
def test_hot_loops_are_dense(any_table: dict[str, Any], name: str) -> None:
    assert any_table[name]["fma"] >= REQUIRED[name]


def _sample() -> list[Entry]:
    """Every kernel, dtype and form once, at its narrowest, each for another of the targets it is compiled for."""
    by_target: dict[tuple[Any, ...], dict[int, Entry]] = {}
    for e in reversed(ENTRIES):
        by_target.setdefault((e.family, e.kernel, e.dtype, e.offset), {})[e.target] = e
    return [list(found.values())[i % len(found)] for i, found in enumerate(by_target.values())]


SAMPLE = _sample()


def differing(table: dict[str, Any], wanted: list[Entry]) -> dict[str, Any]:
    """Figures of those that compile to something else than the table says; cycles where the model is installed."""
    measured = {str(entry): asdict(figures) for entry, figures in measure_all(wanted)}
    if modelled.tool() is None:
        measured = {name: figures | {"modelled": table[name]["modelled"]} for name, figures in measured.items()}
    return {name: figures for name, figures in measured.items() if figures != table[name]}


def test_no_row_is_out_of_date(any_table: dict[str, Any]) -> None:
    """Sources, constants and blocks are those that were compiled."""
    old = [str(entry) for entry in ENTRIES if key(entry) != any_table[str(entry)]["key"]]
    assert not old, "run `python -m benchmarks.gpu.static_figures`"


def test_a_key_tells_sources_constants_and_blocks_apart() -> None:
    entry = Entry("mlp", "forward", F32, False, 8, 90)
    others = [replace(entry, kernel="recompute"), replace(entry, width=4), replace(entry, offset=True)]
    assert len({key(e) for e in [entry, *others]}) == 4
    before = key(entry)
    with mock.patch.dict(mlp._SAMPLES, {("forward", F32, False): (8, 2, 2)}):
        assert key(entry) != before
    with mock.patch.object(triton_common.two_sum, "_src", "def two_sum(a, b):\n    return a + b, b"):
        assert key(entry) != before
    commented = triton_common.two_sum.src.replace("    s = a + b", "    s = a + b  # rounded")
    with mock.patch.object(triton_common.two_sum, "_src", commented):
        assert key(entry) == before


def test_sample_compiles_to_its_figures(table: dict[str, Any]) -> None:
    required = [entry for entry in ENTRIES if str(entry) in REQUIRED]
    assert differing(table, list(dict.fromkeys([*SAMPLE, *required]))) == {}


def test_every_block_of_sm_90_has_modelled_cycles(any_table: dict[str, Any]) -> None:
    for entry in ENTRIES:
        found = any_table[str(entry)]["modelled"]
        blocks = [block for block, _ in static_figures._kernel(entry)[1]]
        expected = {f"{b.samples}/{b.warps}" for b in blocks} if static_figures._is_modelled(entry) else set()
        assert set(found) == expected, str(entry)
        for row in found.values():
            assert row["stall"] <= 1.02 * row["cycles"]["1"] + 1, f"{entry}: less than its instructions need"
            assert row["wavefronts"] <= row["cycles"]["1"] + 1, str(entry)


def _row(cycles: float, cycles_l2: float, block: str = "32/1") -> dict[str, Any]:
    return {block: {"cycles": {"1": cycles}, "cycles_l2": {"1": cycles_l2}}}


def test_worse_is_over_five_per_cent() -> None:
    old = _row(100.0, 200.0)
    assert modelled.worse(old, _row(104.9, 209.9)) == []
    assert len(modelled.worse(old, _row(105.1, 200.0))) == 2  # this block, and the best of all
    assert len(modelled.worse(old, _row(50.0, 211.0))) == 2
    assert modelled.worse(old, old | _row(900.0, 900.0, "64/1")) == []  # another, slower block to choose from
    assert len(modelled.worse(old, _row(220.0, 400.0, "64/1"))) == 1  # no block of before is left
    assert modelled.worse({}, old) == modelled.worse(old, {}) == []


@pytest.mark.parametrize("flags", [[], ["--slower"]])
def test_cycles_are_not_raised_unless_told_to(flags: list[str], tmp_path: Any) -> None:
    """The row stays as it was, and so out of date, which fails above."""
    entry = Entry("mlp", "forward", F32, True, 4, 90)
    common: dict[str, Any] = {
        "samples": 32,
        "warps": 1,
        "registers": 1,
        "spills": 0,
        "shared": 0,
        "loop": 1,
        "fma": 0.0,
        "mix": {},
    }
    old, new = (Figures(k, **common, modelled=_row(c, 1.0)) for k, c in (("old", 100.0), ("new", 106.0)))
    table = tmp_path / "table.json"
    table.write_text(json.dumps({VERSION: {str(entry): asdict(old)}}))
    stand_ins = {"TABLE": table, "entries": lambda: [entry], "measure_all": lambda wanted: [(e, new) for e in wanted]}
    with (
        mock.patch.multiple(static_figures, **stand_ins),
        mock.patch("sys.argv", ["static_figures", *flags]),
        pytest.raises(SystemExit, match=r"100\.0 -> 106\.0"),
    ):
        static_figures.main()
    assert json.loads(table.read_text())[VERSION][str(entry)]["key"] == ("new" if flags else "old")


@pytest.mark.slow
@pytest.mark.parametrize("target", [75, 80, 86, 89, 100, 120])  # of sm_90 the table has all blocks
def test_no_smaller_block_spills(target: int) -> None:
    wanted = [entry for entry in ENTRIES if entry.target == target]
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = zip(wanted, pool.map(static_figures.spilling_blocks, wanted), strict=True)
        assert {str(entry): blocks for entry, blocks in found if blocks} == {}


@pytest.mark.slow
def test_whole_table_compiles_to_its_figures(table: dict[str, Any]) -> None:
    assert differing(table, ENTRIES) == {}
