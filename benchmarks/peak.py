"""What no program can beat on this machine: ``python -m benchmarks.peak`` prints it for every instruction set.

Multiply-adds are counted in registers, in a loop of independent ones on all threads; their latency is that of a chain
of them. Memory is measured by the triad of STREAM (McCalpin, 1995), a = b + 3 c. In one thread time is that of the
processor, so that other programs do not count; in several it is that of the clock.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from narrowdeep.ops import engine

ROUNDS = 20_000  # a millisecond or a few
TRIAD_NUMBERS = 1 << 25  # an array of 128 MiB


@dataclass(frozen=True)
class Limits:
    """Of the instruction set that runs, in SI units."""

    peak_flops: float
    """Floating-point operations a second, all threads, float32; a multiply-add is two."""
    peak_flops_double: float
    latency: float
    """Seconds from one multiply-add to the next that needs it."""
    bandwidth: float
    """Bytes a second from and to memory."""
    cache_bytes: int
    """Of the last-level cache; what fits there does not wait for memory."""

    def seconds(self, *, flops: float, dependent: float, traffic: float) -> dict[str, float]:
        """The least time of some work by what bounds it: operations, those that wait for one another, and bytes."""
        return {
            "arithmetic": flops / self.peak_flops,
            "latency": dependent * self.latency,
            "bandwidth": traffic / self.bandwidth if traffic > self.cache_bytes else 0.0,
        }


def clock() -> Callable[[], float]:
    """What times are read from: the processor's in one thread."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def least_time(run: Callable[[], Any], repeats: int) -> float:
    """Seconds of the fastest of some runs, after one that does not count."""
    now, best = clock(), float("inf")
    for i in range(repeats + 1):
        start = now()
        run()
        best = min(best, now() - start) if i else best
    return best


def _rate(*, independent: bool, double: bool = False) -> float:
    """Of ``engine.multiply_adds``: what it counts, a second."""

    def run() -> int:
        return engine.multiply_adds(ROUNDS, independent=independent, double=double)

    return run() / least_time(run, 20)


def measured_limits() -> dict[str, Any]:
    """``Limits`` of this machine, as a dict for JSON files."""
    b, c, a = torch.ones(TRIAD_NUMBERS), torch.ones(TRIAD_NUMBERS), torch.empty(TRIAD_NUMBERS)
    triad = least_time(lambda: torch.add(b, c, alpha=3.0, out=a), 5)
    try:
        cache = os.sysconf("SC_LEVEL3_CACHE_SIZE")
    except (ValueError, OSError):
        cache = 0
    limits = Limits(
        peak_flops=_rate(independent=True),
        peak_flops_double=_rate(independent=True, double=True),
        latency=1 / _rate(independent=False),
        bandwidth=3 * a.numel() * a.element_size() / triad,
        cache_bytes=cache if cache > 0 else 32 << 20,
    )
    return asdict(limits)


def main() -> None:
    names = engine.instruction_sets()
    before = os.environ.get("NARROWDEEP_ISA")
    print(f"{torch.get_num_threads()} threads\n| | float32, GFLOP/s | float64, GFLOP/s | latency, ns | memory, GB/s |")
    print("| --- | ---: | ---: | ---: | ---: |")
    try:
        for name in names:
            os.environ["NARROWDEEP_ISA"] = name
            found = Limits(**measured_limits())
            rates = f"{found.peak_flops / 1e9:.0f} | {found.peak_flops_double / 1e9:.0f}"
            print(f"| {name} | {rates} | {found.latency * 1e9:.2f} | {found.bandwidth / 1e9:.1f} |", flush=True)
    finally:
        os.environ.pop("NARROWDEEP_ISA") if before is None else os.environ.update(NARROWDEEP_ISA=before)


if __name__ == "__main__":
    main()
