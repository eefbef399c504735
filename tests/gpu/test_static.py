"""No kernel spills, the hot loops are dense, and docs/gpu_static.json is what this Triton compiles."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest
import torch
import triton

from benchmarks.gpu.static_figures import TABLE, Entry, entries, measure

F32, F64 = torch.float32, torch.float64
ENTRIES = list(entries())
CHECKED = [
    Entry("mlp", "forward", F32, False, 4, 90),
    Entry("mlp", "forward", F32, True, 8, 75),
    Entry("mlp", "backward", F32, False, 8, 90),
    Entry("mlp", "backward", F64, True, 8, 80),
    Entry("mlp", "weight_gradient", F32, None, 8, 90),
    Entry("mlp", "jvp", F32, True, 4, 100),
    Entry("mlp", "forward", F32, True, 32, 80),
    Entry("conv", "forward", F32, True, 3, 90),
    Entry("conv", "weight_gradient", F64, None, 3, 80),
    Entry("mlp", "gram_sums", F32, None, 4, 90),
    Entry("conv", "filter_jacobians", F64, None, 3, 75),
    Entry("conv", "pair_sums", F32, None, 0, 80),
]
REQUIRED = {
    "mlp forward float32 plain n=4 sm_90": 0.55,
    "mlp forward float32 plain n=8 sm_90": 0.65,
    "mlp forward float32 plain n=16 sm_90": 0.70,
    "mlp backward float32 plain n=8 sm_90": 0.45,
    "mlp backward float32 plain n=16 sm_90": 0.45,
}


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    table = json.loads(TABLE.read_text())
    if table["triton"] != triton.__version__:
        pytest.skip(f"the table is of triton {table['triton']}, installed is {triton.__version__}")
    return table["kernels"]


def test_table_is_complete_and_nothing_spills(table: dict[str, Any]) -> None:
    assert set(table) == {str(entry) for entry in ENTRIES}
    assert {name: f["spills"] for name, f in table.items() if f["spills"]} == {}
    for name, figures in table.items():
        # What a program may use: 64 KiB of shared memory on sm_75, 255 registers a thread, 65,536 a program.
        assert figures["shared"] <= 64 << 10, name
        assert figures["registers"] * 32 * figures["warps"] <= 65_536, name


@pytest.mark.parametrize("name", REQUIRED)
def test_hot_loops_are_dense(table: dict[str, Any], name: str) -> None:
    assert table[name]["fma"] >= REQUIRED[name]


@pytest.mark.parametrize("entry", CHECKED, ids=str)
def test_table_is_current(table: dict[str, Any], entry: Entry) -> None:
    assert asdict(measure(entry)) == table[str(entry)], "run `python -m benchmarks.gpu.static_figures --fresh`"


@pytest.mark.slow
@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry not in CHECKED], ids=str)
def test_whole_table_is_current(table: dict[str, Any], entry: Entry) -> None:
    assert asdict(measure(entry)) == table[str(entry)]
