"""``narrowdeep`` and ``python -m narrowdeep``: the command line, with a Ctrl-C that is one line from the start."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def main() -> None:
    """Entry point of the console script."""
    # Loading torch takes seconds, in which a KeyboardInterrupt would surface anywhere, as a traceback. The handler that
    # a shell's "nohup" or "&" has set stays.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, stop_at_once)
    from narrowdeep.extras import MissingExtraError, install, optional

    try:
        with optional():  # typer, too, loads some of what it needs late
            from narrowdeep.cli import app

            app(prog_name="narrowdeep")
    except MissingExtraError as error:  # whatever a command needs, the extra cli brings
        sys.exit(f"error: the command line needs {error.name}, which is not installed: {install('cli')}")


def stop_at_once(number: int, frame: FrameType | None) -> None:
    """Ends the process; nothing has been begun that would have to be put in order."""
    sys.stderr.write("stopped\n")
    sys.stderr.flush()
    os._exit(130)


def shorten(text: str, most: int = 60) -> str:
    """One line of at most ``most`` characters, the middle left out where there are more."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-most // 4 :]}"


if __name__ == "__main__":
    main()
