"""``make demo``: a 4,000-layer network learns the digits in about a minute, and is timed against the eager network."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from narrowdeep import training
from narrowdeep.commands.train import train
from narrowdeep.data import load_task
from narrowdeep.training import Trainer

OUT = Path("demo")
DEPTH = 4000
EPOCHS = 40
REPEATS = 3


def seconds_per_step(step: Callable[[], object]) -> float:
    """Least time of ``step`` in a few repeats after one to warm up, in seconds."""
    times = []
    for _ in range(REPEATS + 1):
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


def main() -> None:
    """Train, then compare; prints the results last."""
    shutil.rmtree(OUT, ignore_errors=True)
    print(f"Training a {DEPTH}-layer MLP on scikit-learn's digits (64 -> 10, width 75, float32) ...", flush=True)
    start = time.perf_counter()
    train(depth=DEPTH, epochs=EPOCHS, out=OUT)
    seconds = time.perf_counter() - start
    peak = training.peak_memory()

    trainer = Trainer.load(OUT / training.CHECKPOINT, load_task("digits"))
    x, y = trainer.task.x_train[: trainer.config.batch_size], trainer.task.y_train[: trainer.config.batch_size]
    print("Timing one step of it, and of the same network as nn.Sequential ...", flush=True)
    fused = seconds_per_step(training_step(trainer.model, x, y))
    eager = seconds_per_step(training_step(trainer.model.to_sequential(), x, y))

    last = training.read_metrics(OUT)[-1]
    print(f"""
test accuracy   {last.test_accuracy:.2%} after {last.epoch} epochs ({last.step} steps) in {seconds:.0f} s
steps           {1 / fused:.1f} a second at batch size {len(x)}
peak memory     {peak / 2**20:.0f} MiB (whole process)
speed-up        {eager / fused:.1f}x over the eager network ({eager * 1e3:.0f} ms a step, here {fused * 1e3:.0f} ms)
picture         {OUT / training.CURVES}""")


if __name__ == "__main__":
    main()
