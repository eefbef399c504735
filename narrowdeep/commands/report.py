"""``narrowdeep report``: runs side by side, on one HTML page that opens offline."""

from __future__ import annotations

import base64
import dataclasses
import io
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from narrowdeep import files, html, training
from narrowdeep.commands.kernels import RunKernels, run_kernels
from narrowdeep.commands.options import JsonOption, has_matplotlib, memory_errors, one_line_errors, option, print_json
from narrowdeep.commands.progress import progress
from narrowdeep.training import EpochMetrics, TrainConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BODY = """{% macro table(rows, columns) %}<div class="wide"><table>
<tr><th>run</th>{% for name in columns %}<th>{{ name }}</th>{% endfor %}</tr>
{% for name, values in rows %}<tr><td>{{ name }}</td>
{% for column in columns %}<td class="number">{{ values[column] }}</td>{% endfor %}</tr>
{% endfor %}</table></div>{% endmacro %}
{% macro picture(data, text) %}<div class="wide"><img src="data:image/png;base64,{{ data }}" alt="{{ text }}"></div>
{% endmacro %}
<h1>{{ results|length }} runs</h1>
{% if curves %}{{ picture(curves, "Losses and accuracies by epoch") }}
{% else %}<p class="small">No picture: it needs matplotlib, and a finished epoch.</p>{% endif %}
{{ table(results, results[0][1]) }}
<h2>Settings</h2>
{% if differing %}{{ table(configs, differing) }}{% endif %}
<p>All: {% for name, value in common.items() %}{{ name }} = {{ value }}{{ '' if loop.last else '; ' }}{% endfor %}
</p>
{% if kernels %}<h2>Tangent kernels</h2>
<p>Of each run's network, on the same {{ samples }} training samples: scaled, averaged over outputs, eigenvalues over
the number of samples. After kernel time t, descent has learned what belongs to eigenvalues above 1/t. The predicted
loss is that of these samples after the run's steps, had the kernel stayed as it was drawn and every step seen all
samples.</p>
{% if spectra %}{{ picture(spectra, "Eigenvalues of the runs' tangent kernels") }}
<p class="small">Lines: now. Wide bands: as it was drawn. Dotted levels: 1/t.</p>{% endif %}
{{ table(kernels, kernels[0][1]) }}{% endif %}
"""


@dataclasses.dataclass(frozen=True)
class Run:
    name: str
    config: TrainConfig
    metrics: list[EpochMetrics]
    kernels: RunKernels | None

    @property
    def results(self) -> dict[str, str]:
        """What the table says of the last epoch; a dash where there is none."""
        last = self.metrics[-1] if self.metrics else None
        accuracy = None if last is None else last.test_accuracy
        best = max((m.test_accuracy for m in self.metrics if m.test_accuracy is not None), default=None)
        return {
            "epoch": f"{0 if last is None else last.epoch} of {self.config.epochs}",
            "train loss": _short(None if last is None else last.train_loss),
            "test loss": _short(None if last is None else last.test_loss),
            "accuracy": "-" if accuracy is None else f"{accuracy:.2%}",
            "best": "-" if best is None else f"{best:.2%}",
            "seconds": f"{sum(m.seconds for m in self.metrics):.1f}",
        }


def _kernel_results(found: RunKernels) -> dict[str, str]:
    largest, moved = _short(found.before[0]), f"{100 * found.moved:.2g}%"
    learned = "-" if found.time is None else f"{(found.before * found.time > 1).sum()} of {len(found.before)}"
    return {
        "largest eigenvalue": largest,
        "moved in training": moved,
        "kernel time": _short(found.time),
        "above 1/t": learned,
        "predicted loss": _short(found.predicted),
        "loss": _short(found.loss),
    }


def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders of runs of narrowdeep train.")],
    out: Annotated[Path, typer.Option("--out", help="The page.")] = Path("report.html"),
    kernels: Annotated[bool, typer.Option(help="Compute the tangent kernels of the runs.")] = True,
    data: Annotated[Path | None, option("data")] = None,
    json: JsonOption = False,
) -> None:
    """Write one HTML page that compares runs: their curves, their last epochs, the settings that differ, and their
    tangent kernels before and after training."""
    with one_line_errors():
        runs = [_read(folder) for folder in folders]
        files.require_writable(out)
    if kernels:
        with progress() as bar, memory_errors():
            line = bar.add_task("kernels", total=len(runs))
            for i, run in enumerate(runs):
                runs[i] = dataclasses.replace(run, kernels=_kernels(run.name, data))
                bar.advance(line)
    with one_line_errors():
        drawn = any(run.metrics or run.kernels for run in runs) and has_matplotlib("the picture")
        files.write(out, _page(runs, drawn=drawn))
    if json:
        print_json(
            {
                "page": str(out),
                "runs": [
                    {
                        "folder": run.name,
                        "config": dataclasses.asdict(run.config),
                        "metrics": dataclasses.asdict(run.metrics[-1]) if run.metrics else None,
                        "kernels": run.kernels and run.kernels.to_dict(),
                    }
                    for run in runs
                ],
            }
        )
        return
    typer.echo(f"page: {out}")


def _read(folder: Path) -> Run:
    return Run(str(folder), training.read_config(folder / training.CHECKPOINT), training.read_metrics(folder), None)


def _kernels(folder: str, data: Path | None) -> RunKernels | None:
    """None, and a line on standard error, where they cannot be computed: the page is made all the same."""
    try:
        return run_kernels(Path(folder), data)
    except (OSError, ValueError) as error:
        typer.echo(f"the kernels of {folder} are left out: {error}", err=True)
        return None


def _page(runs: list[Run], *, drawn: bool) -> str:
    configs = [{name: _text(value) for name, value in dataclasses.asdict(run.config).items()} for run in runs]
    differing = [name for name, value in configs[0].items() if any(c[name] != value for c in configs)]
    common = {name: value for name, value in configs[0].items() if name not in differing and value != "-"}
    known = [(run.name, _kernel_results(run.kernels)) for run in runs if run.kernels is not None]
    return html.render(
        f"narrowdeep: {len(runs)} runs",
        _BODY,
        results=[(run.name, run.results) for run in runs],
        curves=_draw_curves(runs) if drawn and any(run.metrics for run in runs) else None,
        configs=[(run.name, config) for run, config in zip(runs, configs, strict=True)],
        differing=differing,
        common=common,
        kernels=known,
        spectra=_draw_spectra(runs) if drawn and known else None,
        samples=max((len(run.kernels.now) for run in runs if run.kernels is not None), default=0),
    )


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else "-" if value is None else str(value)


def _style(i: int) -> dict[str, Any]:
    """Of run ``i``: runs that agree are seen behind each other."""
    return {"color": f"C{i % 10}", "linestyle": ("-", "--", ":", "-.")[i % 4]}


def _png(figure: Figure, runs: list[Run]) -> str:
    """In base64, with a legend of the runs that the first axes show."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=min(3, len(runs)))
    content = io.BytesIO()
    figure.savefig(content, dpi=120, format="png")
    return base64.b64encode(content.getvalue()).decode()


def _draw_spectra(runs: list[Run]) -> str:
    """Eigenvalues of the runs' kernels, and where descent has reached."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for i, run in enumerate(runs):
        if run.kernels is None:
            continue
        number = range(1, len(run.kernels.now) + 1)
        axes.plot(number, run.kernels.now, label=run.name, **_style(i))
        axes.plot(number, run.kernels.before, color=f"C{i % 10}", alpha=0.25, linewidth=5)
        if run.kernels.time is not None:
            axes.axhline(1 / run.kernels.time, color=f"C{i % 10}", linewidth=1, linestyle=(0, (1, 3)))
    largest = max(run.kernels.now[0] for run in runs if run.kernels is not None)
    axes.set(xscale="log", yscale="log", xlabel="number", ylabel="eigenvalue / samples", title="tangent kernel")
    axes.set_ylim(bottom=1e-7 * largest)  # below it is the rounding of float32
    axes.grid(alpha=0.3)
    return _png(figure, runs)


def _draw_curves(runs: list[Run]) -> str:
    """Training loss, test loss and accuracy of all runs against the epoch: a PNG, in base64."""
    from matplotlib.figure import Figure  # no pyplot: no global state, no display
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    fields = ["train_loss", "test_loss"]
    if any(m.test_accuracy is not None for run in runs for m in run.metrics):
        fields.append("test_accuracy")
    figure = Figure(figsize=(4.2 * len(fields), 4.2), layout="constrained")
    all_axes = figure.subplots(1, len(fields), squeeze=False)[0]
    for axes, field in zip(all_axes, fields, strict=True):
        for i, run in enumerate(runs):
            points = [(m.epoch, getattr(m, field)) for m in run.metrics if getattr(m, field) is not None]
            style: dict[str, Any] = {"marker": "o", "markersize": 3} if len(points) <= 60 else {}
            axes.plot([x for x, _ in points], [y for _, y in points], label=run.name, **_style(i), **style)
        axes.set_title(field.replace("_", " "))
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if field == "test_accuracy":
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        else:
            axes.set_yscale("log")
    return _png(figure, runs)
