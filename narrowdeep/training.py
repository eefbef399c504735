"""Train a deep narrow network on a task: SGD on the thesis's loss, in runs that can be stopped and resumed exactly.

A run lives in one folder: ``checkpoint.safetensors`` (everything needed to go on, bit for bit), ``metrics.jsonl`` (one
line an epoch) and ``curves.png``. safetensors files hold numbers only: loading one never executes code.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from narrowdeep.data import Task
from narrowdeep.functional import Form
from narrowdeep.modules import DeepNarrowCNN, DeepNarrowMLP
from narrowdeep.modules.base import Checkpoint, Init
from narrowdeep.step_size import Decay, decay_factor

CHECKPOINT = "checkpoint.safetensors"
METRICS = "metrics.jsonl"
CURVES = "curves.png"

DTYPES = {"float32": torch.float32, "float64": torch.float64}

MODELS: dict[str, type[DeepNarrowMLP] | type[DeepNarrowCNN]] = {"mlp": DeepNarrowMLP, "cnn": DeepNarrowCNN}

_FORMAT = "narrowdeep 1"
_EVALUATION_BATCH = 1024


class DamagedFileError(ValueError):
    """A checkpoint or model file that cannot be trusted; the message starts with its path."""


class DivergedError(RuntimeError):
    """The loss, a parameter or its momentum is no longer finite."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run's numbers, together with the task's data and the device. On the CPU the last bits
    are also those of a given number of threads and instruction set: both change the order of sums.

    ``lr`` is the step size eta of SGD on the loss ``1/(2N) sum ||f(x_n) - y_n||^2``; one step without momentum advances
    kernel time by ``lr L C_L^2``. With ``decay`` "linear", step i of n (from 0) takes ``lr (1 - i/n)``.
    ``predicted_loss`` is the training loss at the end that ``--lr auto`` predicted, None where ``lr`` was given. The
    other fields are the arguments of ``narrowdeep train`` of the same name.
    """

    task: str
    arch: str
    depth: int
    scale: float
    rho: float
    beta: float
    init: Init
    form: Form
    checkpoint: Checkpoint
    pool: int
    epochs: int
    batch_size: int
    lr: float
    momentum: float
    seed: int
    dtype: str
    predicted_loss: float | None = None
    decay: Decay = "none"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr must be finite and positive, got {self.lr}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, got {self.momentum}")
        if self.decay not in ("none", "linear"):
            raise ValueError(f"decay must be none or linear, got {self.decay!r}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be at least 0 and below 2^63, got {self.seed}")
        if self.arch not in MODELS:
            raise ValueError(f"arch must be one of {', '.join(MODELS)}, got {self.arch!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")


@dataclass(frozen=True)
class EpochMetrics:
    """One line of ``metrics.jsonl``.

    Training loss and accuracy are means over the epoch's steps, each measured before its update; test loss and
    accuracy are measured after the last. Losses are ``1/(2N) sum ||f - y||^2``; accuracies are None for a regression
    task. ``seconds`` is the time of the training steps alone.
    """

    epoch: int
    step: int
    train_loss: float
    train_accuracy: float | None
    test_loss: float
    test_accuracy: float | None
    seconds: float
    samples_per_second: float


def thesis_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """``1/(2N) sum_n ||f(x_n) - y_n||^2`` (thesis section 3.2) of two (N, out) tensors: a scalar."""
    return (prediction - target).square().sum() / (2 * prediction.shape[0])


def build_model(
    config: TrainConfig, task: Task, *, device: torch.device | str = "cpu"
) -> DeepNarrowMLP | DeepNarrowCNN:
    """The network of ``config`` for ``task``, drawn from ``config.seed``: the same numbers on every device."""
    task = inputs_for(config.arch, task)
    return _build(config, task.in_features, task.out_features, device, torch.Generator().manual_seed(config.seed))


def steps_per_epoch(config: TrainConfig, task: Task) -> int:
    """Steps of one pass over the training samples, the last one on what is left."""
    return -(-task.x_train.shape[0] // config.batch_size)


def inputs_for(arch: str, task: Task) -> Task:
    """The task with samples as the network takes them: (N, C, H, W) for a CNN, so that ``in_features`` is C."""
    if arch != "cnn":
        return task
    if task.image_shape is None:
        raise ValueError(f"arch 'cnn' needs a task of images, got {task.name!r}")
    train, test = (x.unflatten(1, task.image_shape) for x in (task.x_train, task.x_test))
    return dataclasses.replace(task, x_train=train, x_test=test)


def _build(
    config: TrainConfig, inputs: int, outputs: int, device: torch.device | str, generator: torch.Generator
) -> DeepNarrowMLP | DeepNarrowCNN:
    model = MODELS[config.arch](
        inputs,
        outputs,
        config.depth,
        scale=config.scale,
        rho=config.rho,
        beta=config.beta,
        init=config.init,
        form=config.form,
        checkpoint=config.checkpoint,
        dtype=DTYPES[config.dtype],
    )
    model.reset_parameters(generator)
    return model.to(device)


class Trainer:
    """One run: model, optimizer, random state and position, advanced a step at a time.

    ``position`` is (epochs finished, steps done in the current epoch). The order of an epoch's samples follows from
    the random state at its start, so a run can stop after any step and go on with the same numbers. ``saved_threads``
    is the number of threads of the process that saved a loaded run, None for a new one.
    """

    def __init__(self, config: TrainConfig, task: Task, *, device: torch.device | str = "cpu") -> None:
        if task.name != config.task:
            raise ValueError(f"task must be {config.task!r} as the configuration says, got {task.name!r}")
        self.config = config
        self.device = torch.device(device)
        task = inputs_for(config.arch, task)
        self.task = task.to(self.device)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.model = _build(config, task.in_features, task.out_features, device, self.generator)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=config.lr, momentum=config.momentum, fused=True)
        self.epoch = 0
        self.saved_threads: int | None = None
        self._last_loss = math.nan
        self.steps_per_epoch = steps_per_epoch(config, task)
        self._begin_epoch(self.generator.get_state())

    def _begin_epoch(self, random_state: Tensor) -> None:
        self._epoch_random_state = random_state
        self.generator.set_state(random_state)
        self._order = torch.randperm(self.task.x_train.shape[0], generator=self.generator).to(self.device)
        self.step_in_epoch = 0
        # Sums over the samples seen in this epoch: loss, correct predictions. Float64, on the device: no wait per step.
        self._sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        self._seconds = 0.0

    @property
    def step_count(self) -> int:
        """Optimisation steps since the start of the run."""
        return self.epoch * self.steps_per_epoch + self.step_in_epoch

    @property
    def finished(self) -> bool:
        return self.epoch >= self.config.epochs

    @property
    def samples_seen(self) -> int:
        """Samples of the current epoch that have been trained on."""
        return min(self.step_in_epoch * self.config.batch_size, self.task.x_train.shape[0])

    def running_loss(self) -> float:
        """Mean training loss over the current epoch so far; before its first step, over the last one (nan without)."""
        return self._sums[0].item() / self.samples_seen if self.samples_seen else self._last_loss

    def step(self) -> EpochMetrics | None:
        """One SGD step; the epoch's metrics after its last step, otherwise None.

        Raises: DivergedError at the end of an epoch whose loss is not finite.
        """
        start = time.perf_counter()
        batch = self._order[self.samples_seen :][: self.config.batch_size]
        target = self.task.y_train[batch]
        prediction = self.model(self.task.x_train[batch])
        loss = thesis_loss(prediction, target)
        self.optimizer.zero_grad()
        loss.backward()
        steps = self.config.epochs * self.steps_per_epoch
        factor = decay_factor(self.config.decay, self.step_count, steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * factor
        self.optimizer.step()
        with torch.no_grad():
            self._sums[0] += loss.double() * len(batch)
            if self.task.accuracy_kind is not None:
                self._sums[1] += self.task.correct(prediction, target)
        self.step_in_epoch += 1
        self._seconds += time.perf_counter() - start
        return self._end_epoch() if self.step_in_epoch == self.steps_per_epoch else None

    def _end_epoch(self) -> EpochMetrics:
        start = time.perf_counter()
        loss, correct = (self._sums / self.task.x_train.shape[0]).tolist()  # on a GPU, this waits for the last step
        seconds = self._seconds + time.perf_counter() - start
        test_loss, test_accuracy = self.evaluate()
        self.require_finite(test_loss)
        self._last_loss = loss
        self.epoch += 1
        metrics = EpochMetrics(
            epoch=self.epoch,
            step=self.epoch * self.steps_per_epoch,
            train_loss=loss,
            train_accuracy=None if self.task.accuracy_kind is None else correct,
            test_loss=test_loss,
            test_accuracy=test_accuracy,
            seconds=seconds,
            samples_per_second=self.task.x_train.shape[0] / seconds,
        )
        self._begin_epoch(self.generator.get_state())
        return metrics

    def require_finite(self, test_loss: float = 0.0) -> None:
        """Raise DivergedError if the current epoch's training loss, or the test loss given, is not finite."""
        if not math.isfinite(self._sums[0].item() + test_loss):
            raise self._diverged("loss is")

    def _diverged(self, what: str) -> DivergedError:
        return DivergedError(
            f"the {what} no longer finite in epoch {self.epoch + 1}: lr = {self.config.lr:g} is too large "
            "(start again in another --out with a smaller --lr or --tau)"
        )

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float | None]:
        """Loss and accuracy on the test samples; accuracy is None for a regression task."""
        loss = correct = 0.0
        task = self.task
        for x, y in zip(task.x_test.split(_EVALUATION_BATCH), task.y_test.split(_EVALUATION_BATCH), strict=True):
            prediction = self.model(x)
            loss += thesis_loss(prediction, y).item() * len(x)
            if task.accuracy_kind is not None:
                correct += task.correct(prediction, y).item()
        count = task.x_test.shape[0]
        return loss / count, None if task.accuracy_kind is None else correct / count

    def save(self, path: str | Path) -> None:
        """Write the whole state of the run to ``path``, atomically.

        Raises: DivergedError, leaving ``path`` as it is, if the current epoch's loss, a parameter or its momentum is
        not finite; OSError if ``path`` cannot be written.
        """
        self.require_finite()
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            if state.get("momentum_buffer") is not None:
                tensors[f"momentum.{index}"] = state["momentum_buffer"]
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise self._diverged("parameters are")
        tensors["random_state"] = self._epoch_random_state
        tensors["sums"] = self._sums
        header = {
            "config": dataclasses.asdict(self.config),
            "in_features": self.task.in_features,
            "out_features": self.task.out_features,
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "seconds": self._seconds,
            "threads": torch.get_num_threads(),
        }
        _write(Path(path), tensors, header)

    @classmethod
    def load(
        cls, path: str | Path, task: Task, *, device: torch.device | str = "cpu", epochs: int | None = None
    ) -> Trainer:
        """The run saved at ``path``, to go on with; ``epochs`` replaces the number of epochs to train in all.

        Raises: FileNotFoundError, DamagedFileError; ValueError when ``task`` is not the run's task.
        """
        tensors, header = _read(Path(path))
        with _damage_named(path):
            config = _config(header)
            epoch, step_in_epoch, seconds = header["epoch"], header["step_in_epoch"], float(header["seconds"])
            sizes = header["in_features"], header["out_features"]
        found = inputs_for(config.arch, task).in_features, task.out_features
        if sizes != found:
            raise ValueError(f"task must have {sizes} features as the run in {path}, got {found}")
        if epochs is not None:
            config = dataclasses.replace(config, epochs=epochs)
        trainer = cls(config, task, device=device)
        with _damage_named(path):
            trainer.model.load_state_dict(_part(tensors, "model."))
            momentum = {int(i): {"momentum_buffer": t} for i, t in _part(tensors, "momentum.").items()}
            trainer.optimizer.load_state_dict({**trainer.optimizer.state_dict(), "state": momentum})
            trainer.epoch = epoch
            trainer.saved_threads = header.get("threads")
            trainer._begin_epoch(tensors["random_state"])
            trainer.step_in_epoch, trainer._seconds = step_in_epoch, seconds
            trainer._sums.copy_(tensors["sums"])
        return trainer


def fit(
    trainer: Trainer,
    out: str | Path,
    *,
    save_every: float = 30.0,
    plot: bool = True,
    on_step: Callable[[Trainer], None] | None = None,
) -> bool:
    """Train until the configured number of epochs, keeping the run in the folder ``out``.

    The checkpoint is written at the start, after every ``save_every`` seconds, at the end, and when the process is
    asked to stop (Ctrl-C or SIGTERM): the step in progress is finished and no step is lost. A second Ctrl-C stops at
    once and keeps the last checkpoint. ``metrics.jsonl`` keeps the lines of the epochs that the trainer has finished.

    Returns: True when the run is finished, False when it was asked to stop before.

    Raises: ValueError if ``out`` holds a run with another configuration (but for ``epochs``), DamagedFileError if its
        files cannot be read, OSError if ``out`` cannot be written: all before anything is changed. DivergedError; the
        checkpoint is then the last one whose loss, parameters and momentum were finite, some steps back.
    """
    folder = Path(out)
    require_writable(folder)
    lines = [m for m in read_metrics(folder) if m.epoch <= trainer.epoch]
    if (folder / CHECKPOINT).exists():
        found = read_config(folder / CHECKPOINT)
        if dataclasses.replace(found, epochs=trainer.config.epochs) != trainer.config:
            raise ValueError(f"out must not hold a run with another configuration than the trainer's, got {folder}")
    trainer.save(folder / CHECKPOINT)
    _replace(folder / METRICS, "".join(_line(m) for m in lines).encode())
    saved = time.monotonic()
    with _stop_requests() as stop_requested, open(folder / METRICS, "a", encoding="utf-8") as log:
        while not trainer.finished and not stop_requested():
            metrics = trainer.step()
            if metrics is not None:
                lines.append(metrics)
                log.write(_line(metrics))
                log.flush()
            if on_step is not None:
                on_step(trainer)
            if time.monotonic() - saved >= save_every:
                trainer.save(folder / CHECKPOINT)
                saved = time.monotonic()
        trainer.save(folder / CHECKPOINT)
    if plot and lines:
        plot_metrics(lines, folder / CURVES, title=_title(trainer.config), predicted=trainer.config.predicted_loss)
    return trainer.finished


def holds_run(folder: str | Path) -> bool:
    """Whether ``folder`` holds (part of) a run."""
    return any((Path(folder) / name).exists() for name in (CHECKPOINT, METRICS))


def require_writable(folder: str | Path) -> None:
    """Make ``folder`` where it is missing.

    Raises: OSError naming it if it, or a file in it, cannot be made.
    """
    with _write_errors_named(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


def read_metrics(folder: str | Path) -> list[EpochMetrics]:
    """The lines of a run's ``metrics.jsonl``, without a last line that a crash cut short; none where there is no file.

    Raises: DamagedFileError for a line that is not an epoch's metrics.
    """
    path = Path(folder) / METRICS
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    with _damage_named(path):
        return [EpochMetrics(**json.loads(line)) for line in lines if line.endswith("\n")]


def read_config(path: str | Path) -> TrainConfig:
    """The configuration of the run saved at ``path``, a checkpoint.

    Raises: FileNotFoundError, DamagedFileError.
    """
    _, header = _read(Path(path), tensors=False)
    with _damage_named(path):
        return _config(header)


def plot_metrics(
    metrics: list[EpochMetrics], path: str | Path, *, title: str = "", predicted: float | None = None
) -> None:
    """Loss and (for a task with classes) accuracy against epochs, as a PNG; needs matplotlib.

    ``predicted`` is a training loss to mark: the one that the kernel predicts for the end.
    """
    from matplotlib.figure import Figure  # no pyplot: no global state, no display
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    panels = 1 if metrics[0].test_accuracy is None else 2
    figure = Figure(figsize=(5.2 * panels, 3.8), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    epochs = [m.epoch for m in metrics]
    style: dict[str, Any] = {"marker": "o", "markersize": 3} if len(metrics) <= 60 else {}
    axes[0].plot(epochs, [m.train_loss for m in metrics], label="train", **style)
    axes[0].plot(epochs, [m.test_loss for m in metrics], label="test", **style)
    if predicted is not None:
        axes[0].axhline(predicted, color="gray", linestyle=":", label="predicted end")
    axes[0].set_yscale("log")
    axes[0].set_ylabel(r"loss  $\frac{1}{2N}\sum_n\|f(x_n)-y_n\|^2$")
    if panels == 2:
        axes[1].plot(epochs, [m.train_accuracy for m in metrics], label="train", **style)
        axes[1].plot(epochs, [m.test_accuracy for m in metrics], label="test", **style)
        axes[1].yaxis.set_major_formatter(PercentFormatter(1.0))
        axes[1].set_ylabel("accuracy")
    for ax in axes:
        ax.set_xlabel("epoch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(alpha=0.3)
        ax.legend()
    figure.suptitle(title)
    temporary = Path(f"{path}.tmp")
    figure.savefig(temporary, dpi=150, format="png")
    os.replace(temporary, path)


def save_model(model: DeepNarrowMLP | DeepNarrowCNN, path: str | Path) -> None:
    """Write a model, its settings and its exact parameters (Delta in offset form) to a safetensors file, atomically."""
    if isinstance(model, DeepNarrowCNN):
        settings: dict[str, Any] = {
            "arch": "cnn",
            "in_features": model.in_channels,
            "out_features": model.out_channels,
            "kernel_size": model.kernel_size,
        }
    else:
        settings = {"arch": "mlp", "in_features": model.in_features, "out_features": model.out_features}
    settings |= {
        "depth": model.depth,
        "scale": model.scale,
        "rho": model.rho,
        "beta": model.beta,
        "init": model.init,
        "form": model.form,
        "checkpoint": model.checkpoint,
        "chunks": model.chunks,
    }
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    _write(Path(path), tensors, {"model": settings})


def load_model(path: str | Path, *, device: torch.device | str = "cpu") -> DeepNarrowMLP | DeepNarrowCNN:
    """The model in a file of ``save_model`` or in a run's checkpoint, dtype as saved.

    Raises: FileNotFoundError, DamagedFileError.
    """
    tensors, header = _read(Path(path), prefix="model.")
    with _damage_named(path):
        settings = header.get("model")
        if settings is None:
            config = header["config"]
            names = ("arch", "depth", "scale", "rho", "beta", "init", "form", "checkpoint")
            settings = {
                "in_features": header["in_features"],
                "out_features": header["out_features"],
                **{name: config[name] for name in names},
            }
        state = _part(tensors, "model.")
        sizes = settings.pop("in_features"), settings.pop("out_features")
        model = MODELS[settings.pop("arch")](*sizes, **settings, dtype=state["first_weight"].dtype)
        model.load_state_dict(state)
    return model.to(device)


def peak_memory(device: torch.device | str = "cpu") -> int:
    """Most bytes in use at once so far: allocated by torch on a GPU, resident in the whole process on the CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _title(config: TrainConfig) -> str:
    return f"{config.task}: {config.arch}, L = {config.depth}, $C_L$ = {config.scale:g}, {config.dtype}, {config.form}"


def _line(metrics: EpochMetrics) -> str:
    return json.dumps(dataclasses.asdict(metrics), allow_nan=False) + "\n"


def _config(header: Mapping[str, Any]) -> TrainConfig:
    return TrainConfig(**header["config"])


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


@contextmanager
def _damage_named(path: str | Path) -> Iterator[None]:
    """Whatever goes wrong while a file's content is interpreted is the file's fault: say which file."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise DamagedFileError(f"{path} is damaged or not a narrowdeep file: {error}") from error


@contextmanager
def _write_errors_named(path: str | Path) -> Iterator[None]:
    """safetensors has an error of its own for what went wrong with the disk, and Python's may name a temporary file."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from error


def _crc32(tensors: Mapping[str, Tensor]) -> int:
    checksum = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        checksum = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), checksum)
        if tensor.numel():
            checksum = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), checksum)  # type: ignore[arg-type]
    return checksum


def _write(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    cpu = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
    metadata = {"format": _FORMAT, "header": json.dumps(header, allow_nan=False)}
    # safetensors has no checksum: one for each prefix, so that the model alone can be read and checked.
    prefixes = {name.partition(".")[0] for name in cpu}
    checksums = {p: _crc32({n: t for n, t in cpu.items() if n.partition(".")[0] == p}) for p in prefixes}
    metadata["crc32"] = json.dumps({"header": zlib.crc32(metadata["header"].encode()), "tensors": checksums})
    temporary = path.with_name(path.name + ".tmp")
    try:
        with _write_errors_named(path):
            save_file(cpu, temporary, metadata=metadata)
            _commit(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    _commit(temporary, path)


def _commit(temporary: Path, path: Path) -> None:
    """Put a finished file in its place: a reader, or a crash at any moment, sees the old file or the new one."""
    for target in (temporary, path.parent):
        if target == path.parent:
            os.replace(temporary, path)
        descriptor = os.open(target, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _read(path: Path, *, prefix: str = "", tensors: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (all, those with a prefix, or none) and header of a file of ``_write``, checked against its checksums."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    with _damage_named(path), safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"its format must be {_FORMAT!r}, got {metadata.get('format')!r}")
        checksums = json.loads(metadata["crc32"])
        if zlib.crc32(metadata["header"].encode()) != checksums["header"]:
            raise ValueError("the checksum of its header does not match")
        header = json.loads(metadata["header"])
        names = [name for name in file.keys() if tensors and name.startswith(prefix)]  # noqa: SIM118 (not a mapping)
        loaded = {name: file.get_tensor(name) for name in names}
        for part in sorted({name.partition(".")[0] for name in names}):
            if _crc32({n: t for n, t in loaded.items() if n.partition(".")[0] == part}) != checksums["tensors"][part]:
                raise ValueError(f"the checksum of its part {part!r} does not match")
    return loaded, header


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
