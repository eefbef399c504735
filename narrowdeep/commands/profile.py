"""``narrowdeep profile``: what a training step really takes, beside its plan and beside eager layers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import torch
import typer

from narrowdeep import files, memory
from narrowdeep.commands.network import IMAGE, Arch, Form, Network
from narrowdeep.commands.options import (
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    SeedOption,
    memory_errors,
    one_line_errors,
    option,
    print_json,
    resolve_device,
)
from narrowdeep.commands.progress import progress
from narrowdeep.extras import install
from narrowdeep.memory.profiling import plot, table


def profile(
    arch: Annotated[Arch, option("arch")] = Arch.mlp,
    inputs: Annotated[int, option("inputs")] = 64,
    outputs: Annotated[int, option("outputs")] = 10,
    depth: Annotated[list[int] | None, option("depth", "100, 300 and 1000", several=True)] = None,
    image: Annotated[str | None, option("image", IMAGE)] = None,
    kernel_size: Annotated[int | None, option("kernel-size", "3")] = None,
    form: Annotated[Form, option("form")] = Form.offset,
    checkpoint: Annotated[str, option("checkpoint")] = "auto",
    batch_size: Annotated[int, option("batch-size")] = 128,
    budget: Annotated[str | None, option("budget")] = None,
    eager: Annotated[bool, typer.Option(help="Measure eager layers too, where they should fit.")] = True,
    figure: Annotated[
        Path | None, typer.Option("--plot", help="Draw peak against depth into this file; needs matplotlib.")
    ] = None,
    json: JsonOption = False,
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """Peak memory of a forward and backward: planned, measured, and of the same layers run eagerly.

    --json prints {"profiles": [...]}, one entry a depth.
    """
    depths = depth or [100, 300, 1000]
    network = Network(arch, inputs, outputs, image, kernel_size, form, checkpoint, dtype)
    with one_line_errors():
        target = resolve_device(device)
        if figure is not None:
            _check_figure(figure)
        for layers in depths:  # all are checked before the first is measured
            model, shape = network.make(layers, torch.device("meta"))
            memory.plan(model, batch_size=batch_size, input_shape=shape, budget=budget, device=target)
    profiles = []
    with progress() as bar, memory_errors():
        line = bar.add_task("profiles", total=len(depths))
        for layers in depths:
            bar.update(line, description=f"depth {layers:,}")
            torch.manual_seed(seed)
            model, shape = network.make(layers, target)
            if budget is not None:
                planned = memory.plan(model, batch_size=batch_size, input_shape=shape, budget=budget)
                model.checkpoint = planned.checkpoint
            x = torch.randn(batch_size, *shape, dtype=dtype.torch, device=target)
            profiles.append(memory.profile(model, x, eager=eager))
            del model, x
            bar.advance(line)
    if figure is not None:
        with one_line_errors():
            plot(profiles, figure)
    if json:
        print_json({"profiles": [p.to_dict() for p in profiles]})
    else:
        typer.echo(table(profiles))


def _check_figure(path: Path) -> None:
    """Raises: ValueError, OSError where no picture can be written; the measurement takes longer than to find out."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f"the plot needs matplotlib: {install('plots')}, or leave --plot out")
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix and path.suffix[1:] not in known:
        raise ValueError(f"plot must end in one of {', '.join('.' + k for k in sorted(known))}, got {path}")
    files.require_writable(path)
