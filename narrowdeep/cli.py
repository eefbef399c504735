"""The command line ``narrowdeep``: registers the commands, each a file in ``narrowdeep/commands``."""

from __future__ import annotations

import typer

from narrowdeep.commands.info import info
from narrowdeep.commands.ntk import ntk
from narrowdeep.commands.plan import plan
from narrowdeep.commands.profile import profile
from narrowdeep.commands.record import record
from narrowdeep.commands.reproduce import reproduce
from narrowdeep.commands.train import train

app = typer.Typer(
    name="narrowdeep",
    help="Networks that are extremely deep and extremely narrow, fused.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(train)
app.command()(ntk)
app.command()(plan)
app.command()(profile)
app.command()(reproduce)
app.command()(record)
app.command()(info)


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
