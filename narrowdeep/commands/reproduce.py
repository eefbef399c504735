"""``narrowdeep reproduce``: the thesis's figures, table and theorems."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from narrowdeep import files
from narrowdeep.commands.options import (
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    SeedOption,
    fail,
    has_matplotlib,
    memory_errors,
    one_line_errors,
    option,
    print_json,
    resolve_device,
)
from narrowdeep.commands.progress import progress
from narrowdeep.data import load_task
from narrowdeep.experiments import EXPERIMENTS
from narrowdeep.experiments import reproduce as run
from narrowdeep.experiments.page import write_page


def reproduce(
    name: Annotated[str | None, typer.Argument(help=f"all, or one of {', '.join(EXPERIMENTS)}.")] = None,
    full: Annotated[bool, typer.Option("--full", help="The thesis's own settings in place of a laptop's.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the results; a run goes on with what it finds there.")] = Path(
        "reproduction"
    ),
    data: Annotated[Path | None, option("data")] = None,
    json: JsonOption = False,
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """Reproduce a figure, table or theorem of the thesis: a picture, a JSON file and a verdict computed from the data.

    Writes NAME.png, NAME.json and index.html, a page of all results, into --out. A run that was stopped goes on where
    it was; the same seed gives the same numbers at the same number of threads. Without a name: what
    there is to reproduce. --json prints {"NAME": {"reproduced":
    ..., "text": ..., "seconds": ...}, ...}.
    """
    if name is None:
        if json:
            print_json({e.name: {"title": e.title, "source": e.source} for e in EXPERIMENTS.values()})
            return
        for experiment in EXPERIMENTS.values():
            typer.echo(f"{experiment.name:<10} {experiment.title} ({experiment.source})")
        return
    with one_line_errors():
        if name != "all" and name not in EXPERIMENTS:
            raise ValueError(f"name must be all or one of {', '.join(EXPERIMENTS)}, got {name!r}")
        target = resolve_device(device)
        chosen = list(EXPERIMENTS.values()) if name == "all" else [EXPERIMENTS[name]]
        for experiment in chosen:
            if experiment.needs_mnist and data is None:
                raise ValueError(f"data must be the folder that holds MNIST/raw for {experiment.name}: pass --data")
        if any(experiment.needs_mnist for experiment in chosen):
            load_task("mnist", data=data)  # what is wrong with the files is said now, not after the other experiments
        out.mkdir(parents=True, exist_ok=True)
        files.require_writable(out / "index.html")
        plot = has_matplotlib("the picture")
    summary = {}
    for experiment in chosen:
        with progress() as bar, memory_errors():
            try:
                record = run(
                    experiment,
                    out,
                    full=full,
                    seed=seed,
                    dtype=dtype.torch,
                    device=target,
                    data=data,
                    progress=bar,
                    plot=plot,
                )
                page = write_page(out, list(EXPERIMENTS))
            except OSError as error:  # a full disk
                fail(str(error), status=1)
        verdict = record["verdict"]
        summary[experiment.name] = verdict | {"seconds": record["seconds"]}
        if not json:
            result = "reproduced" if verdict["reproduced"] else "not reproduced"
            typer.echo(f"{experiment.name}: {result} ({record['seconds']:.0f} s)\n{verdict['text']}\n")
    if json:
        print_json(summary)
    else:
        typer.echo(f"All results: {page}")
