"""``narrowdeep report``: runs side by side, on one HTML page that opens offline."""

from __future__ import annotations

import base64
import dataclasses
import io
from pathlib import Path
from typing import Annotated, Any

import typer

from narrowdeep import files, html, training
from narrowdeep.commands.options import JsonOption, has_matplotlib, one_line_errors, print_json
from narrowdeep.training import EpochMetrics, TrainConfig

_BODY = """<h1>{{ runs|length }} runs</h1>
{% if picture %}<img src="data:image/png;base64,{{ picture }}" alt="Losses and accuracies by epoch">
{% else %}<p class="small">No picture: it needs matplotlib, and a finished epoch.</p>{% endif %}
<div class="wide"><table>
<tr><th>run</th>{% for name in differing %}<th>{{ name }}</th>{% endfor %}{% for name in results %}<th>{{ name }}</th>
{% endfor %}</tr>
{% for run in runs %}<tr><td>{{ run.name }}</td>{% for name in differing %}<td>{{ run.config[name] }}</td>{% endfor %}
{% for name in results %}<td class="number">{{ run.results[name] }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
<h2>Settings that all have</h2>
<p>{% for name, value in common.items() %}{{ name }} = {{ value }}{{ '' if loop.last else '; ' }}{% endfor %}</p>
"""


@dataclasses.dataclass(frozen=True)
class Run:
    name: str
    config: TrainConfig
    metrics: list[EpochMetrics]

    @property
    def results(self) -> dict[str, str]:
        """What the table says of the last epoch; a dash where there is none."""
        last = self.metrics[-1] if self.metrics else None
        accuracy = None if last is None else last.test_accuracy
        best = max((m.test_accuracy for m in self.metrics if m.test_accuracy is not None), default=None)
        return {
            "epoch": f"{0 if last is None else last.epoch} of {self.config.epochs}",
            "train loss": "-" if last is None else f"{last.train_loss:.4g}",
            "test loss": "-" if last is None else f"{last.test_loss:.4g}",
            "accuracy": "-" if accuracy is None else f"{accuracy:.2%}",
            "best": "-" if best is None else f"{best:.2%}",
            "seconds": f"{sum(m.seconds for m in self.metrics):.1f}",
        }


def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders of runs of narrowdeep train.")],
    out: Annotated[Path, typer.Option("--out", help="The page.")] = Path("report.html"),
    json: JsonOption = False,
) -> None:
    """Write one HTML page that compares runs: their curves, their last epochs, and the settings that differ."""
    with one_line_errors():
        runs = [_read(folder) for folder in folders]
        drawn = any(run.metrics for run in runs) and has_matplotlib("the picture")
        page = _page(runs, _draw(runs) if drawn else None)
        files.write(out, page)
    if json:
        print_json(
            {
                "page": str(out),
                "runs": [
                    {
                        "folder": run.name,
                        "config": dataclasses.asdict(run.config),
                        "metrics": dataclasses.asdict(run.metrics[-1]) if run.metrics else None,
                    }
                    for run in runs
                ],
            }
        )
        return
    typer.echo(f"page: {out}")


def _read(folder: Path) -> Run:
    return Run(str(folder), training.read_config(folder / training.CHECKPOINT), training.read_metrics(folder))


def _page(runs: list[Run], picture: str | None) -> str:
    configs = [{name: _text(value) for name, value in dataclasses.asdict(run.config).items()} for run in runs]
    differing = [name for name, value in configs[0].items() if any(c[name] != value for c in configs)]
    common = {name: value for name, value in configs[0].items() if name not in differing}
    rows = [{"name": r.name, "config": c, "results": r.results} for r, c in zip(runs, configs, strict=True)]
    return html.render(
        f"narrowdeep: {len(runs)} runs",
        _BODY,
        runs=rows,
        picture=picture,
        differing=differing,
        common=common,
        results=list(runs[0].results),
    )


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else "-" if value is None else str(value)


def _draw(runs: list[Run]) -> str:
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
            style["linestyle"] = ("-", "--", ":")[i % 3]  # runs that agree are seen behind each other
            axes.plot([x for x, _ in points], [y for _, y in points], color=f"C{i % 10}", label=run.name, **style)
        axes.set_title(field.replace("_", " "))
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if field == "test_accuracy":
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        else:
            axes.set_yscale("log")
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=min(3, len(runs)))
    content = io.BytesIO()
    figure.savefig(content, dpi=120, format="png")
    return base64.b64encode(content.getvalue()).decode()
