"""What two ranks take, and one process: ``python -m benchmarks.ranks`` prints the numbers of beyond_one_machine.md.

Peaks are the most that a process has had resident above what it had before, the interpreter and torch loaded; Linux
only. Nothing is printed of a result that is not right.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing
from torch.distributed import pipelining

from narrowdeep import DeepNarrowMLP
from narrowdeep.distributed import solve, stages, write_kernel
from narrowdeep.memory.sizes import format_bytes
from narrowdeep.ntk import limit_ntk_mlp

MICRO_BATCHES = 4
CHUNKS = 16
"""Of the network: a gradient of a micro-batch is there beside the sum of them, one chunk at a time."""


def resident(name: str) -> int:
    """``VmRSS`` or ``VmHWM`` in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def rank(index: int, ranks: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Save what ``function`` returns, and the peak, for ``measured``."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=index, world_size=ranks)
        dist.all_reduce(torch.ones(1))
    DeepNarrowMLP(4, 3, 50, chunks=2)(torch.rand(4, 4)).sum().backward()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    result = function(index, folder, *arguments)
    torch.save((result, resident("VmHWM") - before), f"{folder}/{index}")
    if ranks > 1:
        dist.destroy_process_group()


def measured(function: Callable[..., Any], ranks: int, *arguments: Any) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(rank, (ranks, folder, function, arguments), nprocs=ranks)
        return [torch.load(f"{folder}/{i}") for i in range(ranks)]


def loss(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction - target).square().sum()


def batch(size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(size, 4, generator=generator), torch.rand(size, 3, generator=generator)


def one_process(index: int, folder: str, depth: int, size: int) -> Any:
    model = DeepNarrowMLP(4, 3, depth, chunks=CHUNKS)
    model.reset_parameters(torch.Generator().manual_seed(5))
    optimizer = torch.optim.SGD(model.parameters(), 0.1 * model.ntk_lr)
    x, y = batch(size)
    for _ in range(2):
        for part, target in zip(x.chunk(MICRO_BATCHES), y.chunk(MICRO_BATCHES), strict=True):
            loss(model(part), target).backward()
        for param in model.parameters():
            assert param.grad is not None
            param.grad.div_(MICRO_BATCHES)
        optimizer.step()
        optimizer.zero_grad()
    return model.hidden_weight[-1][-1].detach().clone()


def pipeline(index: int, folder: str, depth: int, size: int, name: str) -> Any:
    model = DeepNarrowMLP(4, 3, depth, chunks=CHUNKS, device="meta")
    stage = stages(model, 2)[index].to_empty(device="cpu")
    stage.reset_parameters(torch.Generator().manual_seed(5))
    piped = pipelining.PipelineStage(stage, index, 2, torch.device("cpu"))
    schedule = getattr(pipelining, name)(piped, n_microbatches=MICRO_BATCHES, loss_fn=loss)
    optimizer = torch.optim.SGD(stage.parameters(), 0.1 * model.ntk_lr)
    x, y = batch(size)
    for _ in range(2):
        schedule.step(*((x,) if index == 0 else ()), target=y if index else None)
        optimizer.step()
        optimizer.zero_grad()
    return stage.in_chunks("hidden_weight")[-1][-1].detach().clone()


def kernel(index: int, folder: str, samples: int) -> Any:
    x = torch.rand(samples, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = x[:, :2].prod(1)
    begin = time.perf_counter()
    K = write_kernel(f"{folder}/kernel.npy", limit_ntk_mlp, x)
    written = time.perf_counter() - begin
    begin = time.perf_counter()
    found = solve(K, y, ridge=0.1, tolerance=1e-6)
    solved = time.perf_counter() - begin
    left = limit_ntk_mlp(x[:500], x) @ found + 0.1 * found[:500] - y[:500]
    assert left.norm() < 1e-5 * y.norm(), "the solution is wrong"
    return written, solved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=200_000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--samples", type=int, default=20_000)
    arguments = parser.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "500000"  # glibc gives back what is freed: peaks are of tensors
    ((expected, whole),) = measured(one_process, 1, arguments.depth, arguments.batch)
    print(f"one process: {format_bytes(whole)}")
    for name in ("ScheduleGPipe", "Schedule1F1B"):
        (_, first), (found, last) = measured(pipeline, 2, arguments.depth, arguments.batch, name)
        assert torch.equal(found, expected), "the pipeline is not the network"
        shares = ", ".join(f"{format_bytes(peak)} ({peak / whole:.0%})" for peak in (first, last))
        print(f"{name} of two stages: {shares}")
    for (written, solved), peak in measured(kernel, 2, arguments.samples):
        print(
            f"kernel of {arguments.samples}: written in {written:.0f} s, solved in {solved:.0f} s, {format_bytes(peak)}"
        )


if __name__ == "__main__":
    main()
