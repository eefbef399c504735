"""Data parallel under torchrun: each process has a part of every batch, and all have the same network.

    torchrun --nproc-per-node 2 examples/ddp.py

DistributedDataParallel around the network and any optimizer; or ``--fused``, where FusedSGD averages the gradients of a
chunk of layers and steps while the backward goes on with the next. Alone, as one process, it runs as well. The first
process draws the loss and saves the network.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch import nn

from narrowdeep import DeepNarrowMLP
from narrowdeep.optim import FusedSGD
from narrowdeep.training import save_model


def train(steps: int, depth: int, batch: int, fused: bool) -> tuple[DeepNarrowMLP, list[float]]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same network, and the same batches, in all processes
    model = DeepNarrowMLP(2, 1, depth, chunks=4)
    lr = 0.5 * model.ntk_lr
    network: nn.Module = model
    optimizer: torch.optim.Optimizer
    if fused:
        optimizer = FusedSGD(model, lr, momentum=0.9)
    else:
        network = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(network.parameters(), lr, momentum=0.9)
    losses = []
    for _ in range(steps):
        x = torch.rand(batch, 2)[rank::ranks]
        loss = 0.5 * (network(x) - x.prod(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)  # for the picture
        losses.append(mean.item() / ranks)
    return model, losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--fused", action="store_true")
    parser.add_argument("--out", default="ddp.png")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:  # not under torchrun
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model, losses = train(arguments.steps, arguments.depth, arguments.batch, arguments.fused)
    if dist.get_rank() == 0:
        figure = Figure(figsize=(5, 3.8), layout="constrained")
        axes = figure.subplots()
        axes.semilogy(losses)
        axes.set(xlabel="step", ylabel="loss", title=f"{dist.get_world_size()} processes")
        figure.savefig(arguments.out, dpi=120)
        save_model(model, f"{arguments.out}.safetensors")
        print(f"loss {losses[0]:.2g} before, {losses[-1]:.2g} after: {arguments.out}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
