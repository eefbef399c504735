"""The command line ``narrowdeep``: its commands, each a file in ``narrowdeep/commands`` that is loaded when it is used.

torch takes a second to load: ``narrowdeep --help`` and ``--version`` do without.
"""

from __future__ import annotations

import importlib
import math
import signal
from typing import Annotated, Any

import narrowdeep
from narrowdeep.__main__ import main, shorten, stop_at_once
from narrowdeep.checks import LARGEST
from narrowdeep.extras import optional

with optional():
    import typer
    from typer.core import TyperCommand, TyperGroup

COMMANDS = {
    "train": "Train a network with SGD or Gauss-Newton on 1/(2N) sum ||f - y||^2.",
    "ntk": "Scaled NTK of networks beside its limit of infinite depth, against the angle or of any inputs.",
    "plan": "Memory of one training step by part, and the checkpointing that fits --budget.",
    "profile": "Peak memory of a forward and backward: planned, measured, and of the same layers run eagerly.",
    "reproduce": "Reproduce a figure, table or theorem of the thesis.",
    "record": "Run a record of depth and print one line of JSON with what it took and whether it passed.",
    "report": "Write one HTML page that compares runs and their tangent kernels.",
    "info": "Versions, backends, instruction sets and threads.",
}
"""What ``narrowdeep --help`` says of each."""


class Command(TyperCommand):
    """A command that refuses numbers no machine can take, by name, and that Ctrl-C ends with one line."""

    def invoke(self, ctx: Any) -> Any:
        if signal.getsignal(signal.SIGINT) is stop_at_once:  # all is loaded: the command may put things in order
            signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            for name, value in ctx.params.items():
                for one in value if isinstance(value, (list, tuple)) else [value]:
                    _check_number(name.replace("_", "-"), one)
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("stopped", err=True)
            raise typer.Exit(130) from None


class Commands(TyperGroup):
    """The group of ``COMMANDS``: a command's module is imported when the command is named."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    _names_only = False

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        if self._names_only:
            return TyperCommand(cmd_name, help=COMMANDS[cmd_name])
        with optional():
            module = importlib.import_module(f"narrowdeep.commands.{cmd_name}")
        only = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
        only.command(cmd_name, cls=Command)(getattr(module, cmd_name))
        return typer.main.get_command(only)

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        """Without the commands' modules: a key is answered at once."""
        self._names_only = True
        try:
            return super().shell_complete(ctx, incomplete)
        finally:
            self._names_only = False

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


app = typer.Typer(
    name="narrowdeep",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"narrowdeep {narrowdeep.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Networks that are extremely deep and extremely narrow, fused."""


def _check_number(name: str, value: object) -> None:
    rule = None
    if isinstance(value, int) and abs(value) > LARGEST:
        rule = "must be below 2**63 in size"
    elif isinstance(value, float) and math.isnan(value):
        rule = "must be a number"
    if rule is not None:
        typer.echo(f"error: {name} {rule}, got {shorten(str(value))}", err=True)
        raise typer.Exit(2)


__all__ = ["COMMANDS", "app", "main"]

if __name__ == "__main__":
    main()
