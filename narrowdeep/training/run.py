"""The folder of a run: training in it, with its state kept, its metrics logged, and no other run let in."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from narrowdeep import files
from narrowdeep.checks import shown
from narrowdeep.schema import from_json
from narrowdeep.training.config import EpochMetrics, TrainConfig
from narrowdeep.training.model_file import DamagedFileError, RunPosition, read_tensors
from narrowdeep.training.plots import plot_metrics
from narrowdeep.training.trainer import Trainer

CHECKPOINT = "checkpoint.safetensors"
"""The file of a run's state. (A model's ``checkpoint`` is another thing: what its backward keeps.)"""
METRICS = "metrics.jsonl"
CURVES = "curves.png"

_LONGEST_LINE = 10_000


def fit(
    trainer: Trainer,
    out: str | Path,
    *,
    save_every: float = 30.0,
    plot: bool = True,
    on_step: Callable[[Trainer], None] | None = None,
    on_epoch: Callable[[EpochMetrics], None] | None = None,
) -> bool:
    """Train until the configured number of epochs, keeping the run in the folder ``out``.

    The state is written at the start, after every ``save_every`` seconds, at the end, and when the process is asked to
    stop (Ctrl-C or SIGTERM): the step in progress is finished and no step is lost. A second Ctrl-C stops at once and
    keeps the last state. ``metrics.jsonl`` keeps the lines of the epochs that the trainer has finished; those of a
    state are on the disk before it. The folder is locked meanwhile (``narrowdeep.files.folder_lock``). Of several ranks
    the first one does all this, for itself, and all stop where one is asked to.

    Returns: True when the run is finished, False when it was asked to stop before.

    Raises: ValueError if ``out`` holds a run with another configuration (but for ``epochs``), DamagedFileError if its
        files cannot be read, FolderInUseError if another run works there, OSError if ``out`` cannot be written: all
        before anything is changed. DivergedError; the state is then the last one whose loss, parameters and momentum
        were finite, some steps back. OSError naming the file when the disk is full. ValueError, before anything is
        changed, where the ranks differ in a setting or in their data; LostRankError where one of them ends.

    Examples:
        >>> from narrowdeep.data import load_task
        >>> from narrowdeep.training import TrainConfig, Trainer, fit, read_metrics
        >>> config = TrainConfig(
        ...     task="toy", arch="mlp", depth=50, scale=50.0, rho=1.0, beta=1.0, init="ntk", form="offset",
        ...     checkpoint="auto", pool=1, epochs=2, batch_size=200, lr=4e-6, momentum=0.0, seed=0, dtype="float32",
        ... )
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     finished = fit(Trainer(config, load_task("toy")), folder, plot=False)
        ...     print(finished, [metrics.epoch for metrics in read_metrics(folder)])
        True [1, 2]
    """
    folder = Path(out)
    trainer.require_same()
    if not trainer.ranks.is_first:
        with _stop_requests() as stop_requested:
            for metrics in _steps(trainer, stop_requested):
                if metrics is not None and on_epoch is not None:
                    on_epoch(metrics)
                if on_step is not None:
                    on_step(trainer)
        return trainer.finished
    require_writable(folder)
    with files.folder_lock(folder):
        return _fit(trainer, folder, save_every, plot, on_step, on_epoch)


def _steps(trainer: Trainer, stop_requested: Callable[[], bool]) -> Iterator[EpochMetrics | None]:
    """What each step returns, until the run is finished or any rank is asked to stop."""
    while not trainer.finished and not trainer.ranks.any(stop_requested()):
        yield trainer.step()


def _fit(
    trainer: Trainer,
    folder: Path,
    save_every: float,
    plot: bool,
    on_step: Callable[[Trainer], None] | None,
    on_epoch: Callable[[EpochMetrics], None] | None,
) -> bool:
    lines = [m for m in read_metrics(folder) if m.epoch <= trainer.epoch]
    if (folder / CHECKPOINT).exists():
        found = read_config(folder / CHECKPOINT).for_epochs(trainer.config.epochs)
        if _without_prediction(found) != _without_prediction(trainer.config):
            raise ValueError(f"out must not hold a run with another configuration than the trainer's, got {folder}")
    trainer.save(folder / CHECKPOINT)
    files.write(folder / METRICS, "".join(f"{_line(m)}\n" for m in lines))
    saved = time.monotonic()
    with _stop_requests() as stop_requested, files.Log(folder / METRICS) as log:
        for metrics in _steps(trainer, stop_requested):
            if metrics is not None:
                lines.append(metrics)
                log.write(_line(metrics))
                if on_epoch is not None:
                    on_epoch(metrics)
            if on_step is not None:
                on_step(trainer)
            if time.monotonic() - saved >= save_every:
                log.sync()
                trainer.save(folder / CHECKPOINT)
                saved = time.monotonic()
        log.sync()
        trainer.save(folder / CHECKPOINT)
    if plot and lines:
        predicted = trainer.config.predicted_loss or lines[-1].predicted_train_loss
        plot_metrics(lines, folder / CURVES, title=_title(trainer.config), predicted=predicted)
    return trainer.finished


def _without_prediction(config: TrainConfig) -> TrainConfig:
    return dataclasses.replace(config, predicted_loss=None, lr_predicted=False)


def holds_run(folder: str | Path) -> bool:
    """Whether ``folder`` holds (part of) a run.

    Examples:
        >>> from narrowdeep.training import holds_run
        >>> holds_run("a folder that does not exist")
        False
    """
    return any((Path(folder) / name).exists() for name in (CHECKPOINT, METRICS))


def require_writable(folder: str | Path) -> None:
    """Make ``folder`` where it is missing.

    Raises: OSError naming it if it, or a file in it, cannot be made.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from narrowdeep.training import require_writable
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     require_writable(f"{folder}/runs/first")
        ...     print(Path(f"{folder}/runs/first").is_dir())
        True
    """
    with files.errors_named(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
    with files.folder_lock(folder):
        pass  # which writes a file


def read_metrics(folder: str | Path) -> list[EpochMetrics]:
    """The lines of a run's ``metrics.jsonl``, without a last line that a crash cut short; none where there is no file.

    Raises: DamagedFileError for a line that is not an epoch's metrics.

    Examples:
        >>> from narrowdeep.training import read_metrics
        >>> read_metrics("a folder without a run")
        []
    """
    path = Path(folder) / METRICS
    if not path.exists():
        return []
    if not path.is_file():
        raise DamagedFileError(f"{path} is damaged: it must be a regular file")
    metrics = []
    with open(path, "rb") as file:
        while (line := file.readline(_LONGEST_LINE)).endswith(b"\n"):
            try:
                metrics.append(from_json(EpochMetrics, line))
            except ValueError as error:  # noqa: PERF203 (the line is named)
                raise DamagedFileError(f"{path} is damaged: line {len(metrics) + 1}: {error}") from error
    if len(line) == _LONGEST_LINE:
        raise DamagedFileError(f"{path} is damaged: line {len(metrics) + 1} must be an epoch's, got {shown(line)}")
    return metrics


def read_config(path: str | Path) -> TrainConfig:
    """The configuration of the run whose state is at ``path``.

    Raises: FileNotFoundError, DamagedFileError.

    Examples:
        >>> from narrowdeep.training import CHECKPOINT, read_config
        >>> read_config(f"runs/digits/{CHECKPOINT}").depth  # doctest: +SKIP
        4000
    """
    return read_tensors(path, (RunPosition,), None)[0].config


def peak_memory(device: torch.device | str = "cpu") -> int:
    """Most bytes in use at once so far: allocated by torch on a GPU, resident in the whole process on the CPU.

    Examples:
        >>> from narrowdeep.training import peak_memory
        >>> peak_memory() > 2**20
        True
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _title(config: TrainConfig) -> str:
    return f"{config.task}: {config.arch}, L = {config.depth}, $C_L$ = {config.scale:g}, {config.dtype}, {config.form}"


def _line(metrics: EpochMetrics) -> str:
    return json.dumps(dataclasses.asdict(metrics), allow_nan=False)


@contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM into a flag; the second acts as it did before.

    Python delivers signals to the main thread only; elsewhere nothing is changed and the flag stays down.
    """
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested.is_set
        return
    previous: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def request(number: int, frame: FrameType | None) -> None:
        requested.set()
        restore()

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, request)
    try:
        yield requested.is_set
    finally:
        restore()
