"""``narrowdeep reproduce``: the thesis's figures, table and theorems."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

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
from narrowdeep.experiments import EXPERIMENTS
from narrowdeep.experiments import reproduce as run
from narrowdeep.experiments.page import write_page


def reproduce(
    name: Annotated[str | None, typer.Argument(help=f"all, or one of {', '.join(EXPERIMENTS)}.")] = None,
    full: Annotated[bool, typer.Option("--full", help="The thesis's own settings in place of a laptop's.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the results; a run goes on with what it finds there.")] = Path(
        "reproduction"
    ),
    data: Annotated[
        Path | None, typer.Option(envvar="NARROWDEEP_DATA", help="Folder that holds MNIST/raw, where MNIST is needed.")
    ] = None,
    json: JsonOption = False,
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """Reproduce a figure, table or theorem of the thesis: a picture, a JSON file and a verdict computed from the data.

    Writes NAME.png, NAME.json and index.html, a page of all results, into --out. A run that was stopped goes on where
    it was; the same seed gives the same numbers at the same number of threads. --json prints {"NAME": {"reproduced":
    ..., "text": ..., "seconds": ...}, ...}.
    """
    if name is None:
        for experiment in EXPERIMENTS.values():
            typer.echo(f"{experiment.name:<10} {experiment.title} ({experiment.source})")
        return
    with one_line_errors():
        if name != "all" and name not in EXPERIMENTS:
            raise ValueError(f"name must be all or one of {', '.join(EXPERIMENTS)}, got {name!r}")
        target = resolve_device(device)
        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError("the figures need matplotlib: install narrowdeep[plots]")
        chosen = list(EXPERIMENTS.values()) if name == "all" else [EXPERIMENTS[name]]
        for experiment in chosen:
            if experiment.needs_mnist and data is None:
                raise ValueError(f"data must be the folder that holds MNIST/raw for {experiment.name}: pass --data")
        out.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    summary = {}
    for experiment in chosen:
        with Progress(*columns, console=Console(stderr=True), transient=True, disable=json) as progress:
            record = run(
                experiment,
                out,
                full=full,
                seed=seed,
                dtype=dtype.torch,
                device=target,
                data=data,
                progress=progress,
            )
        page = write_page(out, list(EXPERIMENTS))
        verdict = record["verdict"]
        summary[experiment.name] = verdict | {"seconds": record["seconds"]}
        if not json:
            result = "reproduced" if verdict["reproduced"] else "not reproduced"
            typer.echo(f"{experiment.name}: {result} ({record['seconds']:.0f} s)\n{verdict['text']}\n")
    if json:
        print_json(summary)
    else:
        typer.echo(f"All results: {page}")
