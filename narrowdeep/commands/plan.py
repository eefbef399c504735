"""``narrowdeep plan``: what a training step will take, before it is tried."""

from __future__ import annotations

import re
from enum import Enum
from typing import Annotated

import torch
import typer
from torch._subclasses.fake_tensor import FakeTensorMode

from narrowdeep import memory
from narrowdeep.commands.network import (
    Arch,
    ArchOption,
    BatchOption,
    BudgetOption,
    CheckpointOption,
    Form,
    FormOption,
    ImageOption,
    InputsOption,
    KernelOption,
    OutputsOption,
    make_network,
)
from narrowdeep.commands.options import (
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    SeedOption,
    one_line_errors,
    print_json,
)


class Optimizer(str, Enum):
    sgd = "sgd"
    momentum = "momentum"
    adam = "adam"
    fused_sgd = "fused-sgd"
    fused_momentum = "fused-momentum"


def plan(
    arch: ArchOption = Arch.mlp,
    inputs: InputsOption = 64,
    outputs: OutputsOption = 10,
    depth: Annotated[int, typer.Option(help="L, the number of affine layers.")] = 1000,
    image: ImageOption = "28x28",
    kernel_size: KernelOption = 3,
    form: FormOption = Form.offset,
    checkpoint: CheckpointOption = "auto",
    batch_size: BatchOption = 128,
    budget: BudgetOption = None,
    optimizer: Annotated[Optimizer, typer.Option(help="What the update keeps: 0, 1 or 2 copies.")] = Optimizer.sgd,
    chunks: Annotated[
        int, typer.Option(help="Parameters that the hidden layers are divided into; the fused optimizers gain by it.")
    ] = 1,
    json: JsonOption = False,
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """Memory of one training step by part, and the checkpointing that fits --budget at the least slow-down.

    Nothing of the network's size is allocated, and --device need not be there. (--seed changes nothing here.)
    """
    with one_line_errors():
        if re.fullmatch(r"cpu|cuda(:\d+)?", device) is None:
            raise ValueError(f"device must be cpu, cuda or cuda:N, got {device!r}")
        with FakeTensorMode():
            model, shape = make_network(
                arch, inputs, outputs, depth, image, kernel_size, form, checkpoint, dtype, torch.device(device), chunks
            )
            planned = memory.plan(
                model, batch_size=batch_size, input_shape=shape, budget=budget, optimizer=optimizer.value
            )
    if json:
        print_json(planned.to_dict())
    else:
        typer.echo(str(planned))
