"""``narrowdeep info``: what this installation can use."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import torch
import typer

from narrowdeep.commands.options import (
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    SeedOption,
    one_line_errors,
    print_json,
    resolve_device,
)
from narrowdeep.ops.backends import backends


def info(
    json: JsonOption = False,
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """Versions, backends, instruction sets and threads; with --device, whether this machine has that device.

    --seed and --dtype are taken as by every command and change nothing here.
    """
    with one_line_errors():
        resolve_device(device)
        facts = gather()
    if json:
        print_json(facts)
        return
    typer.echo("\n".join(_lines(facts)))


def gather() -> dict[str, Any]:
    """The facts that ``narrowdeep info`` prints, by name."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "narrowdeep": version("narrowdeep"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "cuda": [torch.cuda.get_device_name(i) for i in range(count)],
        "backends": backends(),
    }


def _lines(facts: dict[str, Any]) -> Iterator[str]:
    """One line a fact, names padded to one width; the facts of a nested dict follow its name, indented."""
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        if isinstance(value, dict):
            yield name
            yield from (f"  {line}" for line in _lines(value))
        else:
            yield f"{name:<{width}}  {_text(value)}"


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
