"""The CPU engine: loads the compiled library that implements the ops of every family for the CPU."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

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


class BackwardCosts(NamedTuple):
    """What a backward of the engine takes beside its results, as the code that allocates it says."""

    kept: int
    """Bytes kept from its begin to its end."""
    segment: int
    """Bytes within a segment, of all threads."""
    longest: int
    """States of the longest segment."""
    held: int
    """States of it that are held at once; where they are fewer, the segment's layers run once more."""


def backward_costs(sizes: Sequence[int], flags: Sequence[bool], threads: int) -> BackwardCosts:
    """Of a span of a batch on so many threads.

    Arguments:
        sizes: batch (at least 1), inputs, width, outputs, hidden layers, segment, filter size (1 for the MLP), height
            and width of the image (1 for the MLP).
        flags: whether the span has the first and the last layer, offset form, gradients of parameters, double
            precision, convolutions.

    Raises: ValueError when NARROWDEEP_ISA names no instruction set of this machine.
    """
    found = (ctypes.c_int64 * 4)()
    arguments = (ctypes.c_int64 * 9)(*sizes), (ctypes.c_bool * 6)(*flags), ctypes.c_int64(threads), found
    if load().narrowdeep_backward_costs(*arguments):
        raise ValueError(f"NARROWDEEP_ISA must be one of {', '.join(instruction_sets())} on this machine")
    return BackwardCosts(*found)


def multiply_adds(rounds: int, *, independent: bool, double: bool) -> int:
    """Multiply-adds in registers on every thread of torch's pool, for benchmarks to time.

    Returns the floating-point operations of all threads, as many at once as keep all units busy; or, where they are not
    ``independent``, the multiply-adds of one thread, each of which waited for the last.

    Raises: ValueError when NARROWDEEP_ISA names no instruction set of this machine.
    """
    run = load().narrowdeep_multiply_adds
    run.restype = ctypes.c_int64
    operations = int(run(ctypes.c_int64(rounds), ctypes.c_bool(independent), ctypes.c_bool(double)))
    if rounds > 0 and operations == 0:
        raise ValueError(f"NARROWDEEP_ISA must be one of {', '.join(instruction_sets())} on this machine")
    return operations
