"""Packages that only parts of the library need: where one is missing, the error names the extra that brings it.

The networks, their kernels and ``narrowdeep.memory`` need torch and numpy alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

EXTRAS = {
    "pydantic": "training",
    "pydantic_core": "training",
    "safetensors": "training",
    "scipy": "ntk",
    "sklearn": "ntk",
    "typer": "cli",
    "tomli": "cli",
    "rich": "cli",
    "jinja2": "cli",
    "matplotlib": "plots",
    "tensorboard": "tensorboard",
    "torchvision": "download",
}
"""Module -> the extra of pyproject.toml that it is in."""


class MissingExtraError(ImportError):
    """A package is not installed; the message names the extra to install."""


@contextmanager
def optional() -> Iterator[None]:
    """Put around imports of what is in ``EXTRAS``.

    Raises: MissingExtraError where one of them is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in EXTRAS:
            raise
        raise MissingExtraError(
            f"this needs {module}, which is not installed: {install(EXTRAS[module])}", name=module
        ) from None


def install(extra: str) -> str:
    """The command that installs an extra."""
    return f"pip install 'narrowdeep[{extra}]'"
