"""``narrowdeep info``: what this installation can use."""

from __future__ import annotations

import platform
from importlib.metadata import version
from importlib.util import find_spec
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
from narrowdeep.ops import engine


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
    width = max(map(len, facts))
    for name, value in facts.items():
        typer.echo(f"{name:<{width}}  {_text(value)}")


def gather() -> dict[str, Any]:
    """The facts that ``narrowdeep info`` prints, by name; instruction sets are those in use, fastest first."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "narrowdeep": version("narrowdeep"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "cuda": [torch.cuda.get_device_name(i) for i in range(count)],
        "triton": version("triton") if find_spec("triton") else None,
        "instruction_sets": engine.instruction_sets(),
    }


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}: {_text(v)}" for k, v in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
