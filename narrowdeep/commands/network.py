"""The options that say which network a command is about, and the network they make."""

from __future__ import annotations

import re
from enum import Enum
from typing import Annotated, Any

import torch
import typer

from narrowdeep.__main__ import shorten
from narrowdeep.commands.options import Dtype, fail
from narrowdeep.modules import DeepNarrowCNN, DeepNarrowMLP


class Arch(str, Enum):
    mlp = "mlp"
    cnn = "cnn"


class Form(str, Enum):
    offset = "offset"
    plain = "plain"


ArchOption = Annotated[Arch, typer.Option("--arch", help="Kind of network.")]
InputsOption = Annotated[int, typer.Option("--inputs", help="Features of an MLP's input, channels of a CNN's.")]
OutputsOption = Annotated[int, typer.Option("--outputs", help="Outputs of the network.")]
ImageOption = Annotated[str, typer.Option("--image", help="Height and width of a CNN's input, HxW.")]
KernelOption = Annotated[int, typer.Option("--kernel-size", help="Side of a CNN's filters, odd.")]
FormOption = Annotated[Form, typer.Option("--form", help="How the weights are stored.")]
CheckpointOption = Annotated[
    str, typer.Option("--checkpoint", help="auto, none, or the layers between two saved states; --budget overrides it.")
]
BatchOption = Annotated[int, typer.Option("--batch-size", help="Samples a step.")]
BudgetOption = Annotated[
    str | None, typer.Option("--budget", help="Memory of a whole step, such as 2GiB, 500MB or bytes.")
]


def parse_checkpoint(text: str) -> int | str:
    """A number where it is one; the model refuses other words than auto and none. Ends the command where it has more
    than 64 bits."""
    if re.fullmatch(r"-?\d+", text) is None:
        return text
    if len(text) > 20 or abs(int(text)) >= 2**63:
        fail(f"checkpoint must be below 2**63 in size, got {shorten(text)}")
    return int(text)


def make_network(
    arch: Arch,
    inputs: int,
    outputs: int,
    depth: int,
    image: str,
    kernel_size: int,
    form: Form,
    checkpoint: str,
    dtype: Dtype,
    device: torch.device,
    chunks: int = 1,
) -> tuple[DeepNarrowMLP | DeepNarrowCNN, tuple[int, ...]]:
    """The network, and the shape of one of its inputs.

    Raises: TypeError or ValueError as the network does; ValueError for an image that is not HxW.
    """
    settings: dict[str, Any] = {
        "form": form.value,
        "checkpoint": parse_checkpoint(checkpoint),
        "dtype": dtype.torch,
        "device": device,
        "chunks": chunks,
    }
    if arch == Arch.mlp:
        return DeepNarrowMLP(inputs, outputs, depth, **settings), (inputs,)
    sides = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", image)
    if sides is None:
        raise ValueError(f"image must be HxW, such as 28x28, got {image!r}")
    model = DeepNarrowCNN(inputs, outputs, depth, kernel_size=kernel_size, **settings)
    return model, (inputs, int(sides[1]), int(sides[2]))
