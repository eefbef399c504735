"""Figures 3.1 and 3.2: the initialisation, drawn from a real network (thesis sections 3.1 and 4.0.1)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from narrowdeep.experiments.base import Context, Experiment, Verdict, number
from narrowdeep.modules import DeepNarrowCNN, DeepNarrowMLP

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ZERO, ONE, SCALE, MINUS_SCALE, GAUSSIAN = "0", "1", "C_L", "-C_L", "Gaussian"


@dataclass(frozen=True)
class DiagramSettings:
    inputs: int
    outputs: int
    image: int
    """Side of the image; 0 for the MLP."""
    depth: int = 5
    scale: float = 4.0


def kind_of(weight: Tensor, scale: float) -> str:
    """What one entry of a weight or bias, or one filter (f, f), is: 0, 1, C_L, -C_L (centre tap) or Gaussian."""
    flat = weight.flatten()
    centre = flat[len(flat) // 2].item()
    if int(flat.count_nonzero()) == (centre != 0):
        for kind, value in ((ZERO, 0.0), (ONE, 1.0), (SCALE, scale), (MINUS_SCALE, -scale)):
            if centre == value:
                return kind
    return GAUSSIAN


def expected_kinds(settings: DiagramSettings) -> list[dict[str, Any]]:
    """The kinds of all weights and biases, written down from the definition in the thesis and not from our code."""
    d, k = settings.inputs, settings.outputs
    n = d + 1 + k
    layers = []
    for layer in range(1, settings.depth + 1):
        columns, rows = (d if layer == 1 else n), (k if layer == settings.depth else n)
        weight = [[ZERO] * columns for _ in range(rows)]
        bias = [ZERO] * rows
        if layer == settings.depth:
            for i in range(k):
                weight[i][d + 1 + i], bias[i] = ONE, MINUS_SCALE
        else:
            for i in range(d):
                weight[i][i] = SCALE if layer == 1 else ONE
                weight[d][i] = GAUSSIAN
            bias[d] = GAUSSIAN
            for i in range(d + 1, n):
                if layer == 1:
                    bias[i] = SCALE
                else:
                    weight[i][i] = ONE
        layers.append({"weight": weight, "bias": bias})
    return layers


def _run(settings: DiagramSettings, context: Context) -> dict[str, Any]:
    make = DeepNarrowCNN if settings.image else DeepNarrowMLP
    model = make(settings.inputs, settings.outputs, settings.depth, scale=settings.scale, dtype=torch.float64)
    model.reset_parameters(context.generator(0))
    shape = (settings.inputs, settings.image, settings.image) if settings.image else (settings.inputs,)
    x = torch.randn(64, *shape, generator=context.generator(1), dtype=torch.float64)
    with torch.no_grad():
        output = model(x).abs().max().item()
    layers = [
        {
            "weight": [[kind_of(entry, settings.scale) for entry in row] for row in weight],
            "bias": [kind_of(entry, settings.scale) for entry in bias],
        }
        for weight, bias in model.layers()
    ]
    return {"layers": layers, "largest_output": output}


def _verdict(settings: DiagramSettings, result: dict[str, Any]) -> Verdict:
    same = result["layers"] == expected_kinds(settings)
    reproduced = same and result["largest_output"] == 0.0
    counts = Counter(kind for layer in result["layers"] for row in layer["weight"] for kind in row)
    what = "filters" if settings.image else "weights"
    parts = ", ".join(f"{counts[kind]} are {kind}" for kind in (ONE, SCALE, GAUSSIAN, ZERO))
    output = "exactly 0" if result["largest_output"] == 0 else f"up to {number(result['largest_output'])}"
    text = (
        f"Of the {sum(counts.values())} {what} of a network of {settings.depth} layers, {parts}. Their places and "
        f"those of the biases {'are' if same else 'are not'} the ones that the thesis defines, and the output on 64 "
        f"random inputs is {output} at initialisation."
    )
    return Verdict(reproduced, text)


_LINES: dict[str, dict[str, Any]] = {
    ONE: {"ls": "-", "lw": 1.1},
    GAUSSIAN: {"ls": (0, (4, 3)), "lw": 0.9},
}


def _line(axes: Axes, start: tuple[float, float], end: tuple[float, float], kind: str) -> None:
    x, y = zip(start, end, strict=True)
    if kind == SCALE:  # a double line: a broad one with a white one on top
        axes.plot(x, y, "-", color="black", lw=3.4, zorder=1)
        axes.plot(x, y, "-", color="white", lw=1.6, zorder=1.1)
    elif kind != ZERO:
        axes.plot(x, y, color="black", zorder=1, **_LINES[kind])


def _box(axes: Axes, centre: tuple[float, float], side: float, bias: str | None, cells: int) -> None:
    """A unit (or a channel with its cells) whose border says what its bias is; None for the input, which has none."""
    from matplotlib.patches import Rectangle

    x, y = centre[0] - side / 2, centre[1] - side / 2
    style: Any = (0, (4, 2.5)) if bias in (GAUSSIAN, MINUS_SCALE) else "-"
    colour = "lightgrey" if bias is None else "black"
    axes.add_patch(Rectangle((x, y), side, side, fc="white", ec=colour, ls=style, lw=1.2, zorder=2))
    if bias in (SCALE, MINUS_SCALE):
        gap = 0.14 * side
        inner = side - 2 * gap
        axes.add_patch(Rectangle((x + gap, y + gap), inner, inner, fc="none", ec="black", ls=style, lw=1.2, zorder=3))
    for i in range(1, cells):
        at = side * i / cells
        axes.plot([x + at, x + at], [y, y + side], color="grey", lw=0.4, zorder=2.5)
        axes.plot([x, x + side], [y + at, y + at], color="grey", lw=0.4, zorder=2.5)


def _draw(settings: DiagramSettings, result: dict[str, Any]) -> Figure:
    from matplotlib.figure import Figure

    layers = result["layers"]
    width = settings.inputs + 1 + settings.outputs
    rows = [settings.inputs, *(len(layer["bias"]) for layer in layers)]
    side, height = (0.62, 1.25) if settings.image else (0.3, 1.0)
    left, right, bottom = -1.6, width + 2.3, -0.6
    top = len(layers) * height + (1.5 if settings.image else 0.6)
    figure = Figure(figsize=(8.0, 8.0 * (top - bottom) / (right - left) + 0.5), layout="constrained")
    axes = figure.subplots()

    def place(row: int, unit: int) -> tuple[float, float]:
        # Inputs stand on the left, above which their units are carried on; outputs on the right.
        shift = width - rows[row] if row == len(layers) else 0
        return float(unit + shift), row * height

    for row, layer in enumerate(layers, 1):
        for to, kinds in enumerate(layer["weight"]):
            for unit, kind in enumerate(kinds):
                _line(axes, place(row - 1, unit), place(row, to), kind)
        for unit, kind in enumerate(layer["bias"]):
            _box(axes, place(row, unit), side, kind, settings.image)
        axes.text(-0.75, row * height, f"layer {row}", ha="right", va="center", fontsize=9)
    for unit in range(settings.inputs):
        _box(axes, place(0, unit), side, None, settings.image)
    axes.text(-0.75, 0.0, "input", ha="right", va="center", fontsize=9)
    if settings.image:
        x, y = place(len(layers), 0)
        axes.annotate("", (x, y + 0.92), (x, y + side / 2), arrowprops={"arrowstyle": "->"})
        axes.text(x + 0.1, y + 0.72, "mean over the image", va="center", fontsize=8)
        _box(axes, (x, y + 1.05), 0.24, ZERO, 1)
        axes.text(-0.75, y + 1.05, "output", ha="right", va="center", fontsize=9)
    _legend(axes, "filter" if settings.image else "weight", width + 0.3, len(layers) * height, side=0.24)
    axes.set_aspect("equal")
    axes.set_axis_off()
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    return figure


def _legend(axes: Axes, what: str, x: float, top: float, *, side: float) -> None:
    axes.text(x, top, f"{what}s", fontsize=9, weight="bold", va="center")
    for i, kind in enumerate((ONE, SCALE, GAUSSIAN, ZERO), 1):
        y = top - 0.36 * i
        _line(axes, (x, y), (x + 0.5, y), kind)
        axes.text(x + 0.65, y, "0 (no line)" if kind == ZERO else _symbol(kind), fontsize=9, va="center")
    top -= 0.36 * 6
    axes.text(x, top, "biases", fontsize=9, weight="bold", va="center")
    for i, kind in enumerate((ZERO, SCALE, GAUSSIAN, MINUS_SCALE), 1):
        y = top - 0.36 * i
        _box(axes, (x + 0.2, y), side, kind, 1)
        axes.text(x + 0.65, y, _symbol(kind), fontsize=9, va="center")


def _symbol(kind: str) -> str:
    return {SCALE: "$C_L$", MINUS_SCALE: "$-C_L$"}.get(kind, kind)


_MLP = DiagramSettings(inputs=3, outputs=2, image=0)
_CNN = DiagramSettings(inputs=1, outputs=1, image=4)

FIG_3_1 = Experiment(
    name="fig-3.1",
    title="Initialisation of the deep narrow MLP",
    source="Figure 3.1, section 3.1",
    caption=(
        "Drawn from the parameters of a network with 3 inputs and 2 outputs, input at the bottom: lines are weights, "
        "boxes are units and their borders biases."
    ),
    laptop=_MLP,
    full=_MLP,
    run=_run,
    draw=_draw,
    verdict=_verdict,
)
FIG_3_2 = Experiment(
    name="fig-3.2",
    title="Initialisation of the deep narrow CNN",
    source="Figure 3.2, section 4.0.1",
    caption=(
        "Drawn from the parameters of a network on 4x4 images, input at the bottom: grids are channels, lines are 3x3 "
        "filters (a number stands for that number at the centre and 0 around it), borders are biases."
    ),
    laptop=_CNN,
    full=_CNN,
    run=_run,
    draw=_draw,
    verdict=_verdict,
)
