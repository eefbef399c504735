"""Figure 4.1: depth 100 and depth 10,000 learn x1 x2 on a circle arc, and their kernels (thesis section 5.1)."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from narrowdeep import ntk
from narrowdeep.data import load_task
from narrowdeep.experiments.base import Context, Experiment, Verdict, number
from narrowdeep.modules import DeepNarrowCNN, DeepNarrowMLP
from narrowdeep.ntk import empirical_ntk, kernel_drift, limit_ntk_mlp
from narrowdeep.training import thesis_loss

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DRIFT = 0.27
"""C_L times the relative drift of the kernel in training (docs/theory.md)."""


@dataclass(frozen=True)
class ToySettings:
    depths: tuple[int, ...] = (100, 10000)
    scales: tuple[float, ...] = (5.0, 50000.0)
    trials: int = 10
    steps: int = 2000
    tau: float = 0.5
    samples: int = 200
    angles: int = 50
    tolerance: float = 0.05
    """A function counts as learned within a tenth of the largest value, 1/2."""


def descend(
    model: DeepNarrowMLP | DeepNarrowCNN, x: Tensor, y: Tensor, *, steps: int, tau: float, context: Context, label: str
) -> None:
    """Full-batch gradient descent on the thesis's loss, ``steps`` steps of kernel time ``tau``, in place."""
    optimizer = torch.optim.SGD(model.parameters(), lr=tau * model.ntk_lr, fused=True)
    for _ in context.track(range(steps), label):
        optimizer.zero_grad()
        thesis_loss(model(x), y).backward()
        optimizer.step()


def trained_toy(
    depth: int, scale: float, trial: int, *, samples: int, steps: int, tau: float, context: Context
) -> tuple[DeepNarrowMLP, DeepNarrowMLP]:
    """A network before and after training on the toy task. The same depth and trial is the same network anywhere."""
    task = load_task("toy", samples=samples, dtype=context.dtype).to(context.device)
    model = DeepNarrowMLP(2, 1, depth, scale=scale, dtype=context.dtype)
    model.reset_parameters(context.generator(depth, trial))
    model = model.to(context.device)
    initial = copy.deepcopy(model)
    label = f"L = {depth}, trial {trial + 1}"
    descend(model, task.x_train, task.y_train, steps=steps, tau=tau, context=context, label=label)
    return initial, model


def _arc(count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``count`` angles strictly between 0 and pi/2, and their points."""
    angle = (torch.arange(count, dtype=torch.float64) + 0.5) * (math.pi / 2 / count)
    return angle, torch.stack((angle.cos(), angle.sin()), 1).to(dtype)


def _trial(settings: ToySettings, depth: int, scale: float, trial: int, context: Context) -> dict[str, Any]:
    initial, model = trained_toy(
        depth, scale, trial, samples=settings.samples, steps=settings.steps, tau=settings.tau, context=context
    )
    x = _arc(settings.angles, context.dtype)[1].to(context.device)
    x0 = torch.full((1, 2), math.sqrt(0.5), dtype=context.dtype, device=context.device)
    with torch.no_grad():
        learned = model(x)[:, 0].double().tolist()
    return {
        "learned": learned,
        "kernel_before": empirical_ntk(initial, x0, x, reduce="trace")[0].tolist(),
        "kernel_after": empirical_ntk(model, x0, x, reduce="trace")[0].tolist(),
        "drift": kernel_drift(initial, model, x),
    }


def _run(settings: ToySettings, context: Context) -> dict[str, Any]:
    angle, x = _arc(settings.angles, torch.float64)
    task = load_task("toy", samples=settings.samples, dtype=torch.float64)
    flow = ntk.NTKRegressor(limit_ntk_mlp).fit(task.x_train.numpy(), task.y_train[:, 0].numpy())
    x0 = torch.full((1, 2), math.sqrt(0.5), dtype=torch.float64)
    result: dict[str, Any] = {
        "angle": angle.tolist(),
        "target": (x[:, 0] * x[:, 1]).tolist(),
        "limit_kernel": limit_ntk_mlp(x0, x)[0].tolist(),
        "limit_learned": flow.predict(x.numpy(), n_steps=settings.steps, tau=settings.tau).tolist(),
        "depths": {},
    }
    for depth, scale in zip(settings.depths, settings.scales, strict=True):
        result["depths"][str(depth)] = [
            context.store.piece(
                f"depth-{depth}-trial-{trial}",
                lambda d=depth, s=scale, t=trial: _trial(settings, d, s, t, context),  # type: ignore[misc]
            )
            for trial in context.track(range(settings.trials), f"L = {depth}")
        ]
    return result


@dataclass(frozen=True)
class _Depth:
    """What the trials of one depth come to."""

    error: float
    """Largest deviation of a learned function from the true one, over angles and trials."""
    spread: float
    """Standard deviation of the initial kernel over trials, relative to the limit; mean square over angles."""
    off: float
    """Deviation of the trials' mean initial kernel from the limit, likewise."""
    drift: float
    """Mean over trials of the relative change of the kernel in training."""


def _summary(result: dict[str, Any], depth: int) -> _Depth:
    trials = result["depths"][str(depth)]
    learned, before = (np.array([t[name] for t in trials]) for name in ("learned", "kernel_before"))
    limit, target = np.array(result["limit_kernel"]), np.array(result["target"])
    return _Depth(
        error=float(np.abs(learned - target).max()),
        spread=float(np.sqrt((before.var(0, ddof=1) / limit**2).mean())),
        off=float(np.sqrt(((before.mean(0) / limit - 1) ** 2).mean())),
        drift=float(np.mean([t["drift"] for t in trials])),
    )


def _verdict(settings: ToySettings, result: dict[str, Any]) -> Verdict:
    shallow, deep = settings.depths[0], settings.depths[-1]
    a, b = _summary(result, shallow), _summary(result, deep)
    expected = math.sqrt(deep / shallow)
    ratio = a.spread / b.spread
    drifts = [DRIFT / scale for scale in (settings.scales[0], settings.scales[-1])]
    finite = 1 / deep + 1 / settings.scales[-1] ** 2  # the mean's own distance from the limit (docs/theory.md)
    checks = {
        "both depths learn x1 x2": max(a.error, b.error) <= settings.tolerance,
        "the kernel becomes less random with depth": expected / 2 <= ratio <= expected * 2,
        "its mean approaches the limit": b.off <= 3 * b.spread / math.sqrt(settings.trials) + finite,
        "it changes less in training": b.drift < a.drift,
        "by as much as predicted": all(p / 2 <= d <= p * 2 for d, p in zip((a.drift, b.drift), drifts, strict=True)),
    }
    failed = [name for name, passed in checks.items() if not passed]
    text = (
        f"The thesis shows (as pictures) that both depths learn the function, that the kernels of {deep:,} layers fall "
        f"on one curve and hardly move in training, and that those of {shallow:,} do neither. Here the learned "
        f"functions are off by at most {number(a.error)} at L = {shallow:,} and {number(b.error)} at L = {deep:,} "
        f"(values go up to 0.5). Over {settings.trials} trials the initial kernel spreads by {100 * a.spread:.3g}% and "
        f"{100 * b.spread:.3g}%, a ratio of {ratio:.3g}; 1/sqrt(L) predicts {expected:.3g}. The mean at L = {deep:,} "
        f"is {100 * b.off:.2g}% off the limit. Training moves the kernel by {number(a.drift)} and {number(b.drift)} of "
        f"itself; {DRIFT} / C_L predicts {number(drifts[0])} and {number(drifts[1])}."
    )
    if failed:
        text += f" Not so: {'; '.join(failed)}."
    return Verdict(not failed, text)


def _draw(settings: ToySettings, result: dict[str, Any]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    angle = result["angle"]
    colours = ("tab:orange", "tab:blue", "tab:green", "tab:red")
    for depth, colour in zip(settings.depths, colours, strict=False):
        for trial, values in enumerate(result["depths"][str(depth)]):
            first = trial == 0
            label = f"trained, L = {depth:,}" if first else None
            left.plot(angle, values["learned"], color=colour, lw=0.8, label=label)
            for moment, style in (("before", "-"), ("after", ":")):
                label = f"L = {depth:,}, {'initial' if moment == 'before' else 'trained'}" if first else None
                right.plot(angle, values[f"kernel_{moment}"], style, color=colour, lw=0.9, label=label)
    left.plot(angle, result["target"], "k--", lw=1.6, label="$x_1 x_2$")
    right.plot(angle, result["limit_kernel"], "k--", lw=1.6, label="limit of infinite depth")
    left.set_ylabel(r"$f(\cos\gamma, \sin\gamma)$")
    right.set_ylabel(r"scaled NTK $\Theta(x_0, x) / (L C_L^2)$")
    left.set_title("(a) learned functions")
    right.set_title(r"(b) kernel from $x_0 = (1/\sqrt{2}, 1/\sqrt{2})$")
    for axes in (left, right):
        axes.set_xlabel(r"angle $\gamma$ (radians)")
        axes.grid(alpha=0.2)
        axes.legend(fontsize=8)
    return figure


FIG_4_1 = Experiment(
    name="fig-4.1",
    title="Deep narrow MLPs learn a function, and their kernel stays put",
    source="Figure 4.1, section 5.1",
    caption=(
        "Independent trials at two depths learn x1 x2 on a quarter of the unit circle by full-batch gradient descent. "
        "With depth the kernel at initialisation becomes less random, approaches its limit, and changes less in "
        "training."
    ),
    laptop=ToySettings(),
    full=ToySettings(),
    run=_run,
    draw=_draw,
    verdict=_verdict,
)
