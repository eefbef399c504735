"""Progress on standard error: a bar on a terminal, a line every few seconds anywhere else."""

from __future__ import annotations

import threading

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS = 5.0
"""Between two lines; what is done sooner prints none."""


class LineProgress(Progress):
    """Draws nothing; says how far its tasks are every ``SECONDS``, for a log or a pipe."""

    def __init__(self, console: Console) -> None:
        super().__init__(console=console, disable=True)
        self._stopped = threading.Event()

    def start(self) -> None:
        self._stopped = threading.Event()
        threading.Thread(target=self._talk, args=(self._stopped,), daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def _talk(self, stopped: threading.Event) -> None:
        while not stopped.wait(SECONDS):
            for task in [t for t in self.tasks if not t.finished] or self.tasks[-1:]:
                count = "" if task.total is None else f" {task.completed:,.0f} of {task.total:,.0f},"
                left = "" if task.time_remaining is None else f", about {task.time_remaining:.0f} s left"
                text = f"{task.description}:{count} {task.elapsed or 0:.0f} s{left}"
                self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def progress() -> Progress:
    """To be used in a ``with`` statement."""
    console = Console(stderr=True)
    if not console.is_terminal:
        return LineProgress(console)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True)
