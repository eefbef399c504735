"""``python -m benchmarks.crossover``: where torch's own operators, a layer at a time, are faster than the engine.

The engine, ``narrowdeep.ops.layered`` (oneDNN and MKL, in place, with the same results) and eager layers take turns on
every cell of ``benchmarks.map``. A path by shape would pay where the second is faster than the first and no change of
the engine makes that up: docs/benchmarks.md has what was found.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.map import OURS, Cell, measured, workloads
from benchmarks.peak import Limits, measured_limits
from benchmarks.peers import Eager, Narrowdeep, Peer
from benchmarks.workloads import Answer, Measure, Problem
from narrowdeep.modules.base import PARAMETER_NAMES
from narrowdeep.ops.cnn import layered as cnn
from narrowdeep.ops.mlp import layered as mlp


class Layered(Peer):
    """The ops of a span through torch's operators; every state is saved, which is the fastest."""

    name = "layer by layer"
    measures = ("forward", "forward + backward")

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.tolerance = Narrowdeep(problem).tolerance
        model, work = problem.model, problem.workload
        self.params = [getattr(model, name).detach() for name in PARAMETER_NAMES]
        self.settings = model.scale, work.form == "offset", work.outputs, 0
        self.forward, self.backward = (
            (mlp.mlp_forward, mlp.mlp_backward) if work.image is None else (cnn.cnn_forward, cnn.cnn_backward)
        )

    @torch.no_grad()
    def run(self, measure: Measure) -> None:
        segment = 0 if measure == "forward" else 1
        self.output, saved = self.forward(self.x, *self.params, *self.settings, segment)
        if segment:
            args = (*self.params, saved, *self.settings, segment, False, True)
            self.grads = self.backward(self.cotangent, self.x, *args)[1:]

    def answer(self, measure: Measure) -> Answer:
        grads = dict(zip(PARAMETER_NAMES, self.grads, strict=True)) if measure != "forward" else {}
        return {"output": self.output, **grads}


def table(cells: list[Cell]) -> str:
    """Milliseconds of each, and the ratios over narrowdeep's."""
    lines = [f"| work | measure | {OURS}, ms | {Layered.name} | eager |", "| --- | --- | ---: | ---: | ---: |"]
    for cell in cells:
        ratios = f"{cell.ratio(Layered.name):.2f}x | {cell.ratio():.2f}x"
        lines.append(f"| {cell.name} | {cell.measure} | {cell.seconds[OURS] * 1e3:.3g} | {ratios} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.crossover", description=__doc__)
    parser.add_argument("--short", action="store_true", help="fewer cells")
    parser.add_argument("--rows", type=int, default=30, help="of the table: the cells with the least ratios")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    limits = Limits(**measured_limits())
    peers = (Eager, Narrowdeep, Layered)
    cells = [cell for work in workloads(options.short) for cell in measured(work, peers, limits)]
    cells.sort(key=lambda cell: min(cell.ratio(), cell.ratio(Layered.name)))
    print(table(cells[: options.rows]))
    for name in (Layered.name, Eager.name):
        ratios = sorted(cell.ratio(name) for cell in cells)
        faster, speed = sum(ratio < 1 for ratio in ratios), 1 / ratios[0]
        print(f"{name}: faster than the engine in {faster} of {len(cells)} cells, at best {speed:.2f}x as fast")


if __name__ == "__main__":
    main()
