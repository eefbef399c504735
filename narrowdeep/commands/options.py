"""What the commands share: their common options, and errors as one line."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Annotated, Any, NoReturn

import torch
import typer

from narrowdeep.__main__ import shorten
from narrowdeep.extras import install
from narrowdeep.memory.planning import OPTIMIZER_TENSORS, check_device


class Dtype(str, Enum):
    float32 = "float32"
    float64 = "float64"

    @property
    def torch(self) -> torch.dtype:
        return getattr(torch, self.value)


HELP = {
    "arch": "Kind of network.",
    "batch-size": "Samples a step.",
    "beta": "Biases' standard deviation at initialisation, times C_L.",
    "budget": "Memory of a whole step, such as 2GiB, 500MB or bytes.",
    "checkpoint": "auto, none, or the layers between two saved states; --budget chooses it.",
    "chunks": "Parameters that the hidden layers are divided into; the fused optimizers gain by it.",
    "damping": "Of gauss-newton, over the mean of the kernel's diagonal; adapted from pass to pass.",
    "data": "Folder that holds MNIST/raw, where MNIST is needed.",
    "decay": "Of the learning rate over all epochs; linear: to 0, which averages noise out.",
    "depth": "L, the number of affine layers.",
    "device": "cpu, cuda or cuda:N.",
    "dtype": "Of parameters and data.",
    "epochs": "Passes over the data, in all.",
    "form": "How the weights are stored.",
    "image": "Height and width of a CNN's input, HxW.",
    "init": "kaiming needs --form plain.",
    "inputs": "Features of an MLP's input, channels of a CNN's.",
    "json": "Print one JSON object and nothing else on standard output.",
    "kernel-size": "Side of a CNN's filters, odd.",
    "lr": "Learning rate of SGD; auto: predicted, with the momentum, from the spectrum of the network's own kernel.",
    "method": "gauss-newton: each pass over the data is one step to what the network's kernel predicts, without a "
    "learning rate.",
    "momentum": "Of SGD.",
    "optimizer": f"What the update keeps: {', '.join(OPTIMIZER_TENSORS)}.",
    "outputs": "Outputs of the network.",
    "pool": "Side of an average pool before the network.",
    "ranks": "Of a pipeline over depth: what one of so many processes takes and sends.",
    "rho": "Weights' standard deviation at initialisation.",
    "scale": "C_L of the initialisation.",
    "seed": "Seed of every random number drawn.",
    "task": "What to learn.",
    "tau": "Learning rate as kernel time a step, in place of --lr.",
}
"""What --help says of the options of networks and of training, and of those that several commands have."""

_SETTINGS: dict[str, dict[str, Any]] = {"data": {"envvar": "NARROWDEEP_DATA"}, "ranks": {"min": 1}, "seed": {"min": 0}}


def option(name: str, default: str = "", *, several: bool = False, flag: str = "") -> Any:
    """The option ``--name``, for ``Annotated``.

    Arguments:
        default: in words, where the command finds it out itself.
        flag: what it is called, where that means something else to another command.
        several: whether it may be given more than once.
    """
    more = " Give it more than once to compare." if several else ""
    text = f"{HELP[name]}{more}{f' [default: {default}]' if default else ''}"
    return typer.Option(f"--{flag or name}", help=text, **_SETTINGS.get(name, {}))


JsonOption = Annotated[bool, option("json")]
SeedOption = Annotated[int, option("seed")]
DeviceOption = Annotated[str, option("device")]
DtypeOption = Annotated[Dtype, option("dtype")]


_NO_ROOM = re.compile(r"alloc|out of memory|overflow", re.IGNORECASE)
"""In the words of torch, which has no type for a tensor that is too large."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """What a user can mend (a bad value, a missing or damaged file, a size that does not fit this machine) ends the
    command with one line and status 2.

    Put around reading arguments and building things, not around the computation: a bug there keeps its traceback.
    """
    try:
        with memory_errors():
            yield
    except (ValueError, TypeError, OSError, OverflowError) as error:
        if "unpacking long" in str(error):  # how torch says that a size has more than 64 bits
            fail("this needs more memory than there is: a size of the network has more than 64 bits")
        fail(str(error))


@contextmanager
def memory_errors() -> Iterator[None]:
    """A lack of memory alone ends the command with one line: for the computation."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _NO_ROOM.search(str(error)):
            raise
        reason = str(error).partition("\nException raised from")[0]  # what follows is torch's C++ stack
        fail(f"this needs more memory than there is: {reason or type(error).__name__}")


def fail(message: str, status: int = 2) -> NoReturn:
    """End the command with ``error: message``, one line, on standard error."""
    typer.echo(f"error: {shorten(message, 1000)}", err=True)
    raise typer.Exit(status)


def has_matplotlib(what: str) -> bool:
    """Whether ``what`` ("the plot") can be drawn; a line on standard error says how where it cannot."""
    if importlib.util.find_spec("matplotlib") is not None:
        return True
    typer.echo(f"{what} is left out: it needs matplotlib ({install('plots')})", err=True)
    return False


def resolve_device(name: str) -> torch.device:
    """``torch.device(name)`` if this machine has it.

    Raises: ValueError naming the device.
    """
    device = check_device(name)
    count = torch.cuda.device_count() if device.type == "cuda" and torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"device must be one that this machine has: it has {count} CUDA devices, got {name!r}")
    return device


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, allow_nan=False))
