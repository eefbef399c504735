"""What each kernel of the MLP chain could at best take on an A100 and an H100: the table of docs/gpu.md, as Markdown.

``python -m benchmarks.gpu.roofline``. A model, not a measurement, of float32 in plain form: multiply-adds, issued
instructions (from docs/gpu_static.json) and the chain of dependent instructions of one layer each give a time that no
run can beat. Memory traffic is taken at the bandwidth of device memory; where h and G fit the second-level cache, the
truth lies below that column.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from benchmarks.gpu.static_figures import TABLE

DEPTH = 10_000
LATENCY = 4  # cycles from one FFMA to the next that needs it
LOAD = 33  # cycles of a load that hits the first-level cache


@dataclass(frozen=True)
class Device:
    """``cycles_a_product``: issue cycles of a warp's FFMA on one of 4 schedulers."""

    name: str
    multiprocessors: int
    clock: float
    bandwidth: float
    cycles_a_product: int


DEVICES = (Device("A100", 108, 1.41e9, 1.555e12, 2), Device("H100", 132, 1.83e9, 3.35e12, 1))


@dataclass(frozen=True)
class Work:
    """Of one layer and one sample: multiply-adds, and numbers of memory traffic beyond the weights."""

    products: int
    traffic: int


def work(kernel: str, width: int) -> Work:
    """Forward: boundaries are negligible. Recompute writes h; backward reads h and writes G; sums read both."""
    n = width
    return {
        "forward": Work(n * n, 0),
        "recompute": Work(n * n, n),
        "backward": Work(n * n, 2 * n),
        "weight_gradient": Work(n * n + n, 2 * n),
    }[kernel]


def floor(kernel: str, width: int, batch: int, device: Device) -> dict[str, float]:
    """Seconds for DEPTH layers by memory, arithmetic, issue, and latency."""
    form = "" if kernel == "weight_gradient" else "plain "
    tables = json.loads(TABLE.read_text())
    figures = tables[max(tables)][f"mlp {kernel} float32 {form}n={width} sm_90"]
    todo = work(kernel, width)
    schedulers = 4 * device.multiprocessors
    weights = 0 if kernel == "weight_gradient" else width * width + width
    memory = DEPTH * 4 * (weights + todo.traffic * batch) / device.bandwidth
    arithmetic = DEPTH * todo.products * batch / (32 * schedulers) * device.cycles_a_product / device.clock
    products = figures["fma"] * figures["loop"]
    cycles = figures["loop"] + products * (device.cycles_a_product - 1)
    lanes = products / todo.products * 32  # samples a warp has served after one turn of the loop
    issue = DEPTH * cycles * batch / lanes / schedulers / device.clock
    chain = width * LATENCY + 2 * LATENCY + (LOAD if kernel == "backward" else 0)
    latency = DEPTH * chain / device.clock if kernel in ("forward", "backward") else 0.0
    if kernel == "recompute":  # segments of 64 layers side by side
        latency = 64 * chain / device.clock
    return {"memory": memory, "arithmetic": arithmetic, "issue": issue, "latency": latency}


def main() -> None:
    print("| kernel | n | device | B | memory | arithmetic | issue | latency | expected |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for kernel in ("forward", "recompute", "backward", "weight_gradient"):
        for width in (4, 8, 16):
            for device in DEVICES:
                for batch in (128, 65_536):
                    times = floor(kernel, width, batch, device)
                    cells = " | ".join(f"{1e3 * t:.2f}" if t else "-" for t in times.values())
                    expected = f"{1e3 * max(times.values()):.2f} ms"
                    print(f"| {kernel} | {width} | {device.name} | {batch:,} | {cells} | {expected} |")


if __name__ == "__main__":
    main()
