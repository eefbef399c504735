"""Cycles of a compiled kernel's hot loop, by a model of the machine that executes the binary's own scheduling codes.

The model is a tool outside this repository, found through the environment variable NARROWDEEP_SASSTIME (its folder). It
knows no device memory, no instruction cache and no clock, and nothing has calibrated it: its figures compare variants
and keep them from getting worse.
"""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TARGET = 90
"""The one architecture whose binaries are modelled."""

MULTIPROCESSOR = {"registers": 65_536, "threads": 2_048, "shared": 227 << 10}
"""What the programs on one share (H100)."""

PROGRAMS = (1, 2, 4, 8)
"""At once on a multiprocessor."""

L2_LATENCY = 200
"""Cycles of the first touch of a sector, and of whatever another kernel wrote."""

WORSE = 1.05


@dataclass(frozen=True)
class Modelled:
    """Of one layer and one warp: an iteration of the hot loop where that is not the loop over layers, the whole program
    where there is none.

    ``cycles`` and ``cycles_l2``: by programs on a multiprocessor, with weights in the first-level cache, and with
    weights and states first touched in the second-level cache.
    """

    registers: int
    waits: float
    stall: float
    wavefronts: float
    cycles: dict[str, float]
    cycles_l2: dict[str, float]


def tool() -> Any | None:
    """The model's module, or None where it is not installed."""
    folder = os.environ.get("NARROWDEEP_SASSTIME")
    if not folder or not (Path(folder) / "sasstime.py").is_file():
        return None
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module("sasstime")


def resident(warps: int, registers: int, shared: int) -> int:
    """Programs that fit a multiprocessor."""
    limits = [
        MULTIPROCESSOR["registers"] // (-(-registers // 8) * 8 * 32 * warps),
        MULTIPROCESSOR["threads"] // (32 * warps),
    ]
    if shared:
        limits.append(MULTIPROCESSOR["shared"] // shared)
    return max(1, min(limits))


def _two_loops(sasstime: Any, cubin: bytes) -> tuple[Any, Any]:
    """The innermost loops with the most multiply-adds of those that sum over lanes and of those that do not."""
    code, labels = sasstime.disassemble(cubin)
    every = sasstime.loops(code, labels)
    inner = [(a, b) for a, b in every if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in every)]
    bodies = sorted((code[a : b + 1] for a, b in inner), key=lambda body: -sasstime.summary(body)["multiply-adds"])
    summing = [any(i.base == "SHFL" for i in body) for body in bodies]
    return bodies[summing.index(True)], bodies[summing.index(False)]


def model(
    cubin: bytes, warps: int, registers: int, shared: int, products: float, again: float = 0
) -> Modelled | None:  # fmt: skip
    """``products``: multiply-add instructions of one layer and warp, 0 where an iteration is what counts.

    ``again``: the same of a second loop over the same layers, which computes their states again, while the hot loop
    sums over lanes; 0 where there is none.
    """
    sasstime = tool()
    if sasstime is None:
        return None
    if again:
        loops = list(zip(_two_loops(sasstime, cubin), (products, again), strict=True))
    else:
        code, labels = sasstime.disassemble(cubin)
        loops = [(sasstime.hot_loop(cubin) if sasstime.loops(code, labels) else code, products)]
    found = [sasstime.summary(body) for body, _ in loops]
    layers = [
        max(1, round(f["multiply-adds"] / count)) if count else 1 for f, (_, count) in zip(found, loops, strict=True)
    ]
    times: list[dict[str, float]] = []
    for l2 in (None, L2_LATENCY):
        times.append({})
        for programs in PROGRAMS:
            if programs <= resident(warps, registers, shared):
                schedulers = min(4, warps * programs)
                load = {"warps": -(-warps * programs // schedulers), "schedulers": schedulers}
                cycles = sum(
                    sasstime.cycles(body, l2=l2, predicated=l2, **load) / count
                    for (body, _), count in zip(loops, layers, strict=True)
                )
                times[-1][str(programs)] = round(cycles, 1)
    names = ("scoreboard waits", "stall cycles", "load/store wavefronts")
    counts = (round(sum(f[name] / n for f, n in zip(found, layers, strict=True)), 1) for name in names)
    return Modelled(registers, *counts, *times)


def worse(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Figures of a row (by block) that take over 5% more cycles than before: each block's, and the best of all."""
    found = []
    for kind in ("cycles", "cycles_l2"):
        for block in old.keys() & new.keys():
            for programs, cycles in new[block][kind].items():
                before = old[block][kind].get(programs)
                if before is not None and cycles > WORSE * before:
                    found.append(f"{block}, {kind} at {programs}: {before} -> {cycles}")
        if old and new:
            before, after = (
                min(c / (int(p) * int(b.split("/")[0])) for b, row in rows.items() for p, c in row[kind].items())
                for rows in (old, new)
            )
            if after > WORSE * before:
                found.append(f"{kind} a sample at best: {before:.3f} -> {after:.3f}")
    return found
