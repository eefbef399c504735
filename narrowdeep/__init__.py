"""narrowdeep: networks that are extremely deep and extremely narrow, fused.

Every public name is there after ``import narrowdeep`` and is loaded, torch included, when it is first touched.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from narrowdeep import distributed, export, memory, ntk, optim, training
    from narrowdeep.modules import DeepNarrowCNN, DeepNarrowMLP

    __version__: str

__all__ = ["DeepNarrowCNN", "DeepNarrowMLP", "distributed", "export", "memory", "ntk", "optim", "training"]


def __getattr__(name: str) -> Any:
    """Called once a name: importing a submodule binds it here, and so does this function the rest."""
    value: Any
    if name in ("DeepNarrowCNN", "DeepNarrowMLP"):
        value = getattr(importlib.import_module("narrowdeep.modules"), name)
    elif name in __all__:
        return importlib.import_module(f"narrowdeep.{name}")
    elif name == "__version__":
        value = importlib.import_module("importlib.metadata").version("narrowdeep")
    else:
        raise AttributeError(f"module 'narrowdeep' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
