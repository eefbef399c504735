"""The plan agrees with what is measured, and only what it says grows with the batch does."""

from __future__ import annotations

import sys

import pytest

from benchmarks.memory import BATCHES, NETWORKS, Network, agrees, beyond_what_grows, budgets, measure

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the process's peak can be reset on Linux only")

MEGABYTE = 1 << 20


def _check(network: Network, depth: int, least: int) -> None:
    """Within 10%, or ``least`` bytes where that is more."""
    profiles = list(measure(network, depth))
    for profiled in profiles:
        assert agrees(profiled, least), profiled
    for profiled, budget in zip(profiles[:3], budgets(network, network.model(depth)), strict=True):
        assert profiled.plan.total <= budget
    assert profiles[0].plan.total >= profiles[1].plan.total >= profiles[2].plan.total


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.name)
def test_plan_and_measured_peak_agree(network: Network) -> None:
    for depth in network.depths:
        _check(network, depth, 0)


@pytest.mark.parametrize("network", [n for n in NETWORKS if n.inputs < 784], ids=lambda network: network.name)
def test_plan_and_measured_peak_agree_at_the_smallest_depth(network: Network) -> None:
    _check(network, network.depths[0], MEGABYTE)  # what the measurement is exact to, where other tests went before


def test_only_the_parts_that_the_plan_lists_grow_with_the_batch() -> None:
    planned, measured = zip(*(beyond_what_grows(samples) for samples in BATCHES), strict=True)
    # From 33 tiles a thread on sums are made in blocks, which takes a group's gradients once more, however many tiles.
    assert planned[0] == planned[1]
    assert len(set(planned)) <= 2
    assert max(planned) < 2 * planned[0]
    for most, found in zip(planned, measured, strict=True):
        assert found < most + MEGABYTE
