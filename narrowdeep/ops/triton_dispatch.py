"""The CUDA key of the raw ops, and what is available there. Importing it imports no Triton and asks no device.

Narrow chains run one sample a lane, middling ones in ``tl.dot`` tiles, wider ones (and everything, where Triton is
missing) one layer at a time through cuBLAS (``layered.py``). The choice follows from shapes and dtypes alone.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64)


@functools.cache
def missing() -> str | None:
    """Why the Triton kernels cannot be used, or None."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    try:
        importlib.import_module("triton.language")
    except Exception as error:  # a broken install must not take torch's own path down with it
        return f"the package triton cannot be imported: {error}"
    return None


def check_dtype(x: Tensor) -> None:
    """Raise TypeError for anything but float32 and float64."""
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be torch.float32 or torch.float64, got {x.dtype}")


def register(library: torch.library.Library, family: str, ops: tuple[str, ...]) -> None:
    """Implement ``{family}_{op}`` for CUDA tensors with ``narrowdeep.ops.{family}.triton``, imported at the first call.

    Where Triton is missing ``narrowdeep.ops.{family}.layered`` takes its place.
    """

    def implement(name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            check_dtype(next(a for a in args if isinstance(a, Tensor)))
            module = "layered" if missing() else "triton"
            return getattr(importlib.import_module(f"narrowdeep.ops.{family}.{module}"), name)(*args)

        return call

    for op in ops:
        library.impl(f"{family}_{op}", implement(f"{family}_{op}"), "CUDA")


def triton_status() -> dict[str, Any]:
    """What ``narrowdeep info`` says about the Triton kernels; initialises no device.

    Keys: ``available``, ``reason`` (None if available), ``version``, ``device`` (name or None), ``dtypes``,
    ``kernels`` (kernel -> the shapes it supports; the rest runs one layer at a time).
    """
    reason = missing()
    version = None if reason else importlib.metadata.version("triton")
    device = None
    if reason is None:
        if torch.version.cuda is None:
            reason = "this build of torch has no CUDA"
        elif not torch.cuda.is_available():  # asks the driver, starts no context
            reason = "no CUDA device was found"
        else:
            device = torch.cuda.get_device_name()
    kernels = {}
    if version is not None:
        from narrowdeep.ops.mlp.triton import widest

        for kernel in ("forward", "backward", "jvp"):
            limits = ", ".join(f"{str(d).removeprefix('torch.')} width <= {widest(kernel, d)}" for d in DTYPES)
            kernels[f"mlp {kernel}"] = f"{limits}; past that one layer at a time through cuBLAS"
    return {
        "available": reason is None,
        "reason": reason,
        "version": version,
        "device": device,
        "dtypes": [str(dtype).removeprefix("torch.") for dtype in DTYPES],
        "kernels": kernels,
    }
