"""``narrowdeep plan``: what a training step will take, before it is tried."""

from __future__ import annotations

import math
from typing import Annotated

import torch
import typer

from narrowdeep import memory
from narrowdeep.commands.network import IMAGE, Arch, Form, Network
from narrowdeep.commands.options import (
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    SeedOption,
    one_line_errors,
    option,
    print_json,
)
from narrowdeep.memory.sizes import format_bytes


def plan(
    arch: Annotated[Arch, option("arch")] = Arch.mlp,
    inputs: Annotated[int, option("inputs")] = 64,
    outputs: Annotated[int, option("outputs")] = 10,
    depth: Annotated[int, option("depth")] = 1000,
    image: Annotated[str | None, option("image", IMAGE)] = None,
    kernel_size: Annotated[int | None, option("kernel-size", "3")] = None,
    form: Annotated[Form, option("form")] = Form.offset,
    checkpoint: Annotated[str, option("checkpoint")] = "auto",
    batch_size: Annotated[int, option("batch-size")] = 128,
    budget: Annotated[str | None, option("budget")] = None,
    optimizer: Annotated[str, option("optimizer")] = "sgd",
    chunks: Annotated[int, option("chunks")] = 1,
    ranks: Annotated[int, option("ranks")] = 1,
    json: JsonOption = False,
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """Memory of one training step by part, and the checkpointing that fits --budget at the least slow-down.

    Nothing of the network's size is allocated, and --device need not be there. (--seed changes nothing here.)
    """
    with one_line_errors():
        if ranks > max(1, depth - 2):
            raise ValueError(f"ranks must be at most the number of hidden layers, {depth - 2}, got {ranks}")
        stage = -(-max(0, depth - 2) // ranks) + 2  # with both ends, of which most ranks have none
        network = Network(arch, inputs, outputs, image, kernel_size, form, checkpoint, dtype, chunks)
        model, shape = network.make(depth if ranks == 1 else stage, torch.device("meta"))
        planned = memory.plan(
            model, batch_size=batch_size, input_shape=shape, budget=budget, optimizer=optimizer, device=device
        )
    words = 3 if form == Form.offset else 1
    sent = words * model.width * math.prod(shape[1:]) * batch_size * dtype.torch.itemsize
    if json:
        print_json(planned.to_dict() | ({"ranks": ranks, "sent_bytes": sent} if ranks > 1 else {}))
    else:
        typer.echo(str(planned))
        if ranks > 1:
            typer.echo(f"each of {ranks} ranks sends {format_bytes(sent)} forward and as much backward a step")
