"""``make demo``: two 20,000-layer networks learn digits in one pass each, and are timed against eager PyTorch."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from torch import nn

from narrowdeep import training
from narrowdeep.commands.network import Arch
from narrowdeep.commands.settings import SETTINGS
from narrowdeep.commands.train import Optimizer, TaskChoice, train
from narrowdeep.data import load_task
from narrowdeep.training import Trainer

OUT = Path("demo")


@dataclass(frozen=True)
class Part:
    """One network: what it is called, the options of ``narrowdeep train``, samples of a step to time."""

    title: str
    options: dict[str, Any]
    batch_size: int


# The smaller one first: the peak memory of a process only grows.
PARTS = {
    "cnn": Part(
        title="20,000-layer CNN on the digits 0 and 1 in one pass (8x8 images, 3 channels, 3x3 filters, float32)",
        options={
            "arch": Arch.cnn,
            "task": TaskChoice["digits01"],
            "depth": 20000,
            "optimizer": Optimizer.gauss_newton,
        },
        batch_size=32,
    ),
    "mlp": Part(
        title="20,000-layer MLP on the ten digits in one pass (64 -> 10, width 75, float32)",
        options={
            "arch": Arch.mlp,
            "task": TaskChoice["digits"],
            "depth": 20000,
            "optimizer": Optimizer.gauss_newton,
        },
        batch_size=128,
    ),
}


def seconds_per_step(step: Callable[[], object], repeats: int = 3) -> float:
    """Least time of ``step`` in a few repeats after one to warm up, in seconds."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def training_step(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], object]:
    """Forward, backward and update of ``model`` on one batch; the step size is 0 so that repeats do the same work."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, fused=True)

    def step() -> None:
        loss = training.thesis_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def forget(folder: Path) -> None:
    """Delete the files of the run in ``folder``, if there is one, and nothing else."""
    if training.holds_run(folder):
        for name in (training.CHECKPOINT, training.METRICS, training.CURVES, SETTINGS):
            (folder / name).unlink(missing_ok=True)


def learn(name: str) -> tuple[float, int]:
    """Train one of the parts: seconds, and the peak memory of the process in bytes."""
    print(f"\nTraining a {PARTS[name].title} ...", flush=True)
    start = time.perf_counter()
    train(**PARTS[name].options, out=OUT / name)
    return time.perf_counter() - start, training.peak_memory()


def report(name: str, seconds: float, peak: int) -> str:
    """Time a trained part against the same network as nn.Sequential: the lines to show."""
    part, folder = PARTS[name], OUT / name
    trainer = Trainer.load(folder / training.CHECKPOINT, load_task(part.options["task"].value))
    x, y = trainer.task.x_train[: part.batch_size], trainer.task.y_train[: part.batch_size]
    fused = seconds_per_step(training_step(trainer.model, x, y))
    eager = seconds_per_step(training_step(trainer.model.to_sequential(), x, y), repeats=1)
    last = training.read_metrics(folder)[-1]
    curves = folder / training.CURVES
    share = last.predicted_test_accuracy
    predicted = "" if share is None else f" (its kernel predicted {share:.2%})"
    return f"""
{part.title}
test accuracy   {last.test_accuracy:.2%} after one pass over the data in {seconds:.0f} s{predicted}
steps           {1 / fused:.1f} a second, of gradient descent at batch size {len(x)}
peak memory     {peak / 2**20:.0f} MiB (whole process)
speed-up        {eager / fused:.1f}x over the eager network ({eager * 1e3:.0f} ms a step, here {fused * 1e3:.0f} ms)
picture         {curves if curves.exists() else "none: it needs matplotlib"}"""


def main() -> None:
    """Train, then compare; prints the results last."""
    for name in PARTS:
        forget(OUT / name)
    try:
        runs = {name: learn(name) for name in PARTS}
    except typer.Exit as stopped:
        sys.exit(stopped.exit_code)
    print("\nTiming a step of each, and of the same network as nn.Sequential ...", flush=True)
    for name, run in runs.items():
        print(report(name, *run), flush=True)


if __name__ == "__main__":
    main()
