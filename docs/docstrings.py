"""For the docs site: "Returns: ..." that goes on in indented lines is a paragraph, not the title of a list."""

import re
from typing import Any

import griffe

_SECTION = re.compile(r"^(Returns|Raises|Attributes|Call): *(\S.*(?:\n +\S.*)*)", re.MULTILINE)


class Paragraphs(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _SECTION.sub(_paragraph, obj.docstring.value)


def _paragraph(section: re.Match[str]) -> str:
    return f"**{section[1]}:** {' '.join(section[2].split())}"
