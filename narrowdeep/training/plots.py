"""Curves of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from narrowdeep import files
from narrowdeep.training.config import EpochMetrics


def plot_metrics(
    metrics: list[EpochMetrics], path: str | Path, *, title: str = "", predicted: float | None = None
) -> None:
    """Loss and (for a task with classes) accuracy against epochs, as a PNG; needs matplotlib.

    ``predicted`` is a training loss to mark: the one that the kernel predicts for the end.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from narrowdeep.training import EpochMetrics, plot_metrics
        >>> lines = [EpochMetrics(n, 10 * n, 1 / n, None, 2 / n, None, 1.0, 2000.0) for n in (1, 2, 3)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_metrics(lines, f"{folder}/curves.png", title="a run")
        ...     print(Path(f"{folder}/curves.png").stat().st_size > 0)
        True
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
    with files.replacing(path) as file:
        figure.savefig(file, dpi=150, format="png")
