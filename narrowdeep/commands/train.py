"""``narrowdeep train``: train a network on a task, in a run that can be stopped and resumed exactly.

More than 400 lines, because each option and each setting that it may start from takes one.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from narrowdeep import files, training
from narrowdeep.commands.network import Arch, Form, parse_checkpoint
from narrowdeep.commands.options import (
    DeviceOption,
    Dtype,
    JsonOption,
    fail,
    has_matplotlib,
    memory_errors,
    option,
    print_json,
    resolve_device,
)
from narrowdeep.commands.ranks import launched, local_device, together
from narrowdeep.commands.settings import ConfigOption, write_settings
from narrowdeep.data import TASKS, Task, load_task
from narrowdeep.distributed.ranks import LostRankError, Ranks
from narrowdeep.extras import install
from narrowdeep.memory.sizes import parse_bytes
from narrowdeep.step_size import StepSize, predict_step_size
from narrowdeep.training import DTYPES, TrainConfig, Trainer
from narrowdeep.training.tensorboard import scalars


@dataclass(frozen=True)
class Defaults:
    """What trains a task well when nothing else is asked for; ``rho`` None stands for ``2 sqrt(in_features)``.

    tau is a fraction (toy 2/3, others a tenth or a fifth, for the noise of small batches) of the largest stable
    kernel-time step, ``2 (1 + momentum)`` over the largest eigenvalue of the limit kernel on the data divided by N.
    The limit kernel's part that is not linear in x grows with rho, and images are not learned well by a linear map.
    """

    epochs: int
    batch_size: int
    tau: float
    momentum: float
    rho: float | None


DEFAULTS = {
    "toy": Defaults(epochs=2000, batch_size=200, tau=0.5, momentum=0.0, rho=1.0),
    "digits": Defaults(epochs=40, batch_size=128, tau=0.015, momentum=0.97, rho=None),
    "digits01": Defaults(epochs=20, batch_size=32, tau=0.015, momentum=0.95, rho=None),
    "mnist": Defaults(epochs=5, batch_size=128, tau=0.005, momentum=0.97, rho=None),
    "mnist01": Defaults(epochs=5, batch_size=128, tau=0.005, momentum=0.97, rho=None),
}


# One over the limit kernel's largest eigenvalue over N is 0.10 for mnist01 and 0.014 with ten outputs: nearly all of it
# is the mean of the data, so what is learned comes with the momentum. Measured at rho = 1 with --pool 4; for digits01,
# whose images are 8x8, at rho = 2 without.
CNN_DEFAULTS = {
    "digits": Defaults(epochs=40, batch_size=128, tau=0.012, momentum=0.98, rho=1.0),
    "digits01": Defaults(epochs=20, batch_size=32, tau=0.04, momentum=0.95, rho=2.0),
    "mnist": Defaults(epochs=5, batch_size=512, tau=0.012, momentum=0.98, rho=1.0),
    "mnist01": Defaults(epochs=8, batch_size=512, tau=0.08, momentum=0.98, rho=1.0),
}


def _by_task(field: str) -> str:
    groups = [
        ", ".join(f"{'2 sqrt(inputs)' if v is None else v} for {n}" for n, v in values.items())
        for values in ({n: getattr(d, field) for n, d in table.items()} for table in (DEFAULTS, CNN_DEFAULTS))
    ]
    return "; with --arch cnn ".join(groups)


GAUSS_NEWTON = {"epochs": 1, "batch_size": 256, "momentum": 0.0, "damping": 1e-4}
"""What --optimizer gauss-newton takes when nothing else is asked for."""

TaskChoice = Enum("TaskChoice", {name: name for name in TASKS}, type=str)  # type: ignore[misc] # names known at run time


class Decay(str, Enum):
    none = "none"
    linear = "linear"


class Optimizer(str, Enum):
    sgd = "sgd"
    gauss_newton = "gauss-newton"


class Init(str, Enum):
    ntk = "ntk"
    kaiming = "kaiming"


def train(
    task: Annotated[TaskChoice | None, option("task", "digits")] = None,
    arch: Annotated[Arch | None, option("arch", "mlp")] = None,
    depth: Annotated[int | None, option("depth", "1000")] = None,
    scale: Annotated[float | None, option("scale", "the depth")] = None,
    rho: Annotated[float | None, option("rho", _by_task("rho"))] = None,
    beta: Annotated[float | None, option("beta", "1")] = None,
    init: Annotated[Init | None, option("init", "ntk")] = None,
    form: Annotated[Form | None, option("form", "offset")] = None,
    checkpoint: Annotated[str | None, option("checkpoint", "auto")] = None,
    budget: Annotated[str | None, option("budget")] = None,
    pool: Annotated[int | None, option("pool", "1")] = None,
    optimizer: Annotated[Optimizer | None, option("method", "sgd", flag="optimizer")] = None,
    damping: Annotated[float | None, option("damping", "1e-4")] = None,
    epochs: Annotated[int | None, option("epochs", f"{_by_task('epochs')}; 1 for gauss-newton")] = None,
    batch_size: Annotated[int | None, option("batch-size", f"{_by_task('batch_size')}; 256 for gauss-newton")] = None,
    lr: Annotated[str | None, option("lr", "tau / (L C_L^2)")] = None,
    tau: Annotated[float | None, option("tau", _by_task("tau"))] = None,
    momentum: Annotated[float | None, option("momentum", _by_task("momentum"))] = None,
    decay: Annotated[Decay | None, option("decay", "none")] = None,
    seed: Annotated[int | None, option("seed", "0")] = None,
    dtype: Annotated[Dtype | None, option("dtype", "float32")] = None,
    device: DeviceOption = "cpu",
    data: Annotated[Path | None, option("data")] = None,
    download: Annotated[bool, typer.Option("--download", help="Download MNIST into --data if missing.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the run. [default: runs/TASK]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, with its settings.")] = False,
    save_every: Annotated[float, typer.Option(min=0, help="Seconds between two saves of the run.")] = 30.0,
    plot: Annotated[bool, typer.Option(help="Draw curves.png at the end; needs matplotlib.")] = True,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write scalars for TensorBoard into --out; needs tensorboard.")
    ] = False,
    timeout: Annotated[
        float, typer.Option(help="Seconds that a process under torchrun waits for another one, above 0.")
    ] = 1800.0,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Train a network with SGD or Gauss-Newton on 1/(2N) sum ||f - y||^2.

    The run's folder holds checkpoint.safetensors (its whole state), metrics.jsonl, settings.toml (for --config) and
    curves.png, and takes one run at a time. Ctrl-C finishes the step in progress and keeps every step done; --resume
    then goes on with the same numbers, bit for bit at a given number of threads and instruction set, as a run never
    stopped. Of the settings, only --epochs can change on the way.

    torchrun --nproc-per-node N -m narrowdeep train ... divides the samples of each step over N processes. All read the
    run's folder, the first one writes it.
    """
    given: dict[str, Any] = {
        "task": task and task.value,
        "arch": arch and arch.value,
        "depth": depth,
        "scale": scale,
        "rho": rho,
        "beta": beta,
        "init": init and init.value,
        "form": form and form.value,
        "checkpoint": checkpoint and parse_checkpoint(checkpoint),
        "pool": pool,
        "optimizer": optimizer and optimizer.value,
        "damping": damping,
        "epochs": epochs,
        "batch_size": batch_size,
        "momentum": momentum,
        "decay": decay and decay.value,
        "seed": seed,
        "dtype": dtype and dtype.value,
    }
    asked = {name: value for name, value in given.items() if value is not None}
    with launched(device, timeout) as ranks:
        quiet = json or not ranks.is_first
        with together(ranks):
            if lr is not None:
                asked["lr"] = _learning_rate(lr)
            if budget is not None:
                asked["budget"] = parse_bytes(budget)
            if not math.isfinite(save_every):
                raise ValueError(f"save-every must be finite, got {save_every}")
            target = resolve_device(local_device(device))
            if lr is not None and tau is not None:
                raise ValueError(f"lr and tau set the same thing: give one, got lr = {lr} and tau = {tau}")
            if tensorboard and importlib.util.find_spec("tensorboard") is None:
                raise ValueError(f"tensorboard must be installed: {install('tensorboard')}, or leave --tensorboard out")
            plot = plot and ranks.is_first and has_matplotlib("the plot")
            folder = out or Path("runs") / asked.get("task", "digits")
        with ExitStack() as stack:
            with together(ranks):
                if ranks.is_first and folder.is_dir():  # before its state is read; a new one is made when all is right
                    stack.enter_context(files.folder_lock(folder))
            with together(ranks):
                make = _resume if resume else _start
                trainer = make(asked, tau, folder, target, data, download, quiet=quiet, ranks=ranks)
                trainer.require_room()
            with together(ranks):
                trainer.require_same()
                if ranks.is_first:
                    training.require_writable(folder)
                    stack.enter_context(files.folder_lock(folder))
                    if not resume:
                        _require_no_run(folder)  # which may have begun in the meantime
                    write_settings(folder, trainer.config)
            log = stack.enter_context(scalars(trainer, folder)) if tensorboard and ranks.is_first else None
            finished = _fit(trainer, folder, save_every=save_every, plot=plot, quiet=quiet, log=log)
            if ranks.is_first:
                _report(trainer, folder, finished=finished, plot=plot, json=json)
    if not finished:
        raise typer.Exit(130)


def _require_no_run(folder: Path) -> None:
    if training.holds_run(folder):
        raise ValueError(f"out must not hold a run already (go on with --resume, or take another folder), got {folder}")


def _learning_rate(text: str) -> float | Literal["auto"]:
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"lr must be a number or 'auto', got {text!r}") from None


def _start(
    asked: dict[str, Any],
    tau: float | None,
    folder: Path,
    device: torch.device,
    data: Path | None,
    download: bool,
    *,
    quiet: bool,
    ranks: Ranks,
) -> Trainer:
    _require_no_run(folder)
    name = asked.get("task", "digits")
    arch = asked.get("arch", "mlp")
    table = CNN_DEFAULTS if arch == "cnn" else DEFAULTS
    if name not in table:
        raise ValueError(f"task must be one of {', '.join(table)} with arch {arch!r}, got {name!r}")
    defaults = table[name]
    if asked.get("init") == "kaiming":
        for unused in ("rho", "beta"):
            if unused in asked:
                raise ValueError(f"{unused} is not used by init 'kaiming': leave it out, got {asked[unused]}")
    depth = asked.get("depth", 1000)
    settings: dict[str, Any] = {
        "task": name,
        "arch": arch,
        "depth": depth,
        "scale": float(depth),
        "rho": defaults.rho,
        "beta": 1.0,
        "init": "ntk",
        "form": "offset",
        "checkpoint": "auto",
        "pool": 1,
        "epochs": defaults.epochs,
        "batch_size": defaults.batch_size,
        "momentum": defaults.momentum,
        "seed": 0,
        "dtype": "float32",
        **asked,
    }
    if asked.get("optimizer") == "gauss-newton":
        for unused, value in {"tau": tau, **{name: asked.get(name) for name in ("lr", "momentum", "decay")}}.items():
            if value is not None:
                raise ValueError(f"{unused} is not used by optimizer 'gauss-newton': leave it out, got {value}")
        settings = {**settings, **GAUSS_NEWTON, "lr": _step(settings, 1.0), **asked}
    task = _load_task(settings, data, download)
    if settings["rho"] is None:
        settings["rho"] = 2 * math.sqrt(task.in_features)
    settings.setdefault("lr", _step(settings, defaults.tau if tau is None else tau))
    if settings["lr"] != "auto":
        return Trainer(TrainConfig(**settings), task, device=device, ranks=ranks)
    predicted = _predict(TrainConfig(**{**settings, "lr": 1.0}), task, device, asked.get("momentum"))
    predicted = ranks.first(predicted)  # which may differ in the last bits from machine to machine
    settings.update(lr=predicted.lr, momentum=predicted.momentum, predicted_loss=predicted.loss, lr_predicted=True)
    config = TrainConfig(**settings)
    if not quiet:
        typer.echo(
            f"lr {predicted.lr:.4g} (kernel time {predicted.tau:.4g}), momentum {predicted.momentum:.4g}: the kernel "
            f"of {predicted.samples} samples has largest eigenvalue {predicted.largest:.4g} N and predicts a training "
            f"loss of {predicted.loss:.4g} at the end"
        )
    return Trainer(config, task, device=device, ranks=ranks)


def _load_task(settings: dict[str, Any], data: Path | None, download: bool) -> Task:
    dtype = DTYPES[settings["dtype"]]
    return load_task(settings["task"], data=data, download=download, pool=settings["pool"], dtype=dtype)


def _predict(config: TrainConfig, task: Task, device: torch.device, momentum: float | None) -> StepSize:
    model = training.build_model(config, task, device=device)
    return predict_step_size(
        model,
        training.inputs_for(config.arch, task).to(device),
        steps=config.epochs * training.steps_per_epoch(config, task),
        batch_size=config.batch_size,
        momentum=momentum,
        decay=config.decay,
        seed=config.seed,
    )


def _step(settings: dict[str, Any], tau: float) -> float:
    """eta = tau / (L C_L^2): a step of SGD without momentum advances kernel time by tau."""
    if not (math.isfinite(tau) and tau > 0):
        raise ValueError(f"tau must be finite and positive, got {tau}")
    for name in ("depth", "scale"):
        if not settings[name] > 0:
            raise ValueError(f"{name} must be positive, got {settings[name]}")
    return tau / settings["depth"] / settings["scale"] / settings["scale"]  # the square may overflow


def _resume(
    asked: dict[str, Any],
    tau: float | None,
    folder: Path,
    device: torch.device,
    data: Path | None,
    download: bool,
    *,
    quiet: bool,
    ranks: Ranks,
) -> Trainer:
    path = folder / training.CHECKPOINT
    config = training.read_config(path)
    if tau is not None:
        asked["lr"] = _step(dataclasses.asdict(config), tau)
    if asked.get("lr") == "auto" and config.lr_was_predicted:
        del asked["lr"]  # what the run's start predicted
    for name, value in asked.items():
        if name != "epochs" and value != getattr(config, name):
            raise ValueError(f"{name} must be {getattr(config, name)!r} as in the run in {folder}, got {value!r}")
    task = _load_task(dataclasses.asdict(config), data, download)
    training.read_metrics(folder)  # a damaged one is refused before anything is written
    trainer = Trainer.load(path, task, device=device, epochs=asked.get("epochs"), ranks=ranks)
    now = {"ranks": (trainer.saved_ranks, ranks.size)}
    if device.type == "cpu":
        now["threads"] = (trainer.saved_threads, torch.get_num_threads())
    for what, (before, number) in now.items():
        if before not in (None, number) and ranks.is_first:
            change = f"the run had {before} {what} and goes on with {number}"
            typer.echo(f"warning: {change}: the last bits may differ", err=True)
    return trainer


def _fit(
    trainer: Trainer,
    folder: Path,
    *,
    save_every: float,
    plot: bool,
    quiet: bool,
    log: Callable[[training.EpochMetrics], None] | None,
) -> bool:
    columns = (
        TextColumn("epoch {task.fields[epoch]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}{task.fields[rate]:.0f} samples/s"),
        TimeRemainingColumn(),
    )
    # A step of Gauss-Newton is long: what its passes over the samples and its system have done is shown.
    unit = 1 if trainer.gauss_newton is None else 4 * trainer.task.x_train.shape[0]
    total = trainer.config.epochs * trainer.steps_per_epoch * unit
    samples_per_step = trainer.task.x_train.shape[0] / trainer.steps_per_epoch
    first, start, shown = trainer.step_count, time.monotonic(), 0.0
    console = Console(stderr=True)

    def on_epoch(metrics: training.EpochMetrics) -> None:
        if log is not None:
            log(metrics)
        if not (quiet or console.is_terminal):
            typer.echo(f"epoch {metrics.epoch} of {trainer.config.epochs}: {_numbers(metrics)}", err=True)

    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bar:
        epoch = min(trainer.epoch + 1, trainer.config.epochs)
        line = bar.add_task("", total=total, completed=min(first * unit, total), epoch=epoch, loss="", rate=0.0)

        def show(trainer: Trainer) -> None:
            nonlocal shown
            now = time.monotonic()
            if now - shown < 0.1 and not trainer.finished:  # reading the loss waits for the device
                return
            shown = now
            loss = f"loss {trainer.running_loss():.4g}  "
            rate = (trainer.step_count - first) * samples_per_step / (now - start)
            epoch = min(trainer.epoch + 1, trainer.config.epochs)
            bar.update(line, completed=trainer.step_count * unit, epoch=epoch, rate=rate, loss=loss)

        trainer.on_batch = lambda done, of: bar.update(line, completed=trainer.step_count * unit + unit * done // of)
        try:
            with memory_errors(), warnings.catch_warnings():
                warnings.simplefilter("default")
                if trainer.ranks.is_first:
                    warnings.showwarning = lambda message, *_: typer.echo(f"warning: {message}", err=True)
                else:
                    warnings.simplefilter("ignore")
                on_step = None if quiet else show
                return training.fit(
                    trainer, folder, save_every=save_every, plot=plot, on_step=on_step, on_epoch=on_epoch
                )
        except LostRankError as error:
            bar.stop()
            fail(f"{error} (the last state is whole: go on with --resume)", status=1)
        except (training.DivergedError, np.linalg.LinAlgError, OSError) as error:
            bar.stop()
            if trainer.ranks.is_first or isinstance(error, OSError):  # what all of them find
                fail(str(error), status=1)
            raise typer.Exit(1) from None


def _numbers(metrics: training.EpochMetrics) -> str:
    accuracy = "" if metrics.test_accuracy is None else f", accuracy {metrics.test_accuracy:.2%}"
    predicted = ""
    if metrics.predicted_train_loss is not None:
        share = metrics.predicted_test_accuracy
        predicted = f"; the kernel predicted {metrics.predicted_train_loss:.4g}, {metrics.predicted_test_loss:.4g}"
        predicted += "" if share is None else f", {share:.2%}"
    return (
        f"train loss {metrics.train_loss:.4g}, test loss {metrics.test_loss:.4g}{accuracy}{predicted}; "
        f"{metrics.samples_per_second:.0f} samples/s"
    )


def _report(trainer: Trainer, folder: Path, *, finished: bool, plot: bool, json: bool) -> None:
    metrics = training.read_metrics(folder)
    last = metrics[-1] if metrics else None
    curves = folder / training.CURVES if plot and metrics else None
    peak = training.peak_memory(trainer.device)
    if json:
        print_json(
            {
                "finished": finished,
                "epoch": trainer.epoch,
                "step": trainer.step_count,
                "metrics": last and dataclasses.asdict(last),
                "config": dataclasses.asdict(trainer.config),
                "peak_memory_bytes": peak,
                "checkpoint": str(folder / training.CHECKPOINT),
                "plot": curves and str(curves),
            }
        )
        return
    if not finished:
        typer.echo(
            f"stopped in epoch {trainer.epoch + 1} of {trainer.config.epochs} after step {trainer.step_count}: all "
            f"{trainer.step_count} steps are kept. Go on with: narrowdeep train --out {folder} --resume"
        )
    if last is not None:
        typer.echo(f"epoch {last.epoch}: {_numbers(last)}, peak memory {peak / 2**20:.0f} MiB")
    typer.echo(f"checkpoint: {folder / training.CHECKPOINT}")
    if curves is not None:
        typer.echo(f"plot: {curves}")
