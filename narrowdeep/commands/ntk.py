"""``narrowdeep ntk``: tangent kernels of fresh or saved networks, beside their limit of infinite depth."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from narrowdeep import files, training
from narrowdeep.commands.arrays import read_array
from narrowdeep.commands.network import Arch, Form, require_images
from narrowdeep.commands.options import (
    DeviceOption,
    Dtype,
    JsonOption,
    SeedOption,
    has_matplotlib,
    memory_errors,
    one_line_errors,
    option,
    print_json,
    resolve_device,
)
from narrowdeep.commands.progress import progress
from narrowdeep.modules import DeepNarrowCNN, DeepNarrowMLP
from narrowdeep.ntk import empirical_ntk, limit_ntk_cnn, limit_ntk_mlp

Network = DeepNarrowMLP | DeepNarrowCNN


def ntk(
    model: Annotated[
        Path | None, typer.Option(help="A saved model or a run's checkpoint, in place of fresh networks.")
    ] = None,
    arch: Annotated[Arch | None, option("arch", "mlp; cnn needs --inputs")] = None,
    depth: Annotated[list[int] | None, option("depth", "100", several=True)] = None,
    scale: Annotated[float | None, option("scale", "the depth")] = None,
    rho: Annotated[float | None, option("rho", "1")] = None,
    beta: Annotated[float | None, option("beta", "1")] = None,
    form: Annotated[Form | None, option("form", "offset")] = None,
    out_features: Annotated[int | None, typer.Option(help="Outputs of fresh networks. [default: 1]")] = None,
    kernel_size: Annotated[int | None, option("kernel-size", "3")] = None,
    draws: Annotated[int | None, typer.Option(min=1, help="Fresh networks of each depth. [default: 10]")] = None,
    points: Annotated[
        int | None, typer.Option(min=2, max=10**9, help="Angles on the quarter circle. [default: 100]")
    ] = None,
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
    dtype: Annotated[Dtype | None, option("dtype", "float32")] = None,
) -> None:
    """Scaled NTK of networks with two inputs against the angle, as in Figure 4.1b of the thesis, or of any inputs.

    By default x0 = (1, 1) / sqrt(2) and x = (cos g, sin g) for 0 < g < pi/2. The .npz file holds depth (D,),
    kernel (D, draws, points, out, out), limit (points,), angle, x0 and x; with --inputs, which CNNs need, kernel (D,
    draws, N, N, out, out), limit (N, N) and x, and no plot. A model of Kaiming initialisation has no such limit: the
    file then holds none.
    """
    fresh = {"scale": scale, "rho": rho, "beta": beta, "form": form and form.value}
    saved: Network | None = None
    with one_line_errors():
        target = resolve_device(device)
        picture = out.with_suffix(".png") if plot and inputs is None and has_matplotlib("the plot") else None
        _check_out(out, picture)
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
            kind = saved.first_weight.dtype
            if dtype is not None and dtype.torch != kind:
                raise ValueError(f"dtype must be the saved model's, {str(kind)[6:]}, or left out, got {dtype.value}")
        else:
            kind = (dtype or Dtype.float32).torch
            cnn = arch == Arch.cnn
            require_images(arch, kernel_size=kernel_size)
        if cnn and inputs is None:
            raise ValueError("inputs must be given for a CNN: a .npy file (N, C, H, W)")
        shape = "(N, C, H, W)" if cnn else "(N, in)"
        x, x0, angle = _inputs(inputs, shape, 100 if points is None else points, kind, target)
        in_features = x.shape[1]
        if saved is not None:
            wanted = saved.in_channels if isinstance(saved, DeepNarrowCNN) else saved.in_features
            if wanted != in_features:
                hint = "" if inputs else ": give --inputs"
                raise ValueError(f"model must have {in_features} {'channels' if cnn else 'inputs'}, got {wanted}{hint}")
            depths, count, first = [saved.depth], 1, saved
        else:
            chosen: dict[str, Any] = {name: value for name, value in fresh.items() if value is not None}
            if cnn and kernel_size is not None:
                chosen["kernel_size"] = kernel_size
            sizes = in_features, 1 if out_features is None else out_features
            network_class = DeepNarrowCNN if cnn else DeepNarrowMLP
            depths, count = [100] if depth is None else depth, 10 if draws is None else draws
            # Every depth is checked before the first kernel is computed.
            first, *_ = [network_class(*sizes, d, **chosen, device="meta", dtype=kind) for d in depths]
        rows = x if x0 is None else x0
        outputs = first.out_channels if isinstance(first, DeepNarrowCNN) else first.out_features
        kernels = np.empty((len(depths), count, len(rows), len(x), outputs, outputs))
        torch.manual_seed(seed)
    start = time.perf_counter()
    with progress() as bar:
        line = bar.add_task("kernels", total=len(depths) * count)
        for i, d in enumerate(depths):
            for j in range(count):
                bar.update(line, description=f"kernels, depth {d:,}")
                with one_line_errors():
                    network = saved or network_class(*sizes, d, **chosen, device=target, dtype=kind)
                with memory_errors():
                    kernels[i, j] = empirical_ntk(network, rows, None if x0 is None else x).cpu().numpy()
                bar.advance(line)
    seconds = time.perf_counter() - start
    if x0 is not None:
        kernels = kernels[:, :, 0]
    arrays: dict[str, Any] = {"depth": depths, "kernel": kernels, "x": x.cpu().numpy()}
    if x0 is not None:
        arrays.update(x0=x0[0].cpu().numpy(), angle=angle)
    limit: np.ndarray | None = None
    errors: list[float | None] | None = None
    if first.init == "ntk":  # the limit is that of this initialisation
        limit = _limit(first, rows.double(), x.double())
        if x0 is not None:
            limit = limit[0]
        arrays["limit"] = limit
        # The limit is a multiple of the identity: compare every output with itself.
        with np.errstate(all="ignore"):
            diagonal = kernels.diagonal(axis1=-2, axis2=-1)
            distance = np.abs(diagonal - limit[..., None]).reshape(len(depths), -1).max(axis=1) / limit.max()
        errors = [float(e) if np.isfinite(e) else None for e in distance]  # a limit of 0 everywhere has no distance
    with one_line_errors():
        for name, values in (("kernel", kernels), ("limit", limit)):
            if values is not None and not np.isfinite(values).all():
                raise ValueError(
                    f"the {name} must be finite, got {values[~np.isfinite(values)][0]}: the inputs (the largest is "
                    f"{x.abs().max().item():g}), scale, rho or beta are too large for {str(kind)[6:]}"
                )
        with files.replacing(out) as file:
            np.savez_compressed(file, **arrays)
        if picture is not None and angle is not None:
            plot_kernels(angle, depths, kernels[..., 0, 0], limit, picture)
    summary = {
        "depth": depths,
        "draws": count,
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
        if error is not None:
            typer.echo(f"depth {d}: largest distance to the limit {error:.2%} of the limit's largest value")
    typer.echo(f"kernels: {out} ({seconds:.2f} s)")
    if picture is not None:
        typer.echo(f"plot: {picture}")


def _limit(network: Network, x1: Tensor, x2: Tensor) -> np.ndarray:
    """(N1, N2), float64, of networks like this one."""
    settings: dict[str, Any] = {"rho": network.rho, "beta": network.beta}
    if isinstance(network, DeepNarrowCNN):
        settings.update(kernel_size=network.kernel_size, out_channels=network.out_channels)
        return limit_ntk_cnn(x2, **settings).cpu().numpy()
    return limit_ntk_mlp(x1, x2, out_features=network.out_features, **settings).cpu().numpy()


def _inputs(
    file: Path | None, shape: str, points: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor | None, np.ndarray | None]:
    """(x, x0, angle); the last two are None where the inputs come from a file."""
    if file is None:
        angle = np.linspace(0.0, math.pi / 2, points + 2)[1:-1]
        x = torch.tensor(np.stack((np.cos(angle), np.sin(angle)), 1), dtype=dtype, device=device)
        x0 = torch.full((1, 2), 1 / math.sqrt(2), dtype=dtype, device=device)
        return x, x0, angle
    array = read_array("inputs", file, shape, np.float64 if dtype == torch.float64 else np.float32)
    return torch.from_numpy(array).to(device), None, None


def _check_out(out: Path, picture: Path | None) -> None:
    """Raises: ValueError when a file cannot be written, found out by writing beside it; FileNotFoundError."""
    if out.suffix != ".npz":
        raise ValueError(f"out must end in .npz, got {out}")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"out must be in a folder that exists, got {out}")
    for path in (out, picture):
        if path is None:
            continue
        try:
            if path.is_dir():
                raise ValueError(f"out must be a file, got the folder {path}")
            files.require_writable(path)
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise ValueError(f"out must be a file that can be written, got {path}: {reason}") from None


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
    with files.replacing(path) as file:
        figure.savefig(file, dpi=150, format="png")
