"""Your own training loop: AdamW that decays weights and not biases, gradients clipped, a rate that falls.

A network of 1000 layers and width 4 learns the product of its two inputs. Draws the loss and what was learned.
"""

from __future__ import annotations

import argparse

import torch
from matplotlib.figure import Figure
from torch import nn

from narrowdeep import DeepNarrowMLP


def train(model: DeepNarrowMLP, steps: int) -> list[float]:
    # A layer's weight is 1 plus a small number, and Adam moves every number by about lr: the output moves by about
    # depth * scale * lr a step.
    lr = 0.3 / (model.depth * model.scale)
    optimizer = torch.optim.AdamW(model.param_groups(weight_decay=0.01), lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=steps)
    losses = []
    for _ in range(steps):
        x = torch.rand(128, 2)
        loss = (model(x) - x.prod(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        # Gradients have the size of depth and scale; this cuts the first steps alone.
        nn.utils.clip_grad_norm_(model.parameters(), 10 * model.scale)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def draw(model: DeepNarrowMLP, losses: list[float], path: str) -> None:
    grid = torch.linspace(0, 1, 101)
    points = torch.cartesian_prod(grid, grid)
    with torch.no_grad():
        learned = model(points).reshape(101, 101)
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.semilogy(losses)
    left.set(xlabel="step", ylabel="mean squared error", title="AdamW with clipping")
    contours = right.contour(grid, grid, learned.T, levels=[0.1, 0.2, 0.4, 0.6, 0.8], colors="C0")
    right.contour(grid, grid, (grid[:, None] * grid).T, levels=[0.1, 0.2, 0.4, 0.6, 0.8], colors="gray", linestyles=":")
    right.clabel(contours)
    right.set(xlabel="$x_1$", ylabel="$x_2$", title="learned, and $x_1 x_2$ (dotted)", aspect="equal")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--out", default="training_loop.png")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = DeepNarrowMLP(2, 1, depth=arguments.depth)
    losses = train(model, arguments.steps)
    draw(model, losses, arguments.out)
    print(f"mean squared error {losses[0]:.2g} before, {losses[-1]:.2g} after: {arguments.out}")


if __name__ == "__main__":
    main()
