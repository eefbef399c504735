"""``narrowdeep record``: runs of a size that eager layers do not reach, with a computed verdict."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Annotated

import typer

from narrowdeep.commands.options import SeedOption, memory_errors, one_line_errors, print_json
from narrowdeep.commands.progress import progress
from narrowdeep.experiments.records import RECORDS, run_record


def record(
    name: Annotated[str | None, typer.Argument(help=f"all, or one of {', '.join(RECORDS)}.")] = None,
    depth: Annotated[
        int | None, typer.Option(min=2, max=10**9, hidden=True, help="Another depth than the record's own.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="What it does without: JSON alone on standard output.")] = False,
    seed: SeedOption = 0,
) -> None:
    """Run a record of depth and print one line of JSON with what it took and whether it passed.

    Each runs in a process of its own, whose peak memory it reports: "depth", "parameters", "peak_bytes",
    "seconds_per_step", "result" ("pass" or "fail") and, under "checks", each measured number with the most that it may
    be. Status 1 when one failed. Without a name: one line of JSON with the title of each; with all, a line for each.
    """
    if name is None:
        print_json({known.name: known.title for known in RECORDS.values()})
        return
    with one_line_errors():
        if name != "all" and name not in RECORDS:
            raise ValueError(f"name must be all or one of {', '.join(RECORDS)}, got {name!r}")
        if sys.platform != "linux":
            raise ValueError(f"records need Linux, which keeps the peak memory of a process, got {sys.platform}")
    if name == "all":
        options = ["--seed", str(seed), *(["--depth", str(depth)] if depth else [])]
        command = [sys.executable, "-m", "narrowdeep.cli", "record"]
        codes = [subprocess.run([*command, each, *options], check=False).returncode for each in RECORDS]
        raise typer.Exit(max(map(abs, codes)))  # a child that a signal ended has a negative one
    chosen = RECORDS[name]
    settings = chosen.settings if depth is None else dataclasses.replace(chosen.settings, depth=depth)
    with memory_errors():
        result = run_record(chosen, settings, seed=seed, progress=progress())
    print_json(result)
    if result["result"] != "pass":
        raise typer.Exit(1)
