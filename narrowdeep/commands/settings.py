"""The settings of a run as TOML: read by ``--config``, written beside the run."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from narrowdeep import files
from narrowdeep.checks import shown
from narrowdeep.extras import optional
from narrowdeep.training import TrainConfig

with optional():
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

SETTINGS = "settings.toml"
"""In a run's folder."""


def _read(context: typer.Context, path: Path | None) -> Path | None:
    """Make what the file says the defaults of the other options."""
    if path is None:
        return None
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise typer.BadParameter(f"{path} cannot be read: {error}") from None
    known = {param.name for param in context.command.params if param.name} - {"config", "help"}
    defaults: dict[str, Any] = {}
    for key, value in found.items():
        name = key.replace("-", "_")
        if name not in known:
            raise typer.BadParameter(f"{path}: {key} is no option of this command")
        if not isinstance(value, (bool, int, float, str)):
            raise typer.BadParameter(f"{path}: {key} must be a number, text, true or false, got {shown(value)}")
        defaults[name] = value if isinstance(value, bool) else str(value)  # read as on the command line
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        callback=_read,
        is_eager=True,
        help="TOML file of options, such as the settings.toml of a run; those on the command line come first.",
    ),
]


def write_settings(folder: Path, config: TrainConfig) -> None:
    """Write what ``--config`` needs to start the run again, in another folder."""
    unused = ("lr", "momentum", "decay") if config.optimizer == "gauss-newton" else ()
    lines = [
        f"{name} = {json.dumps(value)}"
        for name, value in dataclasses.asdict(config).items()
        if value is not None and "predicted" not in name and name not in unused
    ]
    files.write(folder / SETTINGS, "\n".join(lines) + "\n")
