"""``python -m benchmarks.one_pass --plot one_pass.png``: training loss against passes of three optimizers, and seconds.

SGD and SGD with momentum take what ``narrowdeep train --lr auto`` predicts for the number of epochs, the third is
``--optimizer gauss-newton``. Losses are those of the whole training set after each pass.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from narrowdeep.data import Task, load_task
from narrowdeep.experiments.mnist_table import subset
from narrowdeep.step_size import predict_step_size
from narrowdeep.training import TrainConfig, Trainer, build_model, inputs_for, steps_per_epoch, thesis_loss

Curve = list[tuple[int, float, float, float | None]]
"""(passes, seconds, training loss, test accuracy), from before the first pass."""


def configurations(arguments: argparse.Namespace, task: Task) -> dict[str, TrainConfig]:
    depth = arguments.depth
    shared: dict[str, Any] = {
        "task": task.name,
        "arch": arguments.arch,
        "depth": depth,
        "scale": float(depth),
        "rho": arguments.rho,
        "beta": 1.0,
        "init": "ntk",
        "form": "offset",
        "checkpoint": "auto",
        "pool": arguments.pool,
        "seed": 0,
        "dtype": "float32",
    }
    rate = 1 / depth / depth / depth
    options: dict[str, Any] = {**shared, "epochs": arguments.epochs, "batch_size": 128, "lr": rate, "momentum": 0.0}
    found = {}
    for name, momentum in {"SGD": 0.0, "SGD with momentum": None}.items():
        config = TrainConfig(**options)
        predicted = predict_step_size(
            build_model(config, task),
            inputs_for(config.arch, task),
            steps=config.epochs * steps_per_epoch(config, task),
            batch_size=config.batch_size,
            momentum=momentum,
        )
        found[name] = TrainConfig(**{**options, "lr": predicted.lr, "momentum": predicted.momentum})
    newton = {"epochs": arguments.passes, "batch_size": 256, "optimizer": "gauss-newton", "damping": arguments.damping}
    return {**found, "Gauss-Newton": TrainConfig(**{**options, **newton})}


@torch.no_grad()
def training_loss(trainer: Trainer) -> float:
    parts = zip(trainer.task.x_train.split(512), trainer.task.y_train.split(512), strict=True)
    return sum(float(thesis_loss(trainer.model(x), y)) * len(x) for x, y in parts) / len(trainer.task.x_train)


def learn(config: TrainConfig, task: Task, enough: float) -> Curve:
    """Until the last epoch, or a training loss of ``enough``."""
    trainer = Trainer(config, task)
    curve: Curve = [(0, 0.0, training_loss(trainer), None)]
    while not trainer.finished and curve[-1][2] > enough:
        metrics = trainer.step()
        if metrics is not None:
            loss = training_loss(trainer)
            curve.append((metrics.epoch, curve[-1][1] + metrics.seconds, loss, metrics.test_accuracy))
    return curve


def plot(curves: dict[str, Curve], path: Path, title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    ax = figure.subplots()
    for name, curve in curves.items():
        style: dict[str, Any] = {"marker": "o", "linewidth": 2} if name == "Gauss-Newton" else {}
        ax.plot([point[0] for point in curve], [point[2] for point in curve], label=name, **style)
    ax.set_xlabel("passes over the data")
    ax.set_ylabel(r"training loss  $\frac{1}{2N}\sum_n\|f(x_n)-y_n\|^2$")
    ax.set_yscale("log")
    ax.grid(alpha=0.3)
    ax.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="digits")
    parser.add_argument("--arch", default="mlp")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--pool", type=int, default=1)
    parser.add_argument("--images", type=int, help="how many of the training samples (default: all)")
    parser.add_argument("--depth", type=int, default=4000)
    parser.add_argument("--rho", type=float, default=16.0)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--damping", type=float, default=1e-4)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path, help="where the curves are written, and read from if they are there")
    arguments = parser.parse_args()
    curves: dict[str, Curve] = {}
    if arguments.json and arguments.json.exists():
        curves = json.loads(arguments.json.read_text())
    else:
        task = load_task(arguments.task, data=arguments.data, pool=arguments.pool)
        if arguments.images is not None:
            task = subset(task, images=arguments.images, test_images=None, seed=0)
        for name, config in reversed(configurations(arguments, task).items()):
            first = curves["Gauss-Newton"][1][2] if curves else 0.0
            curves[name] = learn(config, task, first)
            if arguments.json:
                arguments.json.write_text(json.dumps(curves))
            passes, seconds, loss, accuracy = curves[name][-1]
            reached = f"loss {loss:.3g}, test accuracy {accuracy:.2%}"
            print(f"{name}: {reached} after {passes} passes, {seconds:.1f} s", flush=True)
    passes, seconds, loss, _ = curves["Gauss-Newton"][1]
    print(f"Gauss-Newton: loss {loss:.3g} after one pass, {seconds:.1f} s")
    if arguments.plot:
        plot(curves, arguments.plot, f"{arguments.task}: {arguments.arch}, L = {arguments.depth}")


if __name__ == "__main__":
    main()
