"""``python -m benchmarks.map --plot map.png``: narrowdeep against its peers over shapes, not over a few workloads.

Every cell is a network of some shape, so deep that a call takes milliseconds, on one batch. Contenders take turns, and
the least time of each counts: the processor's with one thread, the clock's with several. Answers are checked first
(``benchmarks.workloads``). ``--short`` leaves out most cells and every peer but eager layers.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.peak import Limits, clock, measured_limits
from benchmarks.peers import Compiled, Eager, JaxScan, Narrowdeep, Peer
from benchmarks.workloads import Measure, Workload, check, make_problem, truth

MEASURES: tuple[Measure, ...] = ("forward", "forward + backward")
OURS = Narrowdeep.name

WIDTHS = (3, 4, 9, 16, 33, 75, 128, 200, 400, 800)  # 3 is the least that offset form has
BATCHES = (1, 2, 4, 8, 16, 37, 128, 1024)
CHANNELS = (3, 5, 12, 16, 32)
IMAGES = (1, 7, 16, 28)
FILTERS = (1, 3, 5, 7)
CNN_BATCHES = {1: (1, 8, 128), 3: (1, 2, 8, 37, 512), 5: (1, 16), 7: (1, 4, 64)}
"""By filter: the whole product would take an hour."""

DEPTHS = (10, 100)
FORWARD_FLOPS = 2e8
"""Of a network that is neither of the least nor of the greatest depth."""
MOST_FLOPS = 6e9
"""Of a forward; larger cells are left out."""
SECONDS = 0.2
"""For all contenders of a cell and a measure, at least; and no fewer rounds than three."""


@dataclass(frozen=True)
class Cell:
    """A workload that has been timed, by measure and peer, and what bounds it: ``Limits.seconds``."""

    name: str
    width: int
    batch: int
    image: int
    """Rows and columns; 0 for an MLP."""
    kernel_size: int
    measure: str
    seconds: dict[str, float]
    bounds: dict[str, float]

    def ratio(self, peer: str = Eager.name) -> float:
        """The peer's time over narrowdeep's."""
        return self.seconds[peer] / self.seconds[OURS]

    def bound(self) -> tuple[str, float]:
        """What bounds the cell most, and the share of narrowdeep's time that it would take."""
        name = max(self.bounds, key=self.bounds.__getitem__)
        return name, self.bounds[name] / self.seconds[OURS]


def workload(width: int, batch: int, image: int = 0, kernel_size: int = 3) -> Workload:
    """Of so many units or channels, half of which are inputs; as deep as ``DEPTHS`` and ``FORWARD_FLOPS`` say."""
    inputs = max(1, (width - 1) // 2)
    shape = {"image": (image, image), "kernel_size": kernel_size} if image else {}
    two, three = (
        Workload(inputs, width - 1 - inputs, depth, batch, {}, **shape).flops("forward") or 0  # type: ignore[arg-type]
        for depth in (2, 3)
    )
    depth = min(max(DEPTHS[0], int((FORWARD_FLOPS - two) / (three - two)) + 2), DEPTHS[1])
    return Workload(inputs, width - 1 - inputs, depth, batch, {}, **shape)  # type: ignore[arg-type]


def workloads(short: bool = False) -> Iterator[Workload]:
    """Of every cell that is not too large; ``short``: of about a fifth of them."""
    for width in (4, 33, 128, 800) if short else WIDTHS:
        for batch in (1, 16, 128) if short else BATCHES:
            yield workload(width, batch)
    for channels in (3, 12, 32) if short else CHANNELS:
        for image in (7, 28) if short else IMAGES:
            for size in (3, 7) if short else FILTERS:
                for batch in (1, 16) if short else CNN_BATCHES[size]:
                    found = workload(channels, batch, image, size)
                    if (found.flops("forward") or 0) <= MOST_FLOPS:
                        yield found


def in_turns(contenders: Iterable[Peer], measure: Measure) -> dict[str, float]:
    """Least seconds of each."""
    contenders, now = list(contenders), clock()
    best = {contender.name: float("inf") for contender in contenders}
    start, rounds = time.perf_counter(), 0
    while rounds < 3 or time.perf_counter() - start < SECONDS:
        for contender in contenders:
            begin = now()
            contender.run(measure)
            best[contender.name] = min(best[contender.name], now() - begin)
        rounds += 1
    return best


def measured(work: Workload, peers: Iterable[Any], limits: Limits) -> Iterator[Cell]:
    """A cell for each measure.

    Raises: AssertionError where an answer is wrong.
    """
    problem = make_problem(work)
    contenders: list[Peer] = [peer(problem) for peer in peers]
    for measure in MEASURES:
        right = truth(problem, measure)
        for contender in contenders:
            contender.run(measure)
            check(contender.answer(measure), right, contender.tolerance)
        bounds = limits.seconds(
            flops=work.flops(measure) or 0,
            dependent=work.dependent(measure) or 0,
            traffic=work.traffic(measure) or 0,
        )
        image, size = (work.image[0], work.kernel_size) if work.image else (0, 0)
        times = in_turns(contenders, measure)
        yield Cell(work.name, work.width, work.batch, image, size, measure, times, bounds)


def peers_of(work: Workload, short: bool, jax: bool) -> list[Any]:
    """Compiling dozens of networks takes longer than all else: torch.compile gets a few of ten layers, and JAX, which
    compiles one layer at any depth, no convolutions that it takes seconds for."""
    peers: list[Any] = [Eager, Narrowdeep]
    if short:
        return peers
    if jax and work.kernel_size == 3 and work.batch in (1, 128, 512) and (work.flops("forward") or 0) <= FORWARD_FLOPS:
        peers.append(JaxScan)
    if work.depth == DEPTHS[0] and work.batch in (16, 512, 1024):
        peers.append(Compiled)
    return peers


def summary(cells: list[Cell]) -> str:
    """Peers, and below it every cell in which one of them was faster."""
    lines = [
        "| peer | measure | cells | least | median | faster than narrowdeep in |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for peer in sorted({peer for cell in cells for peer in cell.seconds} - {OURS}):
        for measure in MEASURES:
            ratios = sorted(c.ratio(peer) for c in cells if c.measure == measure and peer in c.seconds)
            if ratios:
                middle, low = ratios[len(ratios) // 2], sum(ratio < 1 for ratio in ratios)
                lines.append(f"| {peer} | {measure} | {len(ratios)} | {ratios[0]:.2f}x | {middle:.2f}x | {low} |")
    for cell in cells:
        for peer in cell.seconds:
            if peer != OURS and cell.ratio(peer) < 1:
                name, share = cell.bound()
                lines.append(
                    f"{cell.ratio(peer):.2f}x of {peer}: {cell.name}, {cell.measure} ({share:.0%} of the {name} bound)"
                )
    return "\n".join(lines)


def plot(cells: list[Cell], path: Path, peer: str = Eager.name) -> None:
    """A heat map of the ratios for each family and measure: shapes down, images and batches across."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import TwoSlopeNorm

    def panels(image: bool) -> tuple[list[Any], list[Any]]:
        mine = [c for c in cells if bool(c.image) == image]
        rows = sorted({(c.width, c.kernel_size) for c in mine})
        return rows, sorted({(c.image, c.batch) for c in mine})

    shapes = {image: panels(image) for image in (False, True)}
    heights = [max(1, len(shapes[image][0])) for image in (False, True)]
    figure, axes = plt.subplots(
        2,
        2,
        figsize=(20, 2.5 + 0.28 * sum(heights)),
        layout="constrained",
        gridspec_kw={"height_ratios": heights, "width_ratios": (1, 1)},
    )
    norm = TwoSlopeNorm(vmin=-1, vcenter=0, vmax=5)  # of the logarithm to base 2: a half, equal, 32 times
    for image, pair in zip((False, True), axes, strict=True):
        rows, columns = shapes[image]
        for measure, ax in zip(MEASURES, pair, strict=True):
            grid = torch.full((len(rows), len(columns)), float("nan"))
            for c in cells:
                if bool(c.image) == image and c.measure == measure and peer in c.seconds:
                    y, x = rows.index((c.width, c.kernel_size)), columns.index((c.image, c.batch))
                    ratio = c.ratio(peer)
                    grid[y, x] = ratio
                    text = f"{ratio:.2f}" if ratio < 2 else f"{ratio:.1f}" if ratio < 10 else f"{ratio:.0f}"
                    ax.text(x, y, text, ha="center", va="center", fontsize=6, weight="bold" if ratio < 1 else "normal")
            picture = ax.imshow(grid.log2().numpy(), norm=norm, cmap="RdYlGn", aspect="auto")
            kind = "channels, filter" if image else "width"
            ax.set_ylabel(kind)
            ax.set_yticks(range(len(rows)), [f"{w}, {k}x{k}" if image else str(w) for w, k in rows], fontsize=7)
            firsts = [x for x, (size, _) in enumerate(columns) if x == 0 or columns[x - 1][0] != size]
            labels = [str(batch) for _, batch in columns]
            if image:  # each image once, under its first batch
                for x in firsts:
                    labels[x] += f"\n{columns[x][0]}x{columns[x][0]}"
                    ax.axvline(x - 0.5, color="grey", linewidth=0.5)
            ax.set_xticks(range(len(columns)), labels, fontsize=6)
            ax.set_xlabel("batch, image" if image else "batch")
            ax.set_title(f"{'CNN' if image else 'MLP'}: {measure}, {peer} over {OURS}", fontsize=10)
    bar = figure.colorbar(picture, ax=axes, shrink=0.6, ticks=range(-1, 6))
    bar.ax.set_yticklabels(["0.5x", "1x", "2x", "4x", "8x", "16x", "32x"])
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.map", description=__doc__)
    parser.add_argument("--short", action="store_true", help="a fifth of the cells, against eager layers")
    parser.add_argument("--json", type=Path, default=Path("map.json"), help="where the cells go")
    parser.add_argument("--plot", type=Path, default=Path("map.png"), help="where the heat map goes")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.threads == 1:  # JAX reads it once
        os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
        os.environ.setdefault("NPROC", "1")
    jax = importlib.util.find_spec("jax") is not None
    limits = Limits(**measured_limits())
    print(f"{options.threads} threads, {limits.peak_flops / 1e9:.0f} GFLOP/s, {limits.bandwidth / 1e9:.1f} GB/s")
    cells: list[Cell] = []
    for work in workloads(options.short):
        found = list(measured(work, peers_of(work, options.short, jax), limits))
        cells += found
        ratios = ", ".join(f"{c.ratio():.2f}x" for c in found)
        print(f"{work.name}: {ratios}", flush=True)
        options.json.write_text(json.dumps({"limits": asdict(limits), "cells": [asdict(c) for c in cells]}))
    print(f"\n{summary(cells)}")
    plot(cells, options.plot)
    print(f"heat map: {options.plot}")


if __name__ == "__main__":
    main()
