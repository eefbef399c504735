"""Figure 4.2: 1000 layers train with the thesis's initialisation and not with He's (thesis section 5.2)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from narrowdeep.data import Task, load_task
from narrowdeep.experiments.base import Context, Experiment, Verdict, number
from narrowdeep.experiments.mnist_table import THESIS_BATCH, constant_loss, mnist_config, predicted_config, subset
from narrowdeep.training import DTYPES, DivergedError, TrainConfig, Trainer, steps_per_epoch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ARCHS: tuple[Literal["mlp", "cnn"], ...] = ("mlp", "cnn")


@dataclass(frozen=True)
class InitialisationSettings:
    """``pools`` and ``rhos`` are those of the MLP and the CNN (the thesis names no rho here); ``images`` None: all."""

    pools: tuple[int, int]
    rhos: tuple[float, float]
    images: int | None
    batch_size: int
    epochs: int
    probe: int
    depth: int = 1000
    scale: float = 4.0
    rates: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    trained: float = 0.9
    """A network counts as trained when its loss falls below this share of the best constant's: more than a bias."""


def _train(config: TrainConfig, task: Task, context: Context, label: str) -> dict[str, Any]:
    """Mean training loss of every epoch, up to the one where it overflows."""
    trainer = Trainer(config, task, device=context.device)
    losses: list[float] = []
    diverged = False
    try:
        for _ in context.track(range(config.epochs * trainer.steps_per_epoch), label):
            metrics = trainer.step()
            if metrics is not None:
                losses.append(metrics.train_loss)
    except DivergedError:
        diverged = True
    return {"lr": config.lr, "momentum": config.momentum, "losses": losses, "diverged": diverged}


def _run(settings: InitialisationSettings, context: Context) -> dict[str, Any]:
    def piece(arch: str, label: str, config: TrainConfig, task: Task) -> dict[str, Any]:
        return context.store.piece(f"{arch}-{label}", lambda: _train(config, task, context, f"{arch}, {label}"))

    result: dict[str, Any] = {}
    for arch, pool, rho in zip(ARCHS, settings.pools, settings.rhos, strict=True):
        config = mnist_config(settings, rho, "mnist", arch, pool, context)
        task = load_task("mnist", data=context.data, pool=pool, dtype=DTYPES[config.dtype])
        task = subset(task, images=settings.images, test_images=settings.probe, seed=context.seed)
        ours, _ = predicted_config(config, task, context)
        he = dataclasses.replace(config, init="kaiming", form="plain")
        curves = {"ntk": piece(arch, "ntk", ours, task)}
        for rate in settings.rates:
            curves[f"{rate:g}"] = piece(arch, f"he-{rate:g}", dataclasses.replace(he, lr=rate), task)
        result[arch] = {
            "images": task.x_train.shape[0],
            "steps_per_epoch": steps_per_epoch(config, task),
            "constant_loss": constant_loss(task),
            "curves": curves,
        }
    return result


def _final(curve: dict[str, Any]) -> float:
    return math.inf if curve["diverged"] or not curve["losses"] else float(curve["losses"][-1])


def _verdict(settings: InitialisationSettings, result: dict[str, Any]) -> Verdict:
    sentences, passed = [], True
    for arch in ARCHS:
        found = result[arch]
        goal = settings.trained * found["constant_loss"]
        finals = {name: _final(curve) for name, curve in found["curves"].items()}
        ours = finals.pop("ntk")
        best = min(finals.values())
        diverged = sum(math.isinf(loss) for loss in finals.values())
        passed &= ours < goal <= best
        sentences.append(
            f"{arch.upper()}: the thesis's initialisation goes to a training loss of {number(ours)} "
            f"({'trained' if ours < goal else 'not trained'}); He's to {number(best)} at the best of "
            f"{len(finals)} learning rates, {'below' if best < goal else 'not below'} the {number(goal)} asked for"
            + (f" ({diverged} of them overflow)." if diverged else ".")
        )
    return Verdict(
        passed,
        f"The thesis shows (as a picture) that {settings.depth:,} layers train from its initialisation and from He's "
        f"at no learning rate from {min(settings.rates):g} to {max(settings.rates):g}. {' '.join(sentences)} A network "
        f"counts as trained below {settings.trained:g} times the loss of the best constant output, which a last bias "
        "reaches alone. The thesis's initialisation takes its step size and momentum from the kernel's spectrum.",
    )


def _draw(settings: InitialisationSettings, result: dict[str, Any]) -> Figure:
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    shades = colormaps["viridis"]
    for axes, arch in zip(figure.subplots(1, 2, sharey=True), ARCHS, strict=True):
        found = result[arch]
        for index, rate in enumerate(settings.rates):
            curve = found["curves"][f"{rate:g}"]
            label = f"He, rate {rate:g}" + (" (overflows)" if curve["diverged"] else "")
            colour = shades(index / max(1, len(settings.rates) - 1))
            axes.plot(range(1, len(curve["losses"]) + 1), curve["losses"], color=colour, lw=1.1, label=label)
        ours = found["curves"]["ntk"]
        axes.plot(range(1, len(ours["losses"]) + 1), ours["losses"], color="tab:red", lw=2, label="the thesis's")
        axes.axhline(found["constant_loss"], color="black", ls=":", lw=1, label="best constant output")
        axes.set_title(f"{'(a) MLP' if arch == 'mlp' else '(b) CNN'}, {settings.depth:,} layers")
        axes.set_xlabel(f"epochs of {found['steps_per_epoch']:,} steps")
        axes.grid(alpha=0.2)
        axes.set_yscale("log")
        axes.set_ylim(top=1.0)
        axes.legend(fontsize=8)
        if arch == "mlp":
            axes.set_ylabel(r"training loss  $\frac{1}{2N}\sum_n\|f(x_n)-y_n\|^2$")
    return figure


FIG_4_2 = Experiment(
    name="fig-4.2",
    title="The thesis's initialisation trains at depth 1000, He's does not",
    source="Figure 4.2, section 5.2",
    caption=(
        "Training loss of 1000-layer networks on MNIST: the thesis's initialisation, and He's at six learning rates. "
        "Below the dotted line a network uses its input; above it, at best the bias of its last layer has learned."
    ),
    laptop=InitialisationSettings(pools=(4, 4), rhos=(14.0, 8.0), images=1024, batch_size=64, epochs=16, probe=16),
    full=InitialisationSettings(
        pools=(1, 4), rhos=(1.0, 3**-0.5), images=None, batch_size=THESIS_BATCH, epochs=20, probe=1000
    ),
    run=_run,
    draw=_draw,
    verdict=_verdict,
    needs_mnist=True,
)
