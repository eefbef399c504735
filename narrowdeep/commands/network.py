"""The network that the options of a command say, as one record."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from narrowdeep.__main__ import shorten
from narrowdeep.commands.options import Dtype, fail
from narrowdeep.modules import DeepNarrowCNN, DeepNarrowMLP


class Arch(str, Enum):
    mlp = "mlp"
    cnn = "cnn"


class Form(str, Enum):
    offset = "offset"
    plain = "plain"


def parse_checkpoint(text: str) -> int | str:
    """A number where it is one; the model refuses other words than auto and none. Ends the command where it has more
    than 64 bits."""
    if re.fullmatch(r"-?\d+", text) is None:
        return text
    if len(text) > 20 or abs(int(text)) >= 2**63:
        fail(f"checkpoint must be below 2**63 in size, got {shorten(text)}")
    return int(text)


def require_images(arch: Arch | None, **options: Any) -> None:
    """Raises: ValueError where an option is given that only a CNN has."""
    for name, value in options.items():
        if value is not None and arch != Arch.cnn:
            raise ValueError(f"{name.replace('_', '-')} must be left out without --arch cnn, got {value}")


@dataclass(frozen=True)
class Network:
    """The options that say which network a command is about, but for its depth; None where one is not given."""

    arch: Arch
    inputs: int
    outputs: int
    image: str | None
    kernel_size: int | None
    form: Form
    checkpoint: str
    dtype: Dtype
    chunks: int = 1

    def make(self, depth: int, device: torch.device) -> tuple[DeepNarrowMLP | DeepNarrowCNN, tuple[int, ...]]:
        """The network, and the shape of one of its inputs.

        Raises: TypeError or ValueError as the network does; ValueError for an image that is not HxW, and for what an
            MLP does not have.
        """
        require_images(self.arch, image=self.image, kernel_size=self.kernel_size)
        settings: dict[str, Any] = {
            "form": self.form.value,
            "checkpoint": parse_checkpoint(self.checkpoint),
            "dtype": self.dtype.torch,
            "device": device,
            "chunks": self.chunks,
        }
        if self.arch == Arch.mlp:
            return DeepNarrowMLP(self.inputs, self.outputs, depth, **settings), (self.inputs,)
        image = IMAGE if self.image is None else self.image
        sides = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", image)
        if sides is None:
            raise ValueError(f"image must be HxW, such as 28x28, got {image!r}")
        if self.kernel_size is not None:
            settings["kernel_size"] = self.kernel_size
        model = DeepNarrowCNN(self.inputs, self.outputs, depth, **settings)
        return model, (self.inputs, int(sides[1]), int(sides[2]))


IMAGE = "28x28"
