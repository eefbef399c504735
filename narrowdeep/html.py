"""HTML pages that open offline: no script, nothing fetched, pictures inside."""

from __future__ import annotations

from typing import Any

from narrowdeep.extras import optional

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
img { max-width: 100%; box-sizing: border-box; border: 1px solid #ddd; }
table { border-collapse: collapse; } td, th { padding: .25rem .8rem .25rem 0; text-align: left; vertical-align: top; }
.yes { color: #16662a; } .no { color: #a01515; } .small { color: #666; font-size: .85rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; white-space: nowrap; } .wide img { max-width: none; width: 100%; min-width: 38rem; }
.wide th:not(:first-child), td.number { text-align: right; } td.number { font-variant-numeric: tabular-nums; }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
"""


def render(title: str, body: str, **values: Any) -> str:
    """A page whose ``body`` is a jinja2 template of ``values``, which are escaped."""
    with optional():  # loaded when a page is written, which is a run's last act
        from jinja2 import Environment

    return (
        Environment(autoescape=True)
        .from_string(f"{_PAGE}{body}</body>\n</html>\n")
        .render(title=title, style=_STYLE, **values)
    )
