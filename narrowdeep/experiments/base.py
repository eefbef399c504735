"""What an experiment is, and how one is run: in pieces that are kept on disk, so that it can be stopped and resumed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import re
import textwrap
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from rich.progress import Progress

from narrowdeep import files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T = TypeVar("T")


@dataclass(frozen=True)
class Verdict:
    """Whether the thesis's claim came out, and a paragraph with its value beside ours. Computed from a result."""

    reproduced: bool
    text: str


class Store:
    """Finished pieces of one experiment as JSON files, each written at once or not at all.

    A file's name ends in a hash of ``key``, which holds all that decides the numbers: pieces of other settings, seeds
    or dtypes lie beside it and are never taken for it.
    """

    def __init__(self, folder: Path, key: dict[str, Any]) -> None:
        self.folder = folder
        self.seconds = 0.0
        """Time that the pieces asked for so far took to compute, now or in an earlier run."""
        text = json.dumps(key, sort_keys=True, default=str)
        self._hash = hashlib.sha256(text.encode()).hexdigest()[:12]

    def work_folder(self, name: str) -> Path:
        """Where a long piece may keep what it needs to go on; not made, and of these settings alone."""
        return self.folder / f"{name}-{self._hash}"

    def piece(self, name: str, compute: Callable[[], Any]) -> Any:
        """The piece called ``name``: plain JSON data, read where it was finished before, else computed and kept."""
        path = self.folder / f"{name}-{self._hash}.json"
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            if path.is_file():
                found = json.loads(path.read_text(encoding="utf-8"))
                seconds, value = float(found["seconds"]), found["value"]
                if found["crc32"] == _checksum(seconds, value):
                    self.seconds += seconds
                    return value
        # It is not there, or damaged by something else.
        start = time.perf_counter()
        value = compute()
        seconds = time.perf_counter() - start
        found = {"seconds": seconds, "value": value, "crc32": _checksum(seconds, value)}
        self.folder.mkdir(parents=True, exist_ok=True)
        files.write(path, json.dumps(found))
        self.seconds += seconds
        return json.loads(json.dumps(value))  # the same numbers and types as when it is read


def _checksum(seconds: float, value: Any) -> int:
    return zlib.crc32(json.dumps([seconds, value]).encode())


@dataclass(frozen=True)
class Context:
    """What a run is given besides its settings."""

    seed: int
    store: Store
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    data: Path | None = None
    """Folder that holds MNIST/raw."""
    progress: Progress | None = None

    def track(self, items: Sequence[T], description: str) -> Iterator[T]:
        """The items, with a progress bar that is taken away at the end."""
        if self.progress is None:
            yield from items
            return
        task = self.progress.add_task(description, total=len(items))
        try:
            for item in items:
                yield item
                self.progress.advance(task)
        finally:
            self.progress.remove_task(task)

    def generator(self, *stream: int) -> torch.Generator:
        """Random numbers of their own for each ``stream`` of the run's seed."""
        words = np.random.SeedSequence([self.seed, *stream]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(words[0]) >> 1)


@dataclass(frozen=True)
class Experiment:
    """One figure, table or group of theorems.

    Attributes:
        name: as ``narrowdeep reproduce`` takes it.
        source: where it stands in the thesis.
        caption: what the picture shows, for a reader who sees it alone.
        laptop, full: settings, frozen dataclasses; ``full`` is the thesis's own.
        run: (settings, context) -> plain JSON data.
        draw: (settings, result) -> a matplotlib Figure.
        verdict: (settings, result) -> Verdict.
        needs_mnist: whether ``context.data`` must be given.
    """

    name: str
    title: str
    source: str
    caption: str
    laptop: Any
    full: Any
    run: Callable[[Any, Context], dict[str, Any]]
    draw: Callable[[Any, dict[str, Any]], Figure]
    verdict: Callable[[Any, dict[str, Any]], Verdict]
    needs_mnist: bool = False


def reproduce(
    experiment: Experiment,
    out: Path,
    *,
    full: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    data: Path | None = None,
    progress: Progress | None = None,
    plot: bool = True,
) -> dict[str, Any]:
    """Run an experiment, or what is left of it, and write ``out/NAME.json`` and ``out/NAME.png``.

    Without ``plot``, which needs matplotlib, there is no picture: one of an earlier run is removed.

    Returns: the record that the JSON file holds: settings, seed, versions, seconds, verdict and result.

    Raises: ValueError when it needs MNIST and ``data`` is None; OSError when ``out`` cannot be written.
    """
    if experiment.needs_mnist and data is None:
        raise ValueError(f"data must be the folder that holds MNIST/raw for {experiment.name}, got None")
    settings = experiment.full if full else experiment.laptop
    device = torch.device(device)
    decisive = {
        "experiment": experiment.name,
        "settings": dataclasses.asdict(settings),
        "seed": seed,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "threads": torch.get_num_threads(),
    }
    store = Store(out / "pieces" / experiment.name, decisive)
    out.mkdir(parents=True, exist_ok=True)
    result = experiment.run(settings, Context(seed, store, dtype, device, data, progress))
    record = decisive | {
        "title": experiment.title,
        "source": experiment.source,
        "caption": experiment.caption,
        "full": full,
        "seconds": store.seconds,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "verdict": dataclasses.asdict(experiment.verdict(settings, result)),
        "result": result,
    }
    picture = out / f"{experiment.name}.png"
    if plot:
        save_figure(experiment.draw(settings, result), experiment.caption, picture)
    else:
        picture.unlink(missing_ok=True)
    files.write(out / f"{experiment.name}.json", json.dumps(record, indent=1))
    return record


def save_figure(figure: Figure, caption: str, path: Path) -> None:
    """Draw the caption under the figure and write it, whole or not at all."""
    columns = int(figure.get_size_inches()[0] * 15)
    figure.supxlabel("\n".join(textwrap.wrap(caption, columns)), fontsize=8.5, x=0.02, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as file:
        figure.savefig(file, dpi=110, format="png")


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the straight line through (log x, log y), by least squares: the power of x that y follows."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def rms(values: Sequence[float]) -> float:
    """Root of the mean square."""
    return float(np.sqrt(np.mean(np.square(values))))


def number(value: float, digits: int = 3) -> str:
    """A number for a reader: ``0.0123``, ``4.1e-6``."""
    return re.sub(r"e([+-])0*(\d)", r"e\1\2", f"{value:.{digits}g}")
