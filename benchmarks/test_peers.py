"""Times of every peer on every workload: ``make bench``, or ``pytest benchmarks --benchmark-json=bench.json``.

``-m "not slow"`` leaves out torch.compile, ``-k "cnn and forward"`` and the like select by the names below.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import pytest

from benchmarks.peers import PEERS, Compiled, JaxScan
from benchmarks.workloads import (
    CNN_WORKLOADS,
    NTK_WORKLOADS,
    WORKLOADS,
    Answer,
    Measure,
    Workload,
    check,
    make_problem,
    truth,
)

# Peers may warn (a deprecation inside JAX, a hint of the compiler); none of that is a result.
pytestmark = pytest.mark.filterwarnings("default")

SECONDS = 1.0
"""Time for one benchmark, unless its fewest rounds take longer."""
ROUNDS = (3, 200)


def cases() -> list[Any]:
    """Every (workload, measure, peer), those of one workload and measure together: their ratios are then of one run."""
    found = []
    for number, workload in enumerate(WORKLOADS):
        family = "ntk" if workload in NTK_WORKLOADS else "cnn" if workload in CNN_WORKLOADS else "mlp"
        for measure in workload.floors:
            for peer in PEERS:
                if peer.takes(workload, measure):
                    marks = [pytest.mark.slow] if peer is Compiled else []
                    name = f"{family}{number}-{measure}-{peer.name}"
                    found.append(pytest.param(workload, measure, peer, marks=marks, id=name))
    return found


@functools.lru_cache(maxsize=1)
def right_answer(workload: Workload, measure: Measure) -> Answer:
    return truth(make_problem(workload), measure)


@pytest.mark.parametrize(("workload", "measure", "peer"), cases())
def test_speed(benchmark: Any, workload: Workload, measure: Measure, peer: Any) -> None:
    if peer is JaxScan:
        pytest.importorskip("jax", reason="JAX is an optional peer: pip install 'narrowdeep[peers]'")
    contender = peer(make_problem(workload))
    contender.run(measure)
    error = check(contender.answer(measure), right_answer(workload, measure), contender.tolerance)

    start = time.perf_counter()
    contender.run(measure)
    rounds = int(SECONDS / (time.perf_counter() - start))
    benchmark.group = f"{workload.name}: {measure}"
    benchmark.extra_info.update(
        workload=workload.name,
        measure=measure,
        peer=peer.name,
        error=error,
        flops=workload.flops(measure),
        dependent=workload.dependent(measure),
        traffic=workload.traffic(measure),
        floors=dict(workload.floors[measure]),
    )
    benchmark.pedantic(contender.run, args=(measure,), rounds=min(max(rounds, ROUNDS[0]), ROUNDS[1]))
