"""Theorems 3.1 to 3.3 (MLP) and 4.1 to 4.3 (CNN) as errors against depth, with the slopes that theory predicts."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from narrowdeep import ntk
from narrowdeep.data import load_task
from narrowdeep.experiments.base import Context, Experiment, Verdict, number, rms, slope
from narrowdeep.experiments.toy import descend
from narrowdeep.modules import DeepNarrowCNN, DeepNarrowMLP
from narrowdeep.ntk import (
    empirical_ntk,
    kernel_drift,
    limit_ntk_cnn,
    limit_ntk_mlp,
    zero_crossings,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class TheoremSettings:
    """C_L = L throughout, so that what falls as 1/C_L falls as 1/L."""

    depths: tuple[int, ...] = (30, 100, 300, 1000, 3000)
    trials: int = 10
    steps: int = 100
    samples: int = 20
    image: int = 4
    tolerance: float = 0.2
    """How much less steep than predicted a fitted slope may be."""


@dataclass(frozen=True)
class Claim:
    """A theorem's quantity: how it is called, and the power of L that it is predicted to follow."""

    theorems: tuple[str, str]
    label: str
    power: float


CLAIMS = {
    "kernel": Claim(("3.1", "4.1"), "initial kernel to its limit", -0.5),
    "drift": Claim(("3.2", "4.2"), "change of the kernel in training", -1.0),
    "limit_flow": Claim(("3.3", "4.3"), "trained network to descent with the limit kernel", -0.5),
    "own_flow": Claim(("3.3", "4.3"), "trained network to descent with its initial kernel", -1.0),
}
KINDS = {"mlp": "MLP", "cnn": "CNN"}


def _data(kind: str, settings: TheoremSettings, context: Context) -> tuple[Tensor, Tensor, Tensor]:
    """(x, y, x_test) in float64: the arc for the MLP; random images for the CNN, whose target is their contrast."""
    if kind == "mlp":
        task = load_task("toy", samples=settings.samples, dtype=torch.float64)
        return task.x_train, task.y_train, task.x_test
    shape = (2 * settings.samples, 1, settings.image, settings.image)
    images = torch.rand(shape, generator=context.generator(0), dtype=torch.float64)
    x, x_test = images.chunk(2)
    return x, x.flatten(1).std(1, keepdim=True), x_test


def _trial(kind: str, depth: int, trial: int, settings: TheoremSettings, context: Context) -> dict[str, float]:
    x, y, x_test = _data(kind, settings, context)
    kernel = limit_ntk_mlp if kind == "mlp" else limit_ntk_cnn
    limit, limit_test = kernel(x), kernel(x_test, x)
    tau = 0.5 * ntk.max_learning_rate(limit)

    def descent(k: Tensor, k_test: Tensor) -> Tensor:
        fitted = ntk.NTKRegressor("precomputed").fit(k.cpu().numpy(), y.numpy())
        return torch.as_tensor(fitted.predict(k_test.cpu().numpy(), n_steps=settings.steps, tau=tau))

    model = (
        DeepNarrowMLP(2, 1, depth, dtype=context.dtype)
        if kind == "mlp"
        else DeepNarrowCNN(1, 1, depth, dtype=context.dtype)
    )
    model.reset_parameters(context.generator(1, depth, trial, len(kind), ord(kind[0])))
    model = model.to(context.device)
    initial = copy.deepcopy(model)
    x_in, y_in, x_test_in = (v.to(context.device, context.dtype) for v in (x, y, x_test))
    label = f"{KINDS[kind]}, L = {depth}, trial {trial + 1}"
    descend(model, x_in, y_in, steps=settings.steps, tau=tau, context=context, label=label)
    own, own_test = (empirical_ntk(initial, a, b, reduce="trace").cpu() for a, b in ((x_in, None), (x_test_in, x_in)))
    with torch.no_grad():
        learned = model(x_test_in).double().cpu()
    size = learned.abs().max()
    return {
        "kernel": ((own - limit).norm() / limit.norm()).item(),
        "drift": kernel_drift(initial, model, x_in),
        "limit_flow": ((learned - descent(limit, limit_test)).abs().max() / size).item(),
        "own_flow": ((learned - descent(own, own_test)).abs().max() / size).item(),
        "crossings": zero_crossings(initial, model, x_in).sum().item() / (depth - 1) / x.shape[0],
    }


def _run(settings: TheoremSettings, context: Context) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for kind in KINDS:
        result[kind] = {}
        for depth in context.track(settings.depths, KINDS[kind]):
            result[kind][str(depth)] = [
                context.store.piece(
                    f"{kind}-{depth}-trial-{trial}",
                    lambda k=kind, d=depth, t=trial: _trial(k, d, t, settings, context),  # type: ignore[misc]
                )
                for trial in range(settings.trials)
            ]
    return result


def _errors(settings: TheoremSettings, result: dict[str, Any], kind: str, name: str) -> list[float]:
    """Root mean square over trials, a value a depth."""
    return [rms([trial[name] for trial in result[kind][str(depth)]]) for depth in settings.depths]


def _verdict(settings: TheoremSettings, result: dict[str, Any]) -> Verdict:
    lines, failed = [], []
    for number_of_kind, (kind, title) in enumerate(KINDS.items()):
        for name, claim in CLAIMS.items():
            errors = _errors(settings, result, kind, name)
            fitted = slope(settings.depths, errors)
            theorem = f"Theorem {claim.theorems[number_of_kind]}, {title}: {claim.label}"
            ends = f"{number(errors[0])} to {number(errors[-1])}"
            lines.append(f"{theorem}, {ends}, slope {fitted:.2f} ({claim.power:g})")
            if fitted > claim.power + settings.tolerance:  # to fall faster is no fault
                failed.append(theorem)
        crossings = _errors(settings, result, kind, "crossings")
        lines.append(
            f"{title}: ReLUs that training switched, a layer and sample, {number(crossings[0])} to "
            f"{number(crossings[-1])}"
        )
        if crossings[-1] > crossings[0] or (crossings[0] > 0 and crossings[-1] == crossings[0]):
            failed.append(f"Theorem {CLAIMS['drift'].theorems[number_of_kind]}, {title}: fewer switches with depth")
    text = (
        f"The theorems are limits; each error below falls from L = {settings.depths[0]} to {settings.depths[-1]:,} "
        "(relative errors, root mean square over trials; predicted slope in brackets). " + "; ".join(lines) + "."
    )
    if failed:
        text += f" Not as predicted: {'; '.join(failed)}."
    return Verdict(not failed, text)


def _draw(settings: TheoremSettings, result: dict[str, Any]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 5.2), layout="constrained")
    for column, (axes, (kind, title)) in enumerate(zip(figure.subplots(1, 2, sharey=True), KINDS.items(), strict=True)):
        for name, claim in CLAIMS.items():
            errors = _errors(settings, result, kind, name)
            fitted = slope(settings.depths, errors)
            label = f"{claim.theorems[column]}: {claim.label} ({fitted:.2f})"
            (line,) = axes.loglog(settings.depths, errors, "o-", label=label)
            predicted = [errors[0] * (depth / settings.depths[0]) ** claim.power for depth in settings.depths]
            axes.loglog(settings.depths, predicted, "--", color=line.get_color(), lw=0.8)
        axes.set_title(title)
        axes.set_xlabel("depth L (affine layers)")
        axes.grid(which="both", alpha=0.15)
        axes.set_ylim(1e-9, 1.0)
        axes.legend(loc="lower left", title="theorem: relative error of (fitted slope)", fontsize=7.5, title_fontsize=8)
        if column == 0:
            axes.set_ylabel("relative error, root mean square over trials")
    return figure


THEOREMS = Experiment(
    name="theorems",
    title="The six theorems, as errors against depth",
    source="Theorems 3.1-3.3 and 4.1-4.3",
    caption=(
        "Points: measured at C_L = L. Dashed: the slope that theory predicts, from the first point. Descent with a "
        "kernel is what the network would learn in the same steps if its kernel were constant."
    ),
    laptop=TheoremSettings(),
    full=TheoremSettings(depths=(30, 100, 300, 1000, 3000, 10000), trials=20, steps=500),
    run=_run,
    draw=_draw,
    verdict=_verdict,
)
