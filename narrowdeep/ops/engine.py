"""The CPU engine: loads the compiled library that implements the ops of every family for the CPU."""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache

import torch


@cache
def load() -> ctypes.CDLL:
    """Register the engine's kernels with torch, once.

    Raises: ImportError when the engine has not been built.
    """
    spec = importlib.util.find_spec("narrowdeep._C")
    if spec is None or spec.origin is None:
        raise ImportError(
            "narrowdeep's CPU engine is not built: run `pip install --no-build-isolation -e .` in the repository"
        )
    torch.ops.load_library(spec.origin)
    return ctypes.CDLL(spec.origin)


def instruction_sets() -> list[str]:
    """Builds of the kernels that run on this processor, fastest first; NARROWDEEP_ISA=<name> forces one, for tests."""
    names = load().narrowdeep_available_isas
    names.restype = ctypes.c_char_p
    return str(names().decode()).split()
