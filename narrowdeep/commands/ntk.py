"""``narrowdeep ntk``: tangent kernels of fresh or saved networks, beside their limit of infinite depth."""

from __future__ import annotations

import importlib.util
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from narrowdeep import training
from narrowdeep.commands.network import Arch, Form
from narrowdeep.commands.options import (
    DeviceOption,
    Dtype,
    JsonOption,
    SeedOption,
    one_line_errors,
    print_json,
    resolve_device,
)
from narrowdeep.modules import DeepNarrowCNN, DeepNarrowMLP
from narrowdeep.ntk import empirical_ntk, limit_ntk_cnn, limit_ntk_mlp


def ntk(
    model: Annotated[
        Path | None, typer.Option(help="A saved model or a run's checkpoint, in place of fresh networks.")
    ] = None,
    arch: Annotated[
        Arch | None, typer.Option(help="Kind of fresh networks; a CNN needs --inputs. [default: mlp]")
    ] = None,
    depth: Annotated[
        list[int] | None, typer.Option(help="L of fresh networks; give it more than once to compare. [default: 100]")
    ] = None,
    scale: Annotated[float | None, typer.Option(help="C_L of fresh networks. [default: the depth]")] = None,
    rho: Annotated[float | None, typer.Option(help="Weights' standard deviation of fresh ones. [default: 1]")] = None,
    beta: Annotated[float | None, typer.Option(help="Biases' one, times C_L. [default: 1]")] = None,
    form: Annotated[Form | None, typer.Option(help="How fresh weights are stored. [default: offset]")] = None,
    out_features: Annotated[int | None, typer.Option(help="Outputs of fresh networks. [default: 1]")] = None,
    kernel_size: Annotated[int | None, typer.Option(help="Side of fresh CNNs' filters, odd. [default: 3]")] = None,
    draws: Annotated[int | None, typer.Option(min=1, help="Fresh networks of each depth. [default: 10]")] = None,
    points: Annotated[int | None, typer.Option(min=2, help="Angles on the quarter circle. [default: 100]")] = None,
    inputs: Annotated[
        Path | None, typer.Option(help="A .npy file (N, in) or (N, C, H, W): kernels of these with each other.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The .npz file to write; the plot goes beside it, as .png.")] = Path(
        "ntk.npz"
    ),
    plot: Annotated[bool, typer.Option(help="Draw the kernel against the angle; needs matplotlib.")] = True,
    json: JsonOption = False,
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    dtype: Annotated[Dtype | None, typer.Option(help="Of fresh networks and their inputs. [default: float32]")] = None,
) -> None:
    """Scaled NTK of networks with two inputs against the angle, as in Figure 4.1b of the thesis, or of any inputs.

    By default x0 = (1, 1) / sqrt(2) and x = (cos g, sin g) for 0 < g < pi/2. The .npz file holds depth (D,),
    kernel (D, draws, points, out, out), limit (points,), angle, x0 and x; with --inputs, which CNNs need, kernel (D,
    draws, N, N, out, out), limit (N, N) and x, and no plot. A model of Kaiming initialisation has no such limit: the
    file then holds none.
    """
    fresh = {"scale": scale, "rho": rho, "beta": beta, "form": form and form.value}
    networks: list[list[DeepNarrowMLP | DeepNarrowCNN]]
    with one_line_errors():
        target = resolve_device(device)
        if plot and inputs is None and importlib.util.find_spec("matplotlib") is None:
            raise ValueError("the plot needs matplotlib: install narrowdeep[plots], or pass --no-plot")
        if out.suffix != ".npz":
            raise ValueError(f"out must end in .npz, got {out}")
        if not out.parent.is_dir():
            raise FileNotFoundError(f"out must be in a folder that exists, got {out}")
        _check_writable(out)
        if points is not None and inputs is not None:
            raise ValueError(f"points must be left out with --inputs, got {points}")
        if model is not None:
            given = {**fresh, "depth": depth, "out_features": out_features, "draws": draws, "arch": arch and arch.value}
            given["kernel_size"] = kernel_size
            for name, value in given.items():
                if value is not None:
                    raise ValueError(f"{name.replace('_', '-')} is the saved model's own: leave it out with --model")
            saved = training.load_model(model, device=target)
            cnn = isinstance(saved, DeepNarrowCNN)
            networks = [[saved]]
            kind = saved.first_weight.dtype
            if dtype is not None and dtype.torch != kind:
                raise ValueError(f"dtype must be the saved model's, {str(kind)[6:]}, or left out, got {dtype.value}")
        else:
            kind = (dtype or Dtype.float32).torch
            cnn = arch == Arch.cnn
            if kernel_size is not None and not cnn:
                raise ValueError(f"kernel-size must be left out without --arch cnn, got {kernel_size}")
        if cnn and inputs is None:
            raise ValueError("inputs must be given for a CNN: a .npy file (N, C, H, W)")
        shape = "(N, C, H, W)" if cnn else "(N, in)"
        points_x, x0, angle = _inputs(inputs, shape, 100 if points is None else points, kind, target)
        in_features = points_x.shape[1]
        if model is None:
            chosen: dict[str, Any] = {name: value for name, value in fresh.items() if value is not None}
            torch.manual_seed(seed)
            outputs = 1 if out_features is None else out_features
            if cnn and kernel_size is not None:
                chosen["kernel_size"] = kernel_size
            network_class = DeepNarrowCNN if cnn else DeepNarrowMLP
            networks = [
                [
                    network_class(in_features, outputs, d, **chosen, device=target, dtype=kind)
                    for _ in range(10 if draws is None else draws)
                ]
                for d in ([100] if depth is None else depth)
            ]
        else:
            wanted = saved.in_channels if isinstance(saved, DeepNarrowCNN) else saved.in_features
            if wanted != in_features:
                hint = "" if inputs else ": give --inputs"
                raise ValueError(f"model must have {in_features} {'channels' if cnn else 'inputs'}, got {wanted}{hint}")
    start = time.perf_counter()
    kernels = _kernels(networks, points_x if x0 is None else x0, None if x0 is None else points_x, quiet=json)
    seconds = time.perf_counter() - start
    first = networks[0][0]
    rows = points_x if x0 is None else x0
    depths = [group[0].depth for group in networks]
    if x0 is not None:
        kernels = kernels[:, :, 0]
    arrays: dict[str, Any] = {"depth": depths, "kernel": kernels, "x": points_x.cpu().numpy()}
    if x0 is not None:
        arrays.update(x0=x0[0].cpu().numpy(), angle=angle)
    limit, errors = None, None
    if first.init == "ntk":  # the limit is that of this initialisation
        settings: dict[str, Any] = {"rho": first.rho, "beta": first.beta}
        if isinstance(first, DeepNarrowCNN):
            settings.update(kernel_size=first.kernel_size, out_channels=first.out_channels)
            limit = limit_ntk_cnn(points_x.double(), **settings).cpu().numpy()
        else:
            settings["out_features"] = first.out_features
            limit = limit_ntk_mlp(rows.double(), points_x.double(), **settings).cpu().numpy()
        if x0 is not None:
            limit = limit[0]
        arrays["limit"] = limit
        # The limit is a multiple of the identity: compare every output with itself.
        diagonal = kernels.diagonal(axis1=-2, axis2=-1)
        distance = np.abs(diagonal - limit[..., None]).reshape(len(depths), -1)
        errors = [float(e) for e in distance.max(axis=1) / limit.max()]
    picture = None
    with one_line_errors():
        with _replacing(out) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)
        if plot and angle is not None:
            picture = out.with_suffix(".png")
            plot_kernels(angle, depths, kernels[..., 0, 0], limit, picture)
    summary = {
        "depth": depths,
        "draws": len(networks[0]),
        "largest_relative_distance_to_limit": errors,
        "seconds": seconds,
        "file": str(out),
        "plot": picture and str(picture),
    }
    if json:
        print_json(summary)
        return
    if errors is None:
        typer.echo(f"no limit: it is that of the NTK initialisation, and the model's is {first.init}")
    for d, error in zip(depths, errors or [], strict=errors is not None):
        typer.echo(f"depth {d}: largest distance to the limit {error:.2%} of the limit's largest value")
    typer.echo(f"kernels: {out} ({seconds:.2f} s)")
    if picture is not None:
        typer.echo(f"plot: {picture}")


def _inputs(
    file: Path | None, shape: str, points: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor | None, np.ndarray | None]:
    """(x, x0, angle); the last two are None where the inputs come from a file."""
    if file is None:
        angle = np.linspace(0.0, math.pi / 2, points + 2)[1:-1]
        x = torch.tensor(np.stack((np.cos(angle), np.sin(angle)), 1), dtype=dtype, device=device)
        x0 = torch.full((1, 2), 1 / math.sqrt(2), dtype=dtype, device=device)
        return x, x0, angle
    try:
        array = np.load(file, allow_pickle=False)
    except (ValueError, EOFError):
        raise ValueError(f"inputs must be a .npy file of numbers, got {file}") from None
    if not isinstance(array, np.ndarray) or array.ndim != shape.count(",") + 1 or array.size == 0:
        raise ValueError(f"inputs must hold one array {shape}, not empty, got {getattr(array, 'shape', 'an archive')}")
    if array.dtype.kind not in "fiu" or not np.isfinite(array).all():
        raise ValueError("inputs must hold finite numbers")
    return torch.tensor(array, dtype=dtype, device=device), None, None


def _kernels(
    networks: Sequence[Sequence[DeepNarrowMLP | DeepNarrowCNN]], x1: Tensor, x2: Tensor | None, *, quiet: bool
) -> np.ndarray:
    """(depths, draws, N1, N2, out, out)"""
    columns = (TextColumn("depth {task.fields[depth]}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    groups = []
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as bar:
        line = bar.add_task("", total=sum(map(len, networks)), depth=networks[0][0].depth)
        for group in networks:
            bar.update(line, depth=group[0].depth)
            kernels = []
            for network in group:
                kernels.append(empirical_ntk(network, x1, x2).cpu())
                bar.advance(line)
            groups.append(torch.stack(kernels))
    return torch.stack(groups).numpy()


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside path that takes its place at the end, or is removed on an error."""
    temporary = Path(f"{path}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _check_writable(out: Path) -> None:
    """Raises: ValueError when out cannot be written, found out by writing beside it."""
    if out.is_dir():
        raise ValueError(f"out must be a file, got the folder {out}")
    temporary = Path(f"{out}.tmp")
    try:
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise ValueError(f"out must be a file that can be written, got {out}: {error.strerror}") from None


def plot_kernels(
    angle: np.ndarray, depths: list[int], kernels: np.ndarray, limit: np.ndarray | None, path: Path
) -> None:
    """Kernel values (depths, draws, points) against the angle, the limit if any on top, as a PNG; needs matplotlib."""
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for i, (depth, draws) in enumerate(zip(depths, kernels, strict=True)):
        for j, draw in enumerate(draws):
            label = f"$L = {depth}$" if j == 0 else None
            axes.plot(angle, draw, color=f"C{i}", linewidth=0.8, alpha=0.6, label=label)
    if limit is not None:
        axes.plot(angle, limit, color="black", linewidth=2.0, linestyle="--", label=r"$L \to \infty$")
    axes.set_xlabel(r"angle $\gamma$ of $x = (\cos\gamma, \sin\gamma)$")
    axes.set_ylabel(r"scaled NTK $\tilde\Theta(x_0, x)$,  $x_0 = (1, 1)/\sqrt{2}$")
    axes.set_xticks([0, math.pi / 4, math.pi / 2], ["0", r"$\pi/4$", r"$\pi/2$"])
    axes.grid(alpha=0.3)
    axes.legend()
    with _replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
