"""Every kernel as the PTX Triton emits, executed: results, bounds, uninitialised reads, races, unwritten outputs."""

from __future__ import annotations

import pytest
import torch

from narrowdeep.ops.mlp import triton as mlp
from narrowdeep.ops.triton_common import Block
from tests.gpu.cases import Case, check_mlp, replaced
from tests.gpu.simulator import Simulator, load

F32, F64 = torch.float32, torch.float64
CASES = [
    Case(1, 1, 37, 37, True, F32, 5),  # crosses a move of the base; two blocks, the last one ragged
    Case(1, 1, 37, 36, False, F64, 1),  # a batch that divides by 4: vector loads
    Case(2, 3, 36, 5, True, F64, 7),
    Case(2, 2, 4, 33, False, F32, 0),
    Case(10, 7, 4, 17, True, F32, 2),  # tiles of 16 units: 2 x 2
    Case(10, 7, 4, 17, True, F64, 1),
]
SLOW = [
    Case(8, 3, 36, 37, True, F32, 5),
    Case(11, 4, 36, 37, True, F64, 0),
    Case(11, 4, 4, 37, False, F32, 2),
    Case(20, 10, 36, 5, True, F32, 7),
    Case(40, 10, 4, 5, True, F32, 2),
    Case(40, 39, 4, 5, False, F32, 2, width=80),
    Case(21, 10, 35, 5, True, F64, 6),
]


def check(case: Case, simulator: Simulator, **limits: object) -> None:
    load()
    with replaced(mlp, launch=simulator.launch, empty=simulator.empty, **limits):
        check_mlp(case, mlp.mlp_forward, mlp.mlp_backward, mlp.mlp_jvp)
    assert {"chain_forward", "chain_backward", "chain_jvp"} <= set(simulator.launches)


@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels(case: Case, target: int) -> None:
    check(case, Simulator(target))


@pytest.mark.slow
@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("case", SLOW, ids=str)
def test_more_widths(case: Case, target: int) -> None:
    check(case, Simulator(target))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("case", [Case(1, 1, 35, 5, True, F32, 2), Case(10, 6, 3, 3, True, F64, 2)], ids=str)
def test_random_warp_order(case: Case, seed: int) -> None:
    check(case, Simulator(80, mode="warp", seed=seed), blocks=lambda *_: [Block(64, 2)])


@pytest.mark.parametrize("dtype", [F32, F64])
def test_blocks_for_large_batches(dtype: torch.dtype) -> None:
    """Several samples a lane, in groups of several launches, and weight gradients in several parts."""
    largest = mlp.blocks("backward", 3, dtype, True)[0]
    assert largest.samples >= 512
    case = Case(1, 1, 9, largest.samples + 4, True, dtype, 2)
    simulator = Simulator(90)
    group = 2 * 2 * 3 * case.batch * dtype.itemsize * 2  # bytes of two segments of two states
    check(case, simulator, choose_block=lambda key, options, *_: _[-1](options[0]), _SCRATCH_BYTES=group, _SPLIT=512)
    assert simulator.launches.count("chain_recompute") == 2 * 2
