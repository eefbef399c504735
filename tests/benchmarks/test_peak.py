"""The loop of multiply-adds counts what it does, and bounds are what they say."""

from __future__ import annotations

import pytest
import torch

from benchmarks import peak
from narrowdeep.ops import engine


@pytest.mark.parametrize("isa", engine.instruction_sets())
def test_operations_are_counted(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NARROWDEEP_ISA", isa)
    lanes = {"avx512": 16, "avx2": 8, "neon": 4, "scalar": 1}[isa]
    one = engine.multiply_adds(1, independent=True, double=False)
    length = engine.multiply_adds(1, independent=False, double=False)
    chains, rest = divmod(one, 2 * lanes * length * torch.get_num_threads())
    assert rest == 0
    assert chains >= 8
    assert engine.multiply_adds(7, independent=True, double=False) == 7 * one
    assert engine.multiply_adds(7, independent=False, double=True) == 7 * length
    assert engine.multiply_adds(1, independent=True, double=True) == one // (1 if lanes == 1 else 2)


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NARROWDEEP_ISA", "abacus")
    with pytest.raises(ValueError, match="NARROWDEEP_ISA must be one of"):
        engine.multiply_adds(1, independent=True, double=False)


def test_limits_are_those_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "TRIAD_NUMBERS", 1 << 20)
    found = peak.Limits(**peak.measured_limits())
    assert 1e-10 < found.latency < 1e-7
    assert 1e8 < found.bandwidth < 1e13
    # One chain does an operation a lane and latency; what is independent overlaps.
    assert found.peak_flops > 2 / found.latency
    assert found.peak_flops > 0.9 * found.peak_flops_double


def test_bounds_are_divisions_by_the_limits() -> None:
    limits = peak.Limits(peak_flops=2e11, peak_flops_double=1e11, latency=2e-9, bandwidth=1e10, cache_bytes=1000)
    found = limits.seconds(flops=4e11, dependent=100, traffic=5e9)
    assert found == pytest.approx({"arithmetic": 2.0, "latency": 2e-7, "bandwidth": 0.5})
    assert limits.seconds(flops=1, dependent=1, traffic=1000)["bandwidth"] == 0
