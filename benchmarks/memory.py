"""Planned against measured memory: ``python -m benchmarks.memory`` prints both tables of docs/memory.md.

Each network is measured at three depths under three budgets, from ample to the least that segments of equal length can
do with; and where binomial schedules run, with no more states than ``SNAPSHOTS``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from narrowdeep import DeepNarrowCNN, DeepNarrowMLP, memory
from narrowdeep.memory.planning import format_bytes

IMAGE = (7, 7)
BATCHES = (128, 512, 2048, 8192)
SEGMENT, SNAPSHOTS = 32, 3


@dataclass(frozen=True)
class Network:
    """A kind of network, ``samples`` a batch, and the depths that it is measured at."""

    name: str
    inputs: int
    outputs: int
    samples: int
    depths: tuple[int, ...]
    image: bool = False

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.inputs, *IMAGE) if self.image else (self.inputs,)

    def model(self, depth: int) -> DeepNarrowMLP | DeepNarrowCNN:
        return (DeepNarrowCNN if self.image else DeepNarrowMLP)(self.inputs, self.outputs, depth)


NETWORKS = (
    Network("MLP, width 4", 2, 1, 4096, (10_000, 30_000, 100_000)),
    Network("MLP, width 75", 64, 10, 1024, (300, 1000, 3000)),
    Network("MLP, width 795", 784, 10, 512, (50, 150, 450)),
    Network("CNN, 3 channels", 1, 1, 1024, (1000, 3000, 10_000), image=True),
    Network("CNN, 12 channels", 1, 10, 256, (100, 300, 900), image=True),
)


def budgets(network: Network, model: DeepNarrowMLP | DeepNarrowCNN) -> tuple[int, int, int]:
    """Bytes of a whole step: enough to save every state, the least that one state in so many layers needs, and half-way
    between that and what the plan makes of the first."""

    def total(checkpoint: Any, budget: int | None = None) -> int:
        model.checkpoint = checkpoint
        return memory.plan(model, batch_size=network.samples, input_shape=network.input_shape, budget=budget).total

    ample = total("none")
    layers = model.depth - 2
    least = min(total(-(-layers // count)) for count in range(1, math.isqrt(layers) + 2) if layers > count)
    least = min(least, *(total(segment) for segment in range(2, math.isqrt(layers) + 1)))
    return ample, (total("auto", ample) + least) // 2, least


def measure(network: Network, depth: int) -> Iterator[memory.MemoryProfile]:
    """A profile for each budget."""
    model = network.model(depth)
    x = torch.rand(network.samples, *network.input_shape)
    for budget in budgets(network, model):
        planned = memory.plan(model, batch_size=network.samples, input_shape=network.input_shape, budget=budget)
        model.checkpoint = planned.checkpoint
        yield memory.profile(model, x, eager=False)
    if network.image:
        model.checkpoint = (SEGMENT, SNAPSHOTS)
        model(x).sum().backward()  # torch's convolution sets itself up for the shapes of the first and the last layer
        yield memory.profile(model, x, eager=False)


def agrees(profiled: memory.MemoryProfile, least: int = 1 << 20) -> bool:
    """Whether plan and measurement are within 10%, or ``least`` bytes where that is more (the measurement is exact to
    about a megabyte). Below, also by the workspace of all threads but one: on a busy machine one thread may be done,
    and its workspace given back, before another begins."""
    planned = profiled.plan.total
    tolerance = max(planned // 10, least)
    threads = torch.get_num_threads()
    idle = profiled.plan.parts["workspace"] * (threads - 1) // threads
    return planned - tolerance - idle < profiled.measured < planned + tolerance


def beyond_what_grows(samples: int, *, depth: int = 3000, segment: int = 64) -> tuple[int, int]:
    """What an MLP of width 4 takes at its peak beyond the parts of its plan that grow with the batch, as it must:
    (planned, measured) bytes without input and output, boundaries and the state of the backward."""
    model = DeepNarrowMLP(2, 1, depth, checkpoint=segment)
    profiled = memory.profile(model, torch.rand(samples, 2), eager=False)
    grows = sum(profiled.plan.parts[name] for name in ("input and output", "boundaries", "backward state"))
    return profiled.plan.total - grows, profiled.measured - grows


def main() -> None:
    print(f"| network | depth | ample | half-way | least | {SNAPSHOTS} states |\n| --- | --- | --- | --- | --- | --- |")
    for network in NETWORKS:
        for depth in network.depths:
            cells = [f"{format_bytes(p.plan.total)}, {p.measured / p.plan.total:.3f}" for p in measure(network, depth)]
            print(f"| {network.name} | {depth:,} | {' | '.join(cells)} |{'' if network.image else ' |'}", flush=True)
    print("\n| batch | planned | measured |\n| --- | --- | --- |")
    for samples in BATCHES:
        print(f"| {samples} | {' | '.join(map(format_bytes, beyond_what_grows(samples)))} |", flush=True)


if __name__ == "__main__":
    main()
