"""No kernel spills, the hot loops are dense, and docs/gpu_static.json is what this Triton compiles.

The table has the figures of the Triton that comes with the torch in use, and of the newest.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from importlib import metadata
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from benchmarks.gpu.static_figures import TABLE, Entry, entries, key, measure_all
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


SAMPLE = list({(e.family, e.kernel, e.dtype, e.offset, e.target): e for e in reversed(ENTRIES)}.values())
"""Every kernel, dtype, form and target once, at its narrowest."""


def differing(table: dict[str, Any], wanted: list[Entry]) -> dict[str, Any]:
    """Figures of those that compile to something else than the table says."""
    measured = {str(entry): asdict(figures) for entry, figures in measure_all(wanted)}
    return {name: figures for name, figures in measured.items() if figures != table[name]}


def test_no_row_is_out_of_date(any_table: dict[str, Any]) -> None:
    """Sources, constants and blocks are those that were compiled."""
    old = [str(entry) for entry in ENTRIES if key(entry) != any_table[str(entry)]["key"]]
    assert not old, "run `python -m benchmarks.gpu.static_figures`"


def test_a_key_tells_sources_constants_and_blocks_apart() -> None:
    entry = Entry("mlp", "forward", F32, True, 8, 90)
    others = [replace(entry, kernel="recompute"), replace(entry, width=4), replace(entry, offset=False)]
    assert len({key(e) for e in [entry, *others]}) == 4
    before = key(entry)
    with mock.patch.dict(mlp._SAMPLES, {("forward", F32, True): (8, 2, 2)}):
        assert key(entry) != before
    with mock.patch.object(triton_common.two_sum, "_src", "def two_sum(a, b):\n    return a + b, b"):
        assert key(entry) != before
    commented = triton_common.two_sum.src.replace("    s = a + b", "    s = a + b  # rounded")
    with mock.patch.object(triton_common.two_sum, "_src", commented):
        assert key(entry) == before


def test_sample_compiles_to_its_figures(table: dict[str, Any]) -> None:
    required = [entry for entry in ENTRIES if str(entry) in REQUIRED]
    assert differing(table, list(dict.fromkeys([*SAMPLE, *required]))) == {}


@pytest.mark.slow
def test_whole_table_compiles_to_its_figures(table: dict[str, Any]) -> None:
    assert differing(table, ENTRIES) == {}
