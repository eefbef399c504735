"""Figure 5.1: the output of a trained network builds up over all of its layers (thesis section 6)."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from narrowdeep.experiments.base import Context, Experiment, Verdict, number
from narrowdeep.experiments.toy import trained_toy
from narrowdeep.modules import DeepNarrowMLP

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class AccumulationSettings:
    depth: int = 10000
    scale: float = 50000.0
    steps: int = 2000
    tau: float = 0.5
    samples: int = 200
    angles: tuple[float, ...] = (0.05, 0.15, 0.3, 0.5, 0.75)
    """Of the inputs, in quarters of a turn."""
    tolerance: float = 0.05
    largest_share: float = 0.01
    """Of the largest final value, that one layer may add for the accumulation to be one over the layers."""


@torch.no_grad()
def accumulated(model: DeepNarrowMLP, x: Tensor) -> Tensor:
    """The right units after every layer without their offset C_L, and the output last: (L, N, out) float64.

    In float64 the offset form's parameters give W = E + Delta without loss that matters, and h - C_L is exact to 1e-11.
    """
    model = copy.deepcopy(model).double()
    *layers, (weight, bias) = model.layers()
    outputs, h, values = weight.shape[0], x.double(), []
    for w, b in layers:
        h = torch.relu(h @ w.T + b)
        values.append(h[:, -outputs:] - model.scale)
    values.append(h @ weight.T + bias)
    return torch.stack(values)


def _run(settings: AccumulationSettings, context: Context) -> dict[str, Any]:
    return context.store.piece("accumulation", lambda: _accumulation(settings, context))


def _accumulation(settings: AccumulationSettings, context: Context) -> dict[str, Any]:
    _, model = trained_toy(
        settings.depth,
        settings.scale,
        0,
        samples=settings.samples,
        steps=settings.steps,
        tau=settings.tau,
        context=context,
    )
    angle = torch.tensor(settings.angles, dtype=torch.float64) * (math.pi / 2)
    x = torch.stack((angle.cos(), angle.sin()), 1).to(context.device, context.dtype)
    values = accumulated(model, x)[:, :, 0].cpu()
    shown = sorted({*np.unique(np.linspace(0, settings.depth - 1, 201).round().astype(int)).tolist()})
    added = values.diff(dim=0).abs().max(0).values
    return {
        "angle": angle.tolist(),
        "target": (angle.cos() * angle.sin()).tolist(),
        "layer": [index + 1 for index in shown],
        "value": values[shown].T.tolist(),
        "final": values[-1].tolist(),
        "largest_added_by_a_layer": added.tolist(),
    }


def _straightness(result: dict[str, Any]) -> float:
    """Largest distance of a curve from the straight line to its end, over that end."""
    layer = np.array(result["layer"]) / result["layer"][-1]
    return max(float(np.abs(np.array(v) - layer * v[-1]).max() / abs(v[-1])) for v in result["value"])


def _verdict(settings: AccumulationSettings, result: dict[str, Any]) -> Verdict:
    final, target = np.array(result["final"]), np.array(result["target"])
    error = float(np.abs(final - target).max())
    share = float(np.max(result["largest_added_by_a_layer"]) / np.abs(final).max())
    straight = _straightness(result)
    reproduced = error <= settings.tolerance and share <= settings.largest_share
    text = (
        f"The thesis shows (as a picture) that the target value is reached by the accumulated effect of 10,000 layers. "
        f"Here no layer of {settings.depth:,} adds more than {100 * share:.2g}% of the largest output (an equal share "
        f"is {100 / settings.depth:.2g}%), the curves are within {100 * straight:.2g}% of a straight line to their "
        f"end, and the outputs are off the true function by at most {number(error)}."
    )
    return Verdict(reproduced, text if reproduced else f"{text} That is not an accumulation over all layers.")


def _draw(settings: AccumulationSettings, result: dict[str, Any]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    for angle, values, target in zip(result["angle"], result["value"], result["target"], strict=True):
        (line,) = axes.plot(result["layer"], values, label=rf"$\gamma$ = {angle:.2f}")
        axes.plot(result["layer"][-1], target, "o", color=line.get_color(), mfc="none")
    axes.plot([], [], "o", color="grey", mfc="none", label="$x_1 x_2$")
    axes.set_xlabel("layer")
    axes.set_ylabel("right-most unit, less $C_L$")
    axes.grid(alpha=0.2)
    axes.legend(title="angle of the input (radians)", ncols=2, fontsize=8)
    return figure


FIG_5_1 = Experiment(
    name="fig-5.1",
    title="The output accumulates over the layers",
    source="Figure 5.1, section 6",
    caption=(
        "Right-most unit of every layer of a trained network of 10,000 layers, without its offset C_L, for inputs at "
        "some angles. Circles: the target."
    ),
    laptop=AccumulationSettings(),
    full=AccumulationSettings(),
    run=_run,
    draw=_draw,
    verdict=_verdict,
)
