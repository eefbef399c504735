"""What each kernel should take on an H100, by the modelled cycles of docs/gpu_static.json: the table of docs/gpu.md.

``python -m benchmarks.gpu.roofline``. A model, not a measurement, of float32 in offset form, with the blocks that
``choose_block`` picks. Beside it what no schedule can beat: multiply-adds on the units that take them, load and store
wavefronts, the traffic of h and G to device memory. Where h and G fit the second-level cache, the truth lies below that
last one.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton

from benchmarks.gpu.modelled import resident
from benchmarks.gpu.static_figures import TABLE
from narrowdeep.ops import triton_backward, triton_chain, triton_shooting
from narrowdeep.ops.mlp import triton as mlp
from narrowdeep.ops.shooting import PASSES
from narrowdeep.ops.triton_common import MULTIPROCESSORS, Block, choose_block

DEPTH = 10_000
SEGMENT = 100
CLOCK = 1.83e9
BANDWIDTH = 3.35e12
CACHE = 50e6
FFMA_A_CYCLE = 128
"""Of a multiprocessor."""
LAUNCH = 3e-6
"""Seconds of a launch, which a CUDA graph would save most of."""
TURNS = 4
"""Of the segments of a trained network; later ones are launched and return at once."""
HMMA_CYCLES = 8
"""That one of 16 x 8 x 8 holds a scheduler's tensor core, as the model has it."""


@dataclass(frozen=True)
class Work:
    """Of one layer and sample: numbers of memory traffic beyond the weights; segments that run side by side."""

    traffic: int
    segments: int = 1


def work(kernel: str, width: int) -> Work:
    """Forward: boundaries are negligible. Recompute writes h; backward reads h and writes G; sums read both.

    The backward in one launch has traffic of its own, see ``memory_of_whole``.
    """
    return {
        "forward": Work(0),
        "recompute": Work(width, DEPTH // SEGMENT),
        "backward": Work(2 * width),
        "weight_gradient": Work(2 * width, DEPTH),
        "whole": Work(0),
    }[kernel]


def memory_of_whole(width: int, batch: int, programs: int) -> float:
    """Seconds: h of a segment goes out and comes back, the sums of programs too.

    The second-level cache keeps what was written last, and has to write that out too before it is written again.
    """
    segment = 4 * width * batch * SEGMENT
    sums = 2 * 4 * (width * width + width) * programs
    return (DEPTH / SEGMENT * max(0, 2 * segment - CACHE) + DEPTH * sums) / BANDWIDTH


def chosen(kernel: str, width: int, batch: int) -> Block:
    """The block of a batch."""
    if kernel == "weight_gradient":
        return Block(mlp.weight_gradient_block(width, torch.float32)[1], 4)
    x, weight = torch.empty(batch, 1, device="meta"), torch.empty(1, width, width, device="meta")
    found: list[Block] = []
    samples = batch * work(kernel, width).segments
    choose_block((), mlp.blocks(kernel, x, weight, True), samples, torch.device("cpu"), found.append)
    return found[0]


def cycles(row: dict[str, Any], block: Block, shared: int, programs: int, kind: str) -> float:
    """Cycles of a layer for ``programs`` programs on one multiprocessor, which takes them in turns if too many."""
    at_once = min(programs, resident(block.warps, row["registers"], shared))
    turns = math.ceil(programs / at_once)
    at_once = math.ceil(programs / turns)
    figures = {int(p): c for p, c in row[kind].items()}
    least = min((p for p in figures if p >= at_once), default=max(figures))
    return turns * figures[least] * max(1, at_once / least)


def _figures(kernel: str, width: int) -> dict[str, Any]:
    name = f"mlp {kernel} float32 {'' if kernel == 'weight_gradient' else 'offset '}n={width} sm_90"
    return json.loads(TABLE.read_text())[triton.__version__][name]


def times(kernel: str, width: int, batch: int) -> tuple[Block, dict[str, float]]:
    """Seconds for DEPTH layers: by memory, multiply-adds, load/store wavefronts, and modelled in L1 and in L2."""
    figures = _figures(kernel, width)
    block, todo = chosen(kernel, width, batch), work(kernel, width)
    row = figures["modelled"][f"{block.samples}/{block.warps}"]
    layers = DEPTH / todo.segments  # of one program
    steps = 1
    if kernel == "weight_gradient":  # an iteration takes the samples of a block and some rows of a layer
        rows = mlp.weight_gradient_block(width, torch.float32)[0]
        steps = math.ceil(min(batch, mlp._SPLIT) / block.samples)
        programs = todo.segments * math.ceil(batch / mlp._SPLIT) * math.ceil(width / rows)
    else:
        programs = todo.segments * math.ceil(batch / block.samples)
    share = math.ceil(programs / MULTIPROCESSORS)
    weights = 0 if kernel == "weight_gradient" else width * width + width
    memory = DEPTH * 4 * (weights + todo.traffic * batch) / BANDWIDTH
    if kernel == "whole":
        memory += memory_of_whole(width, batch, programs)
    if block.fragments:
        tiles = math.ceil(width / 8) ** 2 * math.ceil(batch / 16)
        arithmetic = DEPTH * 3 * tiles * HMMA_CYCLES / (4 * MULTIPROCESSORS)
    else:
        products = {"weight_gradient": width + 1, "whole": 3 * width + 1}.get(kernel, width)
        arithmetic = DEPTH * width * products * batch / (FFMA_A_CYCLE * MULTIPROCESSORS)
    moved = layers * steps * share * block.warps * row["wavefronts"]
    modelled = [
        layers * steps * cycles(row, block, figures["shared"], share, kind) / CLOCK for kind in ("cycles", "cycles_l2")
    ]
    bounds = {"memory": memory, "arithmetic": arithmetic / CLOCK, "load/store": moved / CLOCK}
    return block, bounds | {"L1": modelled[0], "L2": modelled[1]}


def expected(kernel: str, width: int, batch: int) -> float:
    """The longest of them: what the kernel is bound by."""
    return max(times(kernel, width, batch)[1].values())


def _shapes(width: int, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(batch, 1, device="meta"), torch.empty(DEPTH, width, width, device="meta")


def _seconds(kernel: str, width: int, programs: int, iterations: int) -> float:
    """Of so many programs that each take so many iterations of the one block that ``kernel`` has."""
    figures = _figures(kernel, width)
    ((name, row),) = figures["modelled"].items()
    samples, warps = map(int, name.split("/"))
    block = Block(samples, warps)
    share = math.ceil(programs / MULTIPROCESSORS)
    return iterations * cycles(row, block, figures["shared"], share, "cycles_l2") / CLOCK


def forward_seconds(width: int, batch: int, parallel: bool) -> tuple[int, float, int]:
    """(segments, seconds of the kernels, launches) of a forward, weights packed before."""
    x, weight = _shapes(width, batch)
    blocks = mlp.blocks("forward", x, weight, True)
    length = triton_shooting.segment_length("forward", mlp.FAMILY, x, weight, True, DEPTH) if parallel else 0
    if not length:
        return 1, expected("forward", width, batch), 2
    segments, programs = math.ceil(DEPTH / length), math.ceil(batch / blocks[-1].samples)
    joined = math.ceil(batch / triton_shooting.joining("forward", blocks[-1], width, x.dtype, segments)["BLOCK"])
    turn = _seconds("segments", width, programs * segments, length) + _seconds("join_states", width, joined, 1)
    return segments, TURNS * turn, 2 + 2 * PASSES[x.dtype]


def backward_seconds(width: int, batch: int, parallel: bool) -> tuple[int, float, int]:
    """The same of a backward; segments are those of the largest group."""
    x, weight = _shapes(width, batch)
    if mlp.supported("whole", x, weight):
        _, _, step = triton_backward.shares(mlp.FAMILY, x, weight, True, SEGMENT)
        return 1, expected("whole", width, batch), 2 + 2 * math.ceil(DEPTH / step)
    blocks = mlp.blocks("backward", x, weight, True)
    step = triton_chain.layers_a_group(torch.empty(width, batch, device="meta"), SEGMENT, torch.device("cpu"))
    samples, most, launches = blocks[-1].samples, 1, 1
    programs = math.ceil(batch / samples)
    seconds = sum(expected(kernel, width, batch) for kernel in ("recompute", "weight_gradient"))
    for first in range(0, DEPTH, step):
        layers = min(step, DEPTH - first)
        length = triton_shooting.segment_length("backward", mlp.FAMILY, x, weight, True, layers) if parallel else 0
        launches += 5 if length else 3
        if not length:
            seconds += expected("backward", width, batch) * layers / DEPTH
            continue
        segments = math.ceil(layers / length)
        most = max(most, segments)
        group = triton_shooting.joining("backward", blocks[-1], width, x.dtype, segments)["GROUP"]
        seconds += _seconds("jacobian", width, programs * width * (segments - 1), length)
        seconds += _seconds("join_gradients", width, programs, math.ceil((segments - 1) / group))
        seconds += _seconds("backward_segments", width, programs * segments, length)
    return most, seconds, launches


def print_depth_in_parallel() -> None:
    """Forward, and forward with backward, with segments side by side where the rule has them and in order."""
    print("| n | B | segments | forward | in order | segments back | with backward | in order |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for width in (4, 8):
        for batch in (128, 1024, 8192):
            cells = []
            before = {True: (0.0, 0), False: (0.0, 0)}
            for function in (forward_seconds, backward_seconds):
                for parallel in (True, False):
                    segments, seconds, launches = function(width, batch, parallel)
                    seconds, launches = seconds + before[parallel][0], launches + before[parallel][1]
                    before[parallel] = seconds, launches
                    if parallel:
                        cells.append(str(segments))
                    cells.append(f"{1e3 * seconds:.3f} + {1e3 * LAUNCH * launches:.3f}")
            print(f"| {width} | {batch:,} | {' | '.join(cells)} |")


def main() -> None:
    print("| kernel | n | B | block | memory | multiply-adds | load/store | modelled, L1 | first from L2 | expected |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for kernel in ("forward", "recompute", "backward", "weight_gradient", "whole"):
        for width in (4, 8, 16) if kernel != "whole" else (4,):
            for batch in (128, 65_536) if kernel != "whole" else (8192, 65_536):
                block, found = times(kernel, width, batch)
                cells = " | ".join(f"{1e3 * t:.2f}" for t in found.values())
                row = f"{kernel} | {width} | {batch:,} | {block.samples} / {block.warps} | {cells}"
                print(f"| {row} | {1e3 * expected(kernel, width, batch):.2f} ms |")
    print()
    print_depth_in_parallel()


if __name__ == "__main__":
    main()
