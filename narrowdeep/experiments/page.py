"""One HTML page of all that has been reproduced: opens offline, pictures included, no script."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from narrowdeep import files, html

_BODY = """<h1>The thesis, reproduced</h1>
<p>Lee, <cite>Neural Tangent Kernel Analysis of Deep Narrow Neural Networks</cite> (2023). Each verdict is computed from
the numbers of its run.</p>
<table>
<tr><th>item</th><th>source</th><th>verdict</th><th>seconds</th></tr>
{% for r in records %}
<tr><td><a href="#{{ r.experiment }}">{{ r.title }}</a></td><td>{{ r.source }}</td>
<td class="{{ 'yes' if r.verdict.reproduced else 'no' }}">
{{ 'reproduced' if r.verdict.reproduced else 'not reproduced' }}</td><td>{{ '%.0f' % r.seconds }}</td></tr>
{% endfor %}
</table>
{% for r in records %}
<h2 id="{{ r.experiment }}">{{ r.title }}</h2>
<p class="small">{{ r.source }}</p>
{% if r.picture %}<img src="data:image/png;base64,{{ r.picture }}" alt="{{ r.caption }}">{% else %}
<p class="small">No picture: it needs matplotlib.</p>{% endif %}
<p><strong class="{{ 'yes' if r.verdict.reproduced else 'no' }}">
{{ 'Reproduced' if r.verdict.reproduced else 'Not reproduced' }}.</strong> {{ r.verdict.text }}</p>
<p class="small">narrowdeep reproduce {{ r.experiment }}{{ ' --full' if r.full }} --seed {{ r.seed }}
--dtype {{ r.dtype }} ({{ r.device }}, {{ r.threads }} threads; {{ '%.0f' % r.seconds }} s;
torch {{ r.versions.torch }})<br>
{% for name, value in r.settings.items() %}{{ name }} = {{ value }}{{ '' if loop.last else '; ' }}{% endfor %}</p>
{% endfor %}
"""


def write_page(out: Path, names: Sequence[str]) -> Path:
    """Write ``out/index.html`` from the records and pictures that are there, in the order of ``names``.

    What is no record that this module can show, because something else damaged it, is left out.
    """
    records: list[dict[str, Any]] = []
    for name in names:
        path, picture = out / f"{name}.json", out / f"{name}.png"
        if not path.is_file():
            continue
        with suppress(OSError, ValidationError):
            record = _Record.model_validate_json(path.read_bytes()).model_dump()
            encoded = base64.b64encode(picture.read_bytes()).decode() if picture.is_file() else None
            records.append(record | {"picture": encoded})
    page = out / "index.html"
    files.write(page, html.render("narrowdeep: the thesis, reproduced", _BODY, records=records))
    return page


class _Verdict(BaseModel):
    reproduced: bool
    text: str


class _Versions(BaseModel):
    torch: str


class _Record(BaseModel):
    """What the page shows of a record."""

    experiment: str
    title: str
    source: str
    caption: str
    full: bool
    seed: int
    dtype: str
    device: str
    threads: int
    seconds: float
    versions: _Versions
    verdict: _Verdict
    settings: dict[str, Any]
